"""The index beside each tar: where every sample lies, so that reading one is one `pread`.

On disk it is a safetensors file: no code, fixed layout, opened without parsing the tar. Its metadata is one JSON
string under one key, because safetensors does not promise an order for several and packs must be byte-identical.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from engine.files import atomic_write
from shards.keys import keys_digest, pack_keys
from shards.plain import read_plain

SCHEMA = 1
SUFFIX = ".index"
METADATA_KEY = "saccade"

_DTYPES = {
    "offset": np.int64,
    "size": np.int64,
    "crc": np.uint32,
    "label": np.int64,
    "info_offset": np.int64,
    "info_size": np.int64,
    "key_end": np.int64,
}


class IndexFault(ValueError):
    """The index is damaged, of another schema, or does not belong to its shard."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Positions of one shard's samples; all arrays have one entry per sample.

    `offset`, `size` (bytes) and `crc` (CRC-32) describe the primary payload, image or map; a sample without one
    (an image that the teacher could not label) has size -1. `label` is -1 where there is none. `info_*` locate
    the JSON member, size -1 where there is none.
    """

    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    label: np.ndarray
    info_offset: np.ndarray
    info_size: np.ndarray
    key_end: np.ndarray
    key_data: np.ndarray
    kind: str
    sha256: str
    num_bytes: int
    skipped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.offset)

    def key(self, row: int) -> str:
        """Key of one sample."""
        begin = int(self.key_end[row - 1]) if row else 0
        return self.key_data[begin : int(self.key_end[row])].tobytes().decode("utf-8")

    def keys(self) -> list[str]:
        """All keys in order."""
        data, begin, result = self.key_data.tobytes(), 0, []
        for end in self.key_end.tolist():
            result.append(data[begin:end].decode("utf-8"))
            begin = end
        return result

    @property
    def keys_digest(self) -> str:
        """Digest of the keys in order."""
        return keys_digest(self.key_end, self.key_data)


def build_index(
    rows: Sequence[tuple[str, int, int, int, int, int, int]],
    *,
    kind: str,
    sha256: str,
    num_bytes: int,
    skipped: Sequence[tuple[str, str]] = (),
) -> ShardIndex:
    """Index from rows of (key, offset, size, crc, label, info offset, info size)."""
    key_end, key_data = pack_keys([row[0] for row in rows])
    columns = [[row[i] for row in rows] for i in range(1, 7)]
    offset, size, crc, label, info_offset, info_size = (
        np.array(column, dtype=dtype) for column, dtype in zip(columns, list(_DTYPES.values())[:6], strict=True)
    )
    return ShardIndex(
        offset, size, crc, label, info_offset, info_size, key_end, key_data, kind, sha256, num_bytes, tuple(skipped)
    )


def index_bytes(index: ShardIndex) -> bytes:
    """The index as it lies on disk; the same content always gives the same bytes."""
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in [*_DTYPES, "key_data"]}
    metadata = {
        "schema": SCHEMA,
        "kind": index.kind,
        "sha256": index.sha256,
        "num_bytes": index.num_bytes,
        "num_samples": len(index),
        "keys_digest": index.keys_digest,
        "skipped": [list(entry) for entry in index.skipped],
    }
    return save_arrays(arrays, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def write_index(path: Path, index: ShardIndex) -> str:
    """Write the index atomically. Returns the SHA-256 of its bytes."""
    data = index_bytes(index)
    atomic_write(path, data)
    return hashlib.sha256(data).hexdigest()


def read_index(path: Path, *, sha256: str | None = None) -> ShardIndex:
    """Read and check an index.

    Args:
        sha256: the hash that the manifest promises for the index file; None skips that check.

    Raises:
        IndexFault: the file is missing, damaged, of another schema or not the one the manifest names.
    """
    try:
        data = read_plain(path)
    except OSError as error:
        raise IndexFault(f"{path.name}: {error.strerror or error}") from error
    return parse_index(data, name=path.name, sha256=sha256)


def parse_index(data: bytes, *, name: str, sha256: str | None = None) -> ShardIndex:
    """Check an index that has been read; `name` is for messages. See `read_index`."""
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise IndexFault(f"{name}: its SHA-256 is not the manifest's")
    try:
        metadata = _metadata(data)
        index = _assemble(load_arrays(data), metadata)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        raise IndexFault(f"{name}: damaged index ({type(error).__name__}: {str(error)[:120]})") from error
    return index


def _metadata(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("cut short")
    metadata: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][METADATA_KEY])
    if type(metadata["schema"]) is not int or metadata["schema"] != SCHEMA:
        raise ValueError(f"schema {metadata['schema']!r}, this version reads {SCHEMA}")
    return metadata


def _assemble(arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> ShardIndex:
    count, num_bytes = int(metadata["num_samples"]), int(metadata["num_bytes"])
    for name, dtype in _DTYPES.items():
        if arrays[name].dtype != dtype or arrays[name].shape != (count,):
            raise ValueError(f"array {name}")
    if arrays["key_data"].dtype != np.uint8 or arrays["key_data"].ndim != 1:
        raise ValueError("array key_data")
    for offset, size in (("offset", "size"), ("info_offset", "info_size")):
        begin, length = arrays[offset], arrays[size]
        # Compared without adding, so that a huge offset cannot wrap around.
        if (begin < 0).any() or (length < -1).any() or (begin > num_bytes - np.maximum(length, 0)).any():
            raise ValueError(f"{offset} outside the shard")
    ends = arrays["key_end"]
    if (np.diff(ends, prepend=0) <= 0).any() or (ends[-1] if count else 0) != len(arrays["key_data"]):
        raise ValueError("key_end")
    arrays["key_data"].tobytes().decode("utf-8")
    # where the next key begins: the first one's beginning has been decoded with the whole
    if (arrays["key_data"][ends[:-1]] & 0xC0 == 0x80).any():
        raise ValueError("key_end inside a character")
    skipped = tuple((str(name), str(reason)) for name, reason in metadata["skipped"])
    columns: dict[str, Any] = {name: arrays[name] for name in [*_DTYPES, "key_data"]}
    kind, sha256 = str(metadata["kind"]), str(metadata["sha256"])
    return ShardIndex(**columns, kind=kind, sha256=sha256, num_bytes=num_bytes, skipped=skipped)
