"""Two random views of an image, chosen in the worker: where to crop, whether to flip, how to recolour.

Every draw is a pure function of (seed, epoch, sample, view), so a sample's views are the same on any number of ranks
and workers and after any resume. Crops are cut here, in uint8; colours change later, in batches, on the device.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from pretrain.config import ViewsConfig
from shards.decode import decode_rgb, image_size

RATIO = (3 / 4, 4 / 3)
JITTER_PROBABILITY = 0.8
BLUR_SIGMA = (0.1, 2.0)

# Columns of a colour vector.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, BLUR, SOLARIZE = range(8)
NUM_COLOURS = 8
ORDERS = np.array([[a, b, c, d] for a in range(4) for b in range(4) for c in range(4) for d in range(4)])
ORDERS = ORDERS[[len(set(row)) == 4 for row in ORDERS.tolist()]]  # the 24 orders of the four jitter operations


@dataclass(frozen=True)
class View:
    """One view's geometry and colours.

    Attributes:
        box: crop as (top, left, height, width), fractions of the image.
        flip: mirrored left to right.
        colours: float32 `(NUM_COLOURS,)`: three jitter factors, hue shift in turns, index into `ORDERS` (-1: no
            jitter), grey (0 or 1), blur sigma in pixels (0: none), solarise (0 or 1).
    """

    box: tuple[float, float, float, float]
    flip: bool
    colours: np.ndarray


def view_generator(seed: int, *, epoch: int, sample: int, view: int) -> np.random.Generator:
    """Counter-based generator of one view: its key names the view, so no state is carried from one to the next."""
    key = (seed & 0xFFFFFFFF) | (view << 32)
    return np.random.Generator(np.random.Philox(key=[key, (epoch << 44) | sample]))


def draw_view(rng: np.random.Generator, config: ViewsConfig, *, height: int, width: int) -> View:
    """Draw crop, flip and colours for an image of `height` x `width` pixels.

    Source: SimCLR's official data_util.py: area (min_area, 1), ratio (3/4, 4/3), flip 0.5, jitter
    (.8 s, .8 s, .8 s, .2 s) with p 0.8 in random order, grey 0.2, blur 0.5.
    """
    top, left, crop_height, crop_width = _draw_box(rng, config.min_area, height=height, width=width)
    uniform = rng.random(12)
    strength = 0.8 * config.jitter
    low = max(0.0, 1.0 - strength)
    colours = np.zeros(NUM_COLOURS, dtype=np.float32)
    colours[BRIGHTNESS : SATURATION + 1] = low + (1.0 + strength - low) * uniform[:3]
    colours[HUE] = min(0.2 * config.jitter, 0.5) * (2 * uniform[3] - 1)
    jittered = uniform[4] < JITTER_PROBABILITY and config.jitter > 0
    colours[ORDER] = int(uniform[5] * len(ORDERS)) if jittered else -1
    colours[GREY] = uniform[6] < config.grey
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * uniform[7]
    colours[BLUR] = sigma if uniform[8] < config.blur else 0.0
    colours[SOLARIZE] = uniform[9] < config.solarize
    box = (top / height, left / width, crop_height / height, crop_width / width)
    return View(box, bool(uniform[10] < 0.5), colours)


def cut_views(data: bytes, views: list[View], *, size: int) -> np.ndarray:
    """Decode once, at the smallest scale that still gives every crop its pixels, and cut all views.

    Returns:
        uint8 `(num_views, size, size, 3)`, RGB.

    Raises:
        ValueError: the bytes are no readable image.
    """
    height, width = image_size(data)
    # a crop of relative height h becomes `size` rows: the whole image needs at least size / h of them
    need_height = max(math.ceil(size / v.box[2]) for v in views)
    need_width = max(math.ceil(size / v.box[3]) for v in views)
    # libjpeg-turbo is fast at full size and at halves; the eighths between them take longer than the whole
    half_is_enough = 2 * need_height <= height and 2 * need_width <= width
    image = decode_rgb(data, min_size=(need_height, need_width) if half_is_enough else None)
    out = np.empty((len(views), size, size, 3), dtype=np.uint8)
    for i, view in enumerate(views):
        _cut(image, view, out=out[i])
    return out


def _cut(image: np.ndarray, view: View, *, out: np.ndarray) -> None:
    """Crop, resize and flip into `out`, `(size, size, 3)`.

    Bicubic as in SimCLR. Scaled decoding has already shrunk the image, so less than a factor of two is left as a rule;
    beyond that bicubic would alias, and area averaging, eight times slower, takes over.
    """
    rows, columns = image.shape[:2]
    top, left = round(view.box[0] * rows), round(view.box[1] * columns)
    bottom = max(top + 1, round((view.box[0] + view.box[2]) * rows))
    right = max(left + 1, round((view.box[1] + view.box[3]) * columns))
    crop = image[top:bottom, left:right]
    size = out.shape[0]
    shrinking = min(crop.shape[:2]) >= 2 * size
    resized = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
    if view.flip:
        cv2.flip(resized, 1, dst=out)
    else:
        out[:] = resized


def _draw_box(
    rng: np.random.Generator, min_area: float, *, height: int, width: int
) -> tuple[float, float, float, float]:
    """Top, left, height, width in pixels: ten tries as torchvision's RandomResizedCrop, then the central fallback."""
    draws = rng.random((10, 4))
    for area_draw, ratio_draw, top_draw, left_draw in draws.tolist():
        area = height * width * (min_area + (1 - min_area) * area_draw)
        ratio = math.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(top_draw * (height - crop_height + 1)), int(left_draw * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < RATIO[0]:
        crop_height = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        crop_width = round(height * RATIO[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
