"""Random views of images, chosen in the worker: where to crop, whether to flip, how to recolour.

Every draw is a pure function of (seed, epoch, sample, view), so a sample's views are the same on any number of ranks
and workers and after any resume. A whole batch is drawn at once. Crops are cut here, in uint8; colours change later, in
batches, on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from pretrain.config import ViewsConfig
from pretrain.philox import uniforms
from shards.decode import ImageHeader, Scratch, decode_rgb, decoded_scale

RATIO = (3 / 4, 4 / 3)
TRIES = 10
JITTER_PROBABILITY = 0.8
BLUR_SIGMA = (0.1, 2.0)
LINEAR_FROM, HALVED_FROM = 1.2, 2.0

# Columns of a colour vector.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, BLUR, SOLARIZE = range(8)
NUM_COLOURS = 8
ORDERS = np.array([[a, b, c, d] for a in range(4) for b in range(4) for c in range(4) for d in range(4)])
ORDERS = ORDERS[[len(set(row)) == 4 for row in ORDERS.tolist()]]  # the 24 orders of the four jitter operations

_BLOCKS = TRIES + 3  # of four random numbers each: one per try for a box, three for the rest


@dataclass(frozen=True)
class Views:
    """Geometry and colours of the views of a batch of images.

    Attributes:
        crops: int64 `(num_views, batch, 4)`: top, left, height, width in pixels of the upright image.
        flips: bool `(num_views, batch)`, mirrored left to right.
        colours: float32 `(num_views, batch, NUM_COLOURS)`: three jitter factors, hue shift in turns, index into
            `ORDERS` (-1: no jitter), grey (0 or 1), blur sigma in pixels (0: none), solarise (0 or 1).
    """

    crops: np.ndarray
    flips: np.ndarray
    colours: np.ndarray


def draw_views(
    config: ViewsConfig,
    *,
    seed: int,
    epochs: Sequence[int] | np.ndarray,
    samples: Sequence[int] | np.ndarray,
    sizes: Sequence[tuple[int, int]] | np.ndarray,
    num_views: int,
) -> Views:
    """Draw crops, flips and colours.

    Source: SimCLR's official data_util.py: area (min_area, 1), ratio (3/4, 4/3), flip 0.5, jitter
    (.8 s, .8 s, .8 s, .2 s) with p 0.8 in random order, grey 0.2, blur 0.5.

    Args:
        seed: its lowest 64 bits count.
        epochs: `(batch,)`, below 2**32.
        samples: numbers of the images in their set, `(batch,)`.
        sizes: upright height and width of the images in pixels, `(batch, 2)`.
    """
    samples = np.asarray(samples, dtype=np.int64)
    # The counter names the number drawn: its place in the view, the view, the sample, the epoch.
    counters = np.empty((4, _BLOCKS, num_views, len(samples)), dtype=np.int64)
    counters[0] = np.arange(_BLOCKS)[:, None, None] + (np.arange(num_views)[:, None] << 16)
    counters[1], counters[2], counters[3] = samples & 0xFFFFFFFF, samples >> 32, epochs
    drawn = uniforms(counters, key=seed)
    rest = drawn[:, TRIES:].reshape(12, num_views, len(samples))
    crops = _draw_crops(drawn[:, :TRIES], config.min_area, sizes=np.asarray(sizes, dtype=np.int64))
    return Views(crops, rest[10] < 0.5, _draw_colours(rest, config))


def _draw_colours(uniform: np.ndarray, config: ViewsConfig) -> np.ndarray:
    """Colour vectors `(..., NUM_COLOURS)` from ten or more random numbers each, `(10, ...)`."""
    strength = 0.8 * config.jitter
    low = max(0.0, 1.0 - strength)
    colours = np.empty((*uniform.shape[1:], NUM_COLOURS), dtype=np.float32)
    for column, numbers in zip((BRIGHTNESS, CONTRAST, SATURATION), uniform, strict=False):
        colours[..., column] = low + (1.0 + strength - low) * numbers
    colours[..., HUE] = min(0.2 * config.jitter, 0.5) * (2 * uniform[3] - 1)
    jittered = (uniform[4] < JITTER_PROBABILITY) & (config.jitter > 0)
    colours[..., ORDER] = np.where(jittered, np.floor(uniform[5] * len(ORDERS)), -1)
    colours[..., GREY] = uniform[6] < config.grey
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * uniform[7]
    colours[..., BLUR] = np.where(uniform[8] < config.blur, sigma, 0.0)
    colours[..., SOLARIZE] = uniform[9] < config.solarize
    return colours


def _draw_crops(uniform: np.ndarray, min_area: float, *, sizes: np.ndarray) -> np.ndarray:
    """Crops `(views, batch, 4)` in pixels: ten tries as torchvision's RandomResizedCrop, then the central fallback.

    Args:
        uniform: `(4, tries, views, batch)`.
    """
    heights, widths = sizes.T
    area_draw, ratio_draw, top_draw, left_draw = uniform
    area = heights * widths * (min_area + (1 - min_area) * area_draw)
    # The square root of the ratio: a crop of area A has the sides sqrt(A) * root and sqrt(A) / root.
    root = np.exp((math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * ratio_draw) / 2)
    side = np.sqrt(area)
    tall, wide = np.rint(side / root).astype(np.int64), np.rint(side * root).astype(np.int64)
    fits = (tall > 0) & (tall <= heights) & (wide > 0) & (wide <= widths)
    tries = np.concatenate([tall, wide, top_draw, left_draw]).reshape(4, *fits.shape)
    chosen = np.take_along_axis(tries, fits.argmax(axis=0)[None, None], axis=1)[:, 0]
    none_fits = ~fits.any(axis=0)
    central = _central_crops(heights, widths)
    tall, wide = (np.where(none_fits, side, made).astype(np.int64) for side, made in zip(central, chosen, strict=False))
    free = np.stack([heights - tall, widths - wide])
    corner = np.where(none_fits, free // 2, (chosen[2:] * (free + 1)).astype(np.int64))
    return np.stack([*corner, tall, wide], axis=-1)


def _central_crops(heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the largest crop of an allowed ratio."""
    tall = np.where(widths / heights < RATIO[0], np.rint(widths / RATIO[0]), heights)
    wide = np.where(widths / heights > RATIO[1], np.rint(heights * RATIO[1]), widths)
    return np.maximum(tall, 1), np.maximum(wide, 1)


class ViewCutter:
    """Cuts views of `size` pixels, image after image, in memory of its own; one for each thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._scratch = Scratch()
        self._padded = np.empty((size, size, 4), dtype=np.uint8)

    def cut(
        self,
        data: bytes,
        header: ImageHeader,
        crops: Sequence[Sequence[int]],
        flips: Sequence[bool],
        *,
        out: np.ndarray,
    ) -> None:
        """Decode once, at the smallest scale that still gives every crop its pixels, and cut all views.

        Colours are decoded the fast way (our choice): in a view that is about 0.5 of 255 away, less than its jitter by
        far.

        Args:
            data: an image file.
            header: what `image_header` says of it.
            crops: top, left, height, width of each view, pixels of the upright image.
            flips: whether each view is mirrored.
            out: takes the views, uint8 `(num_views, size, size, 3)`, RGB.

        Raises:
            ValueError: the bytes are no readable image.
        """
        stored = header[:2]
        image = decode_rgb(
            data,
            header=header,
            min_size=self._needed(crops, stored),
            fast_colour=True,
            padded=True,
            scratch=self._scratch,
        )
        boxes: Sequence[Sequence[float]] = crops
        if image.shape[:2] != stored:
            scale = decoded_scale(stored, image.shape)
            boxes = [[scale * side for side in crop] for crop in crops]
        between = self._padded if image.shape[2] == 4 else None
        for box, flip, view in zip(boxes, flips, out, strict=True):
            resize(image, box, view if between is None else between)
            if between is not None:
                cv2.cvtColor(between, cv2.COLOR_RGBA2RGB, view)
            if flip:
                cv2.flip(view, 1, view)

    def _needed(self, crops: Sequence[Sequence[int]], stored: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width that suffice for the decoded image; None for all that is stored."""
        # libjpeg-turbo is fast at full size and at halves; the eighths between them take longer than the whole
        for _, _, tall, wide in crops:
            if tall < 2 * self.size or wide < 2 * self.size:
                return None
        shortest = min([crop[2] for crop in crops]), min([crop[3] for crop in crops])
        rows, columns = (math.ceil(self.size * side / crop) for side, crop in zip(stored, shortest, strict=True))
        return rows, columns


def resize(image: np.ndarray, box: Sequence[float], out: np.ndarray) -> None:
    """Resize what a box shows to the size of `out`.

    SimCLR resizes bicubically. OpenCV's kernels do not widen when they shrink: from a factor of 1.2 on its linear one
    comes closer to an antialiased bicubic resize than its cubic one does. From 2 on the image is halved first, as often
    as there are enough pixels: of all areas, squares of two are what OpenCV averages quickly. In an image that was made
    smaller the box may begin and end between pixels, and is sampled there.

    Args:
        image: uint8 `(height, width, channels)`.
        box: top, left, height, width in its pixels; whole numbers, or floats with fractions.
        out: uint8 `(size, size, channels)`.
    """
    size, (top, left, tall, wide) = len(out), box
    while (tall if tall < wide else wide) >= HALVED_FROM * size:
        image, (top, left, tall, wide) = _halved(image, (top, left, tall, wide))
    if isinstance(top, int) and isinstance(left, int) and isinstance(tall, int) and isinstance(wide, int):
        kernel = cv2.INTER_LINEAR if (tall if tall < wide else wide) >= LINEAR_FROM * size else cv2.INTER_CUBIC
        cv2.resize(image[top : top + tall, left : left + wide], (size, size), out, 0, 0, kernel)
        return
    down, across = tall / size, wide / size
    where = np.array([[across, 0, left + across / 2 - 0.5], [0, down, top + down / 2 - 0.5]])
    cv2.warpAffine(image, where, (size, size), out, cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, cv2.BORDER_REPLICATE)


def _halved(image: np.ndarray, box: Sequence[float]) -> tuple[np.ndarray, tuple[float, ...]]:
    """The part of an image that holds a box, at half the size, and the box in it."""
    top, left, tall, wide = box
    first_row, first_column = int(top) // 2 * 2, int(left) // 2 * 2
    # the last pixel of a side of odd length is left out; the one before it stands for it
    rows = min(math.ceil((top + tall - first_row) / 2), (image.shape[0] - first_row) // 2)
    columns = min(math.ceil((left + wide - first_column) / 2), (image.shape[1] - first_column) // 2)
    part = image[first_row : first_row + 2 * rows, first_column : first_column + 2 * columns]
    half = cv2.resize(part, (columns, rows), None, 0, 0, cv2.INTER_AREA)
    return half, ((top - first_row) / 2, (left - first_column) / 2, tall / 2, wide / 2)
