"""Damaged files of every kind that is read, and what reading each of them may do: one place for tests and fuzz.

A target makes bytes from a source of chance, and reads them: `read` returns quietly or raises one of `allowed`;
anything else is a fault of ours. The source of chance is hypothesis in the tests and a seeded generator in
benchmarks/fuzz.py.
"""

import io
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from safetensors.numpy import save as save_arrays

from engine.errors import InputError
from shards.decode import decode_rgb, image_size
from shards.folder import LocalFolder
from shards.index import METADATA_KEY, IndexFault, parse_index
from shards.keys import pack_keys
from shards.labels import encode_label
from shards.manifest import FILE_NAME, Manifest, ShardRecord, make_manifest, read_manifest
from shards.map_png import decode_map_png
from shards.objects import decode_objects, store_objects
from shards.quarantine import bad_rows, read_quarantine
from shards.tar import BLOCK, END, TarError, header_of, padded, scan

HASH = "0" * 64
JSON = b'0123456789-.eE,:"[]{} utfn'
IMAGE_KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")


class Chance(Protocol):
    """Where the damage comes from."""

    def integer(self, low: int, high: int) -> int:
        """A number from `low` to `high`, both included."""

    def binary(self, max_size: int) -> bytes:
        """Up to `max_size` bytes."""


class SeededChance:
    """Chance from a seed: the same seed always gives the same damage."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        """See `Chance`."""
        return int(self._generator.integers(low, high + 1))

    def binary(self, max_size: int) -> bytes:
        """See `Chance`."""
        return self._generator.bytes(self.integer(0, max_size))


class InMemory(LocalFolder):
    """A folder of one file."""

    def __init__(self, data: bytes) -> None:
        super().__init__(Path("set"))
        self._data = data

    def read(self, name: str, *, sha256: str | None = None) -> bytes:
        """See `Folder`."""
        return self._data


@dataclass(frozen=True)
class Target:
    """A reader, what it may raise, and the maker of its damaged input."""

    name: str
    make: Callable[[Chance], bytes]
    read: Callable[[bytes], None]
    allowed: tuple[type[Exception], ...]

    def fault_of(self, data: bytes) -> str | None:
        """What reading these bytes raised that it must not; None when all is well."""
        try:
            self.read(data)
        except self.allowed as error:
            return f"the message has a line break: {error!r}" if "\n" in str(error) else None
        except Exception as error:  # finding these is what it is for
            return f"{type(error).__name__}: {error}"
        return None


def flip(content: bytearray, chance: Chance, *, most: int) -> None:
    """Overwrite up to `most` bytes."""
    for _ in range(chance.integer(1, most)):
        content[chance.integer(0, len(content) - 1)] = chance.integer(0, 255)


def splice(content: bytearray, chance: Chance, *, most: int) -> None:
    """Replace up to `most` short pieces by others, which may be longer or shorter."""
    for _ in range(chance.integer(1, most)):
        where = chance.integer(0, max(0, len(content) - 1))
        content[where : where + chance.integer(0, 6)] = chance.binary(6)


def cut(content: bytearray, chance: Chance) -> None:
    """Drop the end, in half of the cases."""
    if chance.integer(0, 1):
        del content[chance.integer(0, len(content)) :]


def tar_of(contents: dict[str, bytes]) -> bytes:
    """An archive of these files."""
    parts = [
        header_of(name, len(body)) + body + bytes(padded(len(body)) - len(body)) for name, body in contents.items()
    ]
    return b"".join(parts) + END


def mend_checksum(content: bytearray, position: int) -> None:
    """Make the header block around `position` valid again, so that damage gets past the first defence."""
    start = position // BLOCK * BLOCK
    block = content[start : start + BLOCK]
    if len(block) == BLOCK:
        content[start + 148 : start + 156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)


def manifest_of(**changes: Any) -> dict[str, Any]:
    """A manifest of one shard of one sample, with changes."""
    shard = {
        "file": "shard-000000.tar",
        "num_samples": 1,
        "num_bytes": 2048,
        "sha256": HASH,
        "keys_digest": HASH,
        "index_sha256": HASH,
    }
    base = {"schema": 1, "kind": "images", "name": "x", "num_samples": 1, "num_bytes": 2048, "classes": []}
    return base | {"shards": [shard | changes.pop("shard", {})]} | changes


def index_bytes(*, keys: Sequence[str] = ("k",), arrays: dict[str, np.ndarray] | None = None, **changes: Any) -> bytes:
    """An index of samples of 100 bytes at 512, one as a rule, with changes to arrays and metadata."""
    one: dict[str, Any] = {"offset": 512, "size": 100, "label": 0, "info_offset": 0, "info_size": -1}
    base = {name: np.full(len(keys), value, dtype=np.int64) for name, value in one.items()}
    base["key_end"], base["key_data"] = pack_keys(list(keys))
    base["crc"] = np.zeros(len(keys), dtype=np.uint32)
    metadata = {"schema": 1, "kind": "images", "sha256": HASH, "num_bytes": 2048, "num_samples": len(keys)}
    metadata |= {"skipped": []}
    return save_arrays(base | (arrays or {}), metadata={METADATA_KEY: json.dumps(metadata | changes)})


@cache
def whole_image(kind: str) -> bytes:
    """A small image file."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(24 * 16 * 3, dtype=np.uint8).reshape(24, 16, 3)).save(buffer, kind)
    return buffer.getvalue()


@cache
def whole_map() -> bytes:
    """A label map as it is stored, about as large as a teacher's."""
    rows, columns = np.mgrid[0:56, 0:56] / 28.0 - 1.0
    return encode_label(np.exp(-(rows**2) - columns**2) * (1.1 + np.sin(7 * rows * columns)))


@cache
def whole_set() -> Manifest:
    """A manifest of one shard of three samples."""
    record = ShardRecord("shard-000000.tar", 3, 2048, HASH, HASH, HASH)
    return make_manifest([record], kind="images", name="x")


@cache
def whole_objects() -> bytes:
    """Three objects in an image of 4x6 pixels: all background, all object, and some of both."""
    counts = {"cat": "h0", "dog": "0h0", "café": "35`0"}
    entries = [{"category": name, "score": 0.5, "counts": text} for name, text in counts.items()]
    return store_objects(entries, size=(4, 6))


def mend_png(content: bytearray) -> None:
    """Make the checksum of every chunk valid again, as far as their lengths lead."""
    position = 8
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        end = position + 8 + length
        if end + 4 > len(content):
            return
        struct.pack_into(">I", content, end, zlib.crc32(content[position + 4 : end]))
        position = end + 4


def damaged_tar(chance: Chance) -> bytes:
    """An archive with plain and long names; some of the damage has a valid checksum."""
    whole = tar_of({"a.jpg": chance.binary(40), "x" * 120 + ".jpg": b"y" * 100, "é.json": b"{}"})
    content = bytearray(whole)
    for _ in range(chance.integer(1, 4)):
        where = chance.integer(0, len(content) - 1)
        content[where] = chance.integer(0, 255)
        if chance.integer(0, 1):
            mend_checksum(content, where)
    cut(content, chance)
    return bytes(content)


def damaged_index(chance: Chance) -> bytes:
    """One number a little off; or flipped, spliced or cut."""
    content = bytearray(index_bytes(keys=("a", "é")))
    if chance.integer(0, 1):
        where = chance.integer(0, len(content) - 1)
        content[where] = content[where] + 1 & 0xFF
        return bytes(content)
    flip(content, chance, most=2)
    if chance.integer(0, 3) == 0:
        splice(content, chance, most=2)
    cut(content, chance)
    return bytes(content)


def damaged_manifest(chance: Chance) -> bytes:
    """Spliced JSON."""
    content = bytearray(json.dumps(manifest_of(classes=["a", "b"], gaze=None)).encode())
    splice(content, chance, most=4)
    return bytes(content)


def damage_json(content: bytearray, chance: Chance) -> None:
    """Other characters of JSON in places, in half of the cases also spliced."""
    for _ in range(chance.integer(1, 2)):
        content[chance.integer(0, len(content) - 1)] = JSON[chance.integer(0, len(JSON) - 1)]
    if chance.integer(0, 1):
        splice(content, chance, most=2)


def damaged_quarantine(chance: Chance) -> bytes:
    """Damaged behind the digest of its set, any change to which refuses it."""
    entries = [{"shard": 0, "row": row, "key": f"key {row}", "reason": "blurred"} for row in (0, 2)]
    content = bytearray(json.dumps(entries).encode())
    damage_json(content, chance)
    return f'{{"schema": 1, "digest": "{whole_set().digest}", "samples": '.encode() + content + b"}"


def damaged_objects(chance: Chance) -> bytes:
    """Three objects, damaged."""
    content = bytearray(whole_objects())
    damage_json(content, chance)
    return bytes(content)


def damaged_image(chance: Chance) -> bytes:
    """One of several formats, flipped or cut."""
    content = bytearray(whole_image(IMAGE_KINDS[chance.integer(0, len(IMAGE_KINDS) - 1)]))
    flip(content, chance, most=6)
    cut(content, chance)
    return bytes(content)


def damaged_map(chance: Chance) -> bytes:
    """A label map's PNG, flipped or cut, beneath its compression too; in half of the cases its checksums are valid."""
    content = bytearray(whole_map())
    beneath = chance.integer(0, 3) == 0
    if beneath:
        rows = bytearray(zlib.decompress(content[41:-16]))
        flip(rows, chance, most=3)
        stream = zlib.compress(rows)
        content[33:-12] = len(stream).to_bytes(4, "big") + b"IDAT" + stream + bytes(4)
    else:
        flip(content, chance, most=4)
    if beneath or chance.integer(0, 1):
        mend_png(content)
    cut(content, chance)
    return bytes(content)


def read_tar(data: bytes) -> None:
    """List an archive; what is listed must lie in it."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        for foreign in (False, True):
            members = list(scan(file, foreign=foreign))
            assert all(0 <= member.offset <= member.offset + member.size <= len(data) for member in members)


def read_index_bytes(data: bytes) -> None:
    """Parse an index; what it says must fit together."""
    index = parse_index(data, name="a.index")
    keys = index.keys()
    assert keys == [index.key(row) for row in range(len(index))]
    assert (index.offset + np.maximum(index.size, 0) <= index.num_bytes).all()


def read_manifest_bytes(data: bytes) -> None:
    """Read a manifest; its totals must fit."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE_NAME).write_bytes(data)
        manifest = read_manifest(folder)
    assert manifest.num_samples == int(manifest.num_samples_of.sum()) and len(manifest.digest) == 64
    assert all(os.path.basename(name) == name for name in manifest.files)


def read_quarantine_bytes(data: bytes) -> None:
    """Read a list of bad samples; its rows must be those of the set."""
    entries = read_quarantine(InMemory(data), whole_set())
    assert all(shard == 0 and set(rows.tolist()) <= {0, 1, 2} for shard, rows in bad_rows(entries).items())


def read_object_bytes(data: bytes) -> None:
    """Decode objects; all masks must be of the image's size."""
    assert len({one.mask.shape for one in decode_objects(data)}) <= 1


def read_image(data: bytes) -> None:
    """Size and pixels; both must be asked for."""
    problem: ValueError | None = None
    for function in (image_size, decode_rgb):
        try:
            result: Any = function(data)
        except ValueError as error:
            problem = error
            continue
        assert isinstance(result, tuple) or (result.dtype == np.uint8 and result.ndim == 3 and result.shape[2] == 3)
    if problem is not None:
        raise problem


def read_map(data: bytes) -> None:
    """Decode a map."""
    assert decode_map_png(data).ndim == 2


TARGETS = (
    Target("tar", damaged_tar, read_tar, (TarError,)),
    Target("index", damaged_index, read_index_bytes, (IndexFault,)),
    Target("manifest", damaged_manifest, read_manifest_bytes, (InputError,)),
    Target("image", damaged_image, read_image, (ValueError,)),
    Target("map", damaged_map, read_map, (ValueError,)),
    Target("quarantine", damaged_quarantine, read_quarantine_bytes, (InputError,)),
    Target("objects", damaged_objects, read_object_bytes, (ValueError,)),
)
