"""Hostile and broken manifests, indices and images: errors of ours only, and nothing in them ever runs."""

import hashlib
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import InputError
from shards.decode import decode_rgb, image_size
from shards.index import IndexFault, read_index
from shards.manifest import read_manifest
from shards.reader import BadSample, ShardSet
from shards.writer import index_path
from tests.shards.damage import index_bytes, manifest_of


@pytest.mark.parametrize(
    "name",
    ["pipe:touch RAN", "../other.tar", "/etc/passwd", "a/b.tar", "..", "", "shard.zip", "http://host/x.tar", "x\0.tar",
     "-rf.tar", 7, None],
)  # fmt: skip
def test_shard_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest_of(shard={"file": name})))
    with pytest.raises(InputError, match=r"plain \.tar file name"):
        ShardSet(tmp_path)
    assert not (tmp_path / "RAN").exists() and not Path("RAN").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"schema": 2}, "schema 2, this version of Saccade reads 1"),
        ({"schema": "1"}, "schema '1'"),
        ({"schema": True}, "schema True"),
        ({"kind": "weights"}, "neither"),
        ({"num_samples": 2}, "not the sum"),
        ({"num_samples": True}, "not the sum"),
        ({"shard": {"num_samples": -1}}, "no count"),
        ({"shard": {"num_samples": True}}, "no count"),
        ({"shard": {"num_samples": 1.0}}, "no count"),
        ({"shard": {"num_bytes": 10**30}}, "no count"),
        ({"shard": {"sha256": "zz"}}, "64 hexadecimal"),
        ({"shards": [1]}, "not a valid manifest"),
        ({"shards": {}}, "wrong type"),
        ({"classes": [1]}, "texts"),
        ({"classes": "cat"}, "wrong type"),
        ({"kind": "labels", "settings": {"size": None}}, "no .height, width."),
        ({"kind": "labels", "settings": {"size": 5}}, "no .height, width."),
        ({"kind": "labels", "settings": {"size": []}}, "no .height, width."),
        ({"kind": "labels", "settings": {"size": [56, True]}}, "no .height, width."),
    ],
)
def test_wrong_manifests_are_one_clear_line(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest_of(**changes)))
    with pytest.raises(InputError, match=word) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema": 1}', b'{"schema": 1e999}']
)
def test_files_that_are_no_manifest_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(InputError, match="not a valid manifest"):
        read_manifest(tmp_path)


def test_a_shard_listed_twice_is_refused(tmp_path: Path) -> None:
    value = manifest_of(num_samples=2, num_bytes=4096)
    value["shards"] *= 2
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="listed twice"):
        read_manifest(tmp_path)


def test_pipes_and_devices_in_place_of_files_never_block(packed: ShardSet) -> None:
    tar, other = (packed.root / name for name in packed.manifest.files[:2])
    for path in (tar, index_path(other)):
        path.unlink()
        os.mkfifo(path)
    for shard in (0, 1):
        with pytest.raises(BadSample, match="not a regular file"):
            packed.read(shard, 0)
    (packed.root / "quarantine.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a regular file"):
        ShardSet(packed.root)
    (packed.root / "manifest.json").unlink()
    os.mkfifo(packed.root / "manifest.json")
    with pytest.raises(InputError, match="not a regular file"):
        ShardSet(packed.root)


def test_an_index_that_promises_more_than_memory_is_one_bad_sample(tmp_path: Path) -> None:
    """Index and manifest agree with each other on a petabyte; the file on disk is small."""
    size = 1 << 50
    path = raw_index(tmp_path, arrays={"size": np.array([size])}, num_bytes=size + 1024)
    path.rename(tmp_path / "shard-000000.index")
    digest = hashlib.sha256((tmp_path / "shard-000000.index").read_bytes()).hexdigest()
    value = manifest_of(shard={"num_bytes": size + 1024, "index_sha256": digest}, num_bytes=size + 1024)
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    (tmp_path / "shard-000000.tar").write_bytes(bytes(2048))
    with pytest.raises(BadSample, match=f"{size} bytes are too many"):
        ShardSet(tmp_path).read(0, 0)


class Boom:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_pickles_in_place_of_any_file_never_run(packed: ShardSet, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    data = pickle.dumps(Boom(marker))
    pickle.loads(data)
    assert marker.exists()  # the bait works
    marker.unlink()
    tar = packed.root / packed.manifest.files[0]
    index_path(tar).write_bytes(data)
    with pytest.raises(BadSample, match="whole shard"):
        packed.read(0, 0)
    (packed.root / packed.manifest.files[1]).write_bytes(data)
    with pytest.raises(BadSample):
        packed.read(1, 0)
    with pytest.raises(ValueError):
        decode_rgb(data)
    (packed.root / "quarantine.json").write_bytes(data)
    with pytest.raises(InputError):
        ShardSet(packed.root)
    (packed.root / "manifest.json").write_bytes(data)
    with pytest.raises(InputError):
        ShardSet(packed.root)
    assert not marker.exists()


def raw_index(tmp_path: Path, *, arrays: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """The file of `index_bytes`."""
    (tmp_path / "a.index").write_bytes(index_bytes(arrays=arrays, **changes))
    return tmp_path / "a.index"


INT = np.iinfo(np.int64)


@pytest.mark.parametrize(
    "arrays",
    [
        {"offset": np.array([-1])},
        {"offset": np.array([2000])},
        {"offset": np.array([INT.max])},
        {"size": np.array([INT.max])},
        {"size": np.array([-2])},
        {"info_offset": np.array([INT.max]), "info_size": np.array([INT.max])},
        {"label": np.array([0, 1])},
        {"label": np.array([0.5])},
        {"key_end": np.array([2])},
        {"key_end": np.array([0])},
        {"key_end": np.array([-1])},
        {"key_data": np.frombuffer(b"\xff", dtype=np.uint8)},
        {"crc": np.array([[1]], dtype=np.uint32)},
    ],
)
def test_impossible_indices_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    assert len(read_index(raw_index(tmp_path))) == 1
    with pytest.raises(IndexFault, match=r"a.index: damaged index"):
        read_index(raw_index(tmp_path, arrays=arrays))


def test_a_key_that_ends_inside_a_character_is_refused(tmp_path: Path) -> None:
    data = index_bytes(keys=("a", "é"))
    (tmp_path / "a.index").write_bytes(data)
    assert read_index(tmp_path / "a.index").keys() == ["a", "é"]
    (tmp_path / "a.index").write_bytes(index_bytes(keys=("a", "é"), arrays={"key_end": np.array([2, 3])}))
    with pytest.raises(IndexFault, match=r"a.index: damaged index .*inside a character"):
        read_index(tmp_path / "a.index")


@pytest.mark.parametrize(
    "changes", [{"schema": 2}, {"num_samples": 10**12}, {"num_samples": "x"}, {"num_bytes": 10}, {"skipped": 3}]
)
def test_impossible_index_metadata_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(IndexFault, match="damaged index"):
        read_index(raw_index(tmp_path, **changes))


def png_header(width: int, height: int) -> bytes:
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_images_that_promise_too_many_pixels_are_refused_before_decoding(jpeg: Callable[..., bytes]) -> None:
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    for bomb in (bytes(data), png_header(60_000, 60_000)):
        for function in (image_size, decode_rgb):
            with pytest.raises(ValueError, match=r"60000x60000 pixels is more than the limit"):
                function(bomb)


def test_images_without_pixels_are_refused(jpeg: Callable[..., bytes]) -> None:
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 7] = b"\0\0"
    for broken in (b"", b"\0" * 100, b"\xff\xd8", b"\xff\xd8\xff", b"GIF89a", bytes(data), b"\x89PNG\r\n\x1a\n"):
        for function in (image_size, decode_rgb):
            with pytest.raises(ValueError):
                function(broken)
