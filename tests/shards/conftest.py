"""Small image folders and packed sets for the tests of this room."""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shards.remote
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder
from tests.conftest import write_labels
from tests.shards.servers import SpoilingProxy, moto_s3, nginx, spoiling


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


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies, caches or credentials of the user; downloads in several pieces."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AWS_", "FSSPEC_", "SACCADE_CACHE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards.remote, "CHUNK_BYTES", 10_000)


@pytest.fixture(scope="session")
def nginx_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A real nginx: its port, and the folder that it serves."""
    if shutil.which("nginx") is None:
        pytest.skip("no nginx on the PATH (Debian: apt-get install nginx-light)")
    root, folder = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("nginx")
    with nginx(root, folder) as port:
        yield port, root


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """A real S3 API's port."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed (pip install -e '.[test]')")
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install -e '.[remote]')")
    with moto_s3() as port:
        yield port


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """23 images in 4 shards, with label maps."""
    root = tmp_path_factory.mktemp("local")
    for number in range(23):
        path = root / "images" / ["cat", "dog", "owl"][number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed=number))
    pack(ImageFolder(root / "images"), root / "set", shard_samples=7, workers=1)
    return ShardSet(root / "set", labels=write_labels(root / "set", root / "labels"))


@pytest.fixture
def web(alone: None, local: ShardSet, nginx_port: tuple[int, Path]) -> Iterator[SpoilingProxy]:
    """The local set on nginx as /set and /labels/<teacher>, behind a proxy that may spoil it."""
    port, root = nginx_port
    for name in ("set", "labels"):
        shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(Path(local.root).parent / name, root / name)
    with spoiling(port) as proxy:
        yield proxy
