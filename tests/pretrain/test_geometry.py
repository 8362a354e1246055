"""The map goes where the image goes: one property over random images, boxes and flips."""

import io

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attention.maps import crop_mass, warp
from pretrain.config import ViewsConfig
from pretrain.views import ViewCutter, draw_views
from shards.decode import image_header

GRID = 56


@settings(max_examples=60, deadline=None)
@given(
    sample=st.integers(0, 10**9),
    height=st.integers(160, 400),
    width=st.integers(160, 400),
    place=st.tuples(st.floats(0.3, 0.7), st.floats(0.3, 0.7)),
)
def test_a_delta_lands_on_the_same_pixel_as_the_image_content(
    sample: int, height: int, width: int, place: tuple[float, float]
) -> None:
    """A white spot in the image and a delta in its map at the same place: in the view their centres agree."""
    size = GRID
    views = draw_views(ViewsConfig(), seed=0, epochs=[0], samples=[sample], sizes=[(height, width)], num_views=1)
    crop, flip = views.crops[0, 0], views.flips[0]
    top, left, tall, wide = crop / (height, width, height, width)
    row, column = int((top + place[0] * tall) * GRID), int((left + place[1] * wide) * GRID)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    centre = ((row + 0.5) / GRID * height, (column + 0.5) / GRID * width)
    spot = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * 3.0**2))
    image = np.repeat((255 * spot)[..., None], 3, axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)

    density = torch.zeros(1, GRID, GRID)
    density[0, row, column] = 1
    box = torch.tensor([[top, left, tall, wide]])
    assert crop_mass(density, box).item() > 0.99
    out = np.empty((1, size, size, 3), dtype=np.uint8)
    data = buffer.getvalue()
    ViewCutter(size).cut(data, image_header(data), [crop.tolist()], flip.tolist(), out=out)
    pixels = out[0].astype(float).mean(-1)
    moved = warp(density, box, torch.from_numpy(flip), (size, size))[0].numpy()
    found = [centre_of(np.where(m > 0.2 * m.max(), m, 0)) for m in (pixels, moved)]
    assert np.abs(np.subtract(*found)).max() < 1.5


def centre_of(weights: np.ndarray) -> np.ndarray:
    """Centre of mass as (row, column)."""
    rows, columns = np.indices(weights.shape)
    return np.array([(rows * weights).sum(), (columns * weights).sum()]) / weights.sum()
