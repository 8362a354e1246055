"""Scaled-down images: what lies where in the image lies there in its reduction."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.decode import decode_rgb
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder

FROM_CORNER = 20.0
"""Pixels of the reduced image between the blob's centre and the far edges."""


def blob(height: int, width: int, *, scale: tuple[float, float], sigma: float = 4.0) -> bytes:
    """A grey JPEG with one bright Gaussian near its bottom right corner; `sigma` in pixels of the reduced image."""
    rows, columns = (
        np.exp(-0.5 * (((np.arange(side) + 0.5) * factor - (side * factor - FROM_CORNER)) / sigma) ** 2)
        for side, factor in zip((height, width), scale, strict=True)
    )
    grey = np.rint(200 * np.outer(rows, columns)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("height", "width", "max_side"),
    [(4001, 4001, 500), (1025, 1025, 128), (513, 513, 128), (385, 513, 200), (4000, 3001, 640), (1024, 768, 256)],
)
def test_max_side_moves_nothing(tmp_path: Path, height: int, width: int, max_side: int) -> None:
    small = tuple(round(side * max_side / max(height, width)) for side in (height, width))
    (tmp_path / "images").mkdir()
    data = blob(height, width, scale=(small[0] / height, small[1] / width))
    (tmp_path / "images" / "a.jpg").write_bytes(data)
    pack(ImageFolder(tmp_path / "images"), tmp_path / "set", workers=1, max_side=max_side, quality=95)
    pixels = decode_rgb(ShardSet(tmp_path / "set").read(0, 0).image)[..., 0].astype(float)
    assert pixels.shape == small
    pixels[pixels < 8] = 0  # what the compression leaves far from the blob would pull at its centre
    found = [np.average(np.arange(side) + 0.5, weights=pixels.sum(1 - axis)) for axis, side in enumerate(small)]
    np.testing.assert_allclose(found, [side - FROM_CORNER for side in small], atol=0.1)
