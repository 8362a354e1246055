"""Small image folders and packed sets for the tests of this room."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder


def jpeg(*, seed: int = 0, height: int = 24, width: int = 32, **options: object) -> bytes:
    """A smooth random JPEG."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.fixture(name="jpeg")
def jpeg_fixture() -> Callable[..., bytes]:
    """The JPEG maker."""
    return jpeg


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """23 images in 3 classes, one of them in a folder below its class."""
    root = tmp_path / "images"
    for number in range(23):
        name = f"{['cat', 'dog', 'owl'][number % 3]}/{'more/' if number == 7 else ''}{number:03d}.jpg"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(seed=number))
    return root


@pytest.fixture
def packed(image_folder: Path, tmp_path: Path) -> ShardSet:
    """The image folder in 4 shards of up to 7 samples (uneven on purpose)."""
    pack(ImageFolder(image_folder), tmp_path / "set", shard_samples=7, workers=1)
    return ShardSet(tmp_path / "set")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real data sets, from SACCADE_DATA."""
    folder = os.environ.get("SACCADE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SACCADE_DATA names no folder with osie/ and imagenette128/")
    return Path(folder)
