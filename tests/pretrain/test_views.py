"""Views are a pure function of (seed, epoch, sample, view) and follow SimCLR's distributions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from pretrain.config import ViewsConfig
from pretrain.views import BLUR, GREY, ORDER, View, cut_views, draw_view, view_generator


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=98, subsampling=0)
    return buffer.getvalue()


def draw(sample: int, *, epoch: int = 0, view: int = 0, seed: int = 0, height: int = 300, width: int = 400) -> View:
    rng = view_generator(seed, epoch=epoch, sample=sample, view=view)
    return draw_view(rng, ViewsConfig(), height=height, width=width)


def test_a_view_depends_on_its_key_alone() -> None:
    first, again = draw(5), draw(5)
    assert first.box == again.box and first.flip == again.flip and np.array_equal(first.colours, again.colours)
    others = [draw(6), draw(5, epoch=1), draw(5, view=1), draw(5, seed=1)]
    assert all(other.box != first.box for other in others)


def test_boxes_are_distributed_as_torchvisions() -> None:
    """Mean and spread of area, ratio and position over 3,000 draws, against RandomResizedCrop itself."""
    ours = np.array([draw(i).box for i in range(3000)]) * [300, 400, 300, 400]
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400)
    params = [RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3]) for _ in range(3000)]
    for found, expected in zip(measures(ours), measures(np.array(params, dtype=float)), strict=True):
        error = np.hypot(found.std(), expected.std()) / np.sqrt(3000)
        assert abs(found.mean() - expected.mean()) < 4 * error
        assert found.std() == pytest.approx(expected.std(), rel=0.08)


def measures(boxes: np.ndarray) -> list[np.ndarray]:
    """Top, left, area and log ratio of boxes `(boxes, 4)`."""
    top, left, height, width = boxes.T
    return [top, left, height * width, np.log(width / height)]


def test_rates_of_flip_jitter_grey_and_blur_are_simclrs() -> None:
    views = [draw(i) for i in range(4000)]
    colours = np.stack([v.colours for v in views])
    rates = {
        0.5: np.mean([v.flip for v in views]),
        0.8: np.mean(colours[:, ORDER] >= 0),
        0.2: np.mean(colours[:, GREY]),
    }
    for expected, found in rates.items():
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)
    assert abs(np.mean(colours[:, BLUR] > 0) - 0.5) < 0.035
    sigmas = colours[:, BLUR][colours[:, BLUR] > 0]
    assert sigmas.min() >= 0.1 and sigmas.max() <= 2.0 and abs(sigmas.mean() - 1.05) < 0.06
    assert len(np.unique(colours[:, ORDER])) == 25  # 24 orders and none


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [16, 64])
def test_a_crop_shows_what_its_box_says(flip: bool, size: int) -> None:
    """On a gradient image every output pixel's colour tells where it came from."""
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    image = np.stack([x, y, np.full_like(x, 128)], -1).astype(np.uint8)
    box = (0.25, 0.125, 0.5, 0.375)
    out = cut_views(jpeg(image), [View(box, flip, np.zeros(8, np.float32))], size=size)[0].astype(float)
    across = 255 * (box[1] + box[3] * (np.arange(size) + 0.5) / size)
    down = 255 * (box[0] + box[2] * (np.arange(size) + 0.5) / size)
    inner = slice(2, -2)
    expected = across[::-1] if flip else across
    assert np.abs(out[inner, inner, 0] - expected[None, inner]).max() < 3
    assert np.abs(out[inner, inner, 1] - down[inner, None]).max() < 3


def test_scaled_decoding_changes_little_and_extreme_images_work() -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    image = np.asarray(small.resize((1600, 1200), Image.Resampling.BICUBIC))
    whole = View((0.0, 0.0, 1.0, 1.0), False, np.zeros(8, np.float32))
    out = cut_views(jpeg(image), [whole], size=64)[0]
    reference = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BOX))
    assert np.abs(out.astype(float) - reference).mean() < 2
    for height, width in ((1, 1), (3, 500), (500, 3)):
        view = draw(0, height=height, width=width)
        assert cut_views(jpeg(np.full((height, width, 3), 77, np.uint8)), [view], size=8).shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match=r".+"):
        cut_views(b"no image", [whole], size=8)
