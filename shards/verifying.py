"""The checks behind `shards/verify.py`: one shard at a time, against manifest, index and itself."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shards.decode import decode_rgb, image_size
from shards.folder import Folder
from shards.index import IndexFault, ShardIndex, write_index
from shards.manifest import Manifest, holds_objects
from shards.map_png import decode_map_png
from shards.objects import check_objects
from shards.opening import read_shard_index
from shards.tar import TarError, scan
from shards.writer import LABEL, index_of_tar, index_path

_CHUNK = 1 << 20


@dataclass(slots=True)
class ShardReport:
    """What was found in one shard.

    `bad`: stored row -> reason. `faults`: what is wrong with the shard as a whole. `key_hashes`: `(samples,)` uint64.
    """

    shard: int
    num_samples: int
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    key_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))


def check_shard(folder: Folder, manifest: Manifest, shard: int, *, decode: bool) -> ShardReport:
    """Compare one shard with the manifest, its index with its tar, and every sample with what the index says.

    Args:
        decode: also decode every image.
    """
    report = ShardReport(shard, int(manifest.num_samples_of[shard]))
    name = manifest.files[shard]
    try:
        index = read_shard_index(folder, manifest, shard)
        _compare_index(index, manifest, shard)
        size, sha256 = int(manifest.num_bytes_of[shard]), manifest.hash_of(shard, "sha256")
        file = folder.whole(name, num_bytes=size, sha256=sha256)
    except (IndexFault, OSError) as error:
        reason = str(error) if isinstance(error, IndexFault) else f"{name}: {error.strerror}"
        report.faults.append(reason)
        report.bad = {row: ("", f"whole shard unreadable: {reason}") for row in range(report.num_samples)}
        return report
    with file:
        _check_bytes(file, manifest, shard, report)
        check = _image_checker(file, decode) if manifest.kind == "images" else _label_checker(file, manifest)
        for row in range(len(index)):
            try:
                check(index, row)
            except (ValueError, OSError) as error:
                report.bad[row] = (index.key(row), str(error)[:200])
        _check_structure(file, index, report)
    keys = index.keys()
    report.key_hashes = np.array(
        [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys], dtype=np.uint64
    )
    return report


def rebuild_index(root: Path, manifest: Manifest, shard: int) -> bool:
    """Write a lost or damaged index anew from its tar. Returns whether the very index of the manifest came out."""
    path = root / manifest.files[shard]
    try:
        with open(path, "rb") as file:
            names = [member.name for member in scan(file)]
        keys = list(dict.fromkeys(_split(name)[0] for name in names))
        index = index_of_tar(path, keys=keys, kind=manifest.kind)
    except (TarError, ValueError, OSError):
        return False
    if index.sha256 != manifest.hash_of(shard, "sha256"):
        return False
    return write_index(index_path(path), index) == manifest.hash_of(shard, "index_sha256")


def _compare_index(index: ShardIndex, manifest: Manifest, shard: int) -> None:
    expected = {
        "number of samples": (len(index), int(manifest.num_samples_of[shard])),
        "bytes": (index.num_bytes, int(manifest.num_bytes_of[shard])),
        "SHA-256 of the tar": (index.sha256, manifest.hash_of(shard, "sha256")),
        "keys": (index.keys_digest, manifest.hash_of(shard, "keys_digest")),
        "kind": (index.kind, manifest.kind),
    }
    for name, (found, promised) in expected.items():
        if found != promised:
            raise IndexFault(f"{manifest.files[shard]}: index and manifest disagree on {name}")


def _check_bytes(file: BinaryIO, manifest: Manifest, shard: int, report: ShardReport) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != manifest.num_bytes_of[shard]:
        report.faults.append(f"{size} bytes, the manifest says {manifest.num_bytes_of[shard]}")
        return
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != manifest.hash_of(shard, "sha256"):
        report.faults.append("SHA-256 is not the manifest's")


def _check_structure(file: BinaryIO, index: ShardIndex, report: ShardReport) -> None:
    """Members of the tar against the rows of the index: same names, places and classes, nothing more."""
    try:
        members = {member.offset: member for member in scan(file)}
    except TarError as error:
        report.faults.append(f"tar: {error}")
        return
    keys = index.keys()
    for row, key in enumerate(keys):
        for offset, size in ((index.offset, index.size), (index.info_offset, index.info_size)):
            if size[row] >= 0:
                member = members.pop(int(offset[row]), None)
                if member is None or member.size != size[row] or _split(member.name)[0] != key:
                    report.bad.setdefault(row, (key, "the tar holds another member in its place"))
    labels: dict[str, int] = {}
    for member in members.values():
        key, extension = _split(member.name)
        text = os.pread(file.fileno(), min(member.size, 32), member.offset)
        if extension == LABEL and text.isdigit():
            labels[key] = int(text)
        else:
            report.faults.append(f"tar: member {member.name[:80]!r} is not in the index")
    for row, key in enumerate(keys):
        if labels.pop(key, -1) != index.label[row]:
            report.bad.setdefault(row, (key, "its class in the tar is not the index's"))
    report.faults += [f"tar: class of {key[:80]!r}, which has no image" for key in labels]


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member, as webdataset splits them: at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension


def _payload(file: BinaryIO, index: ShardIndex, row: int) -> bytes:
    size = int(index.size[row])
    offset = int(index.offset[row])
    data = os.pread(file.fileno(), max(0, min(size, os.fstat(file.fileno()).st_size - offset)), offset)
    if size == 0:
        raise ValueError("zero bytes")
    if len(data) < size:
        raise ValueError(f"cut short: {len(data)} of {size} bytes")
    if zlib.crc32(data) != index.crc[row]:
        raise ValueError("its bytes have changed since packing (CRC-32)")
    return data


def _image_checker(file: BinaryIO, decode: bool) -> Callable[[ShardIndex, int], None]:
    def check(index: ShardIndex, row: int) -> None:
        if index.size[row] < 0:
            raise ValueError("no image")
        data = _payload(file, index, row)
        size = decode_rgb(data).shape[:2] if decode else image_size(data)
        info = _info(file, index, row)
        if (info.get("height"), info.get("width")) != size:
            raise ValueError(f"its JSON says {info.get('width')}x{info.get('height')}, it is {size[1]}x{size[0]}")
        _check_fixations(info.get("fixations", []))

    return check


def _info(file: BinaryIO, index: ShardIndex, row: int) -> dict[str, Any]:
    if index.info_size[row] < 0:
        raise ValueError("no JSON member")
    try:
        value = json.loads(os.pread(file.fileno(), int(index.info_size[row]), int(index.info_offset[row])))
    except (ValueError, RecursionError) as error:
        raise ValueError("its JSON member is damaged") from error
    if not isinstance(value, dict):
        raise ValueError("its JSON member is no object")
    return value


def _check_fixations(fixations: Any) -> None:
    try:
        arrays = [np.asarray(observer, dtype=np.float64).reshape(-1, 2) for observer in fixations]
    except (ValueError, TypeError) as error:
        raise ValueError("its fixations are no lists of [x, y]") from error
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("its fixations hold values that are no numbers")


def _label_checker(file: BinaryIO, manifest: Manifest) -> Callable[[ShardIndex, int], None]:
    check = check_objects if holds_objects(manifest) else _map_checker(manifest)

    def check_row(index: ShardIndex, row: int) -> None:
        if index.size[row] >= 0:  # an image the teacher could not read: its row stays, the reader leaves it out
            check(_payload(file, index, row))

    return check_row


def _map_checker(manifest: Manifest) -> Callable[[bytes], None]:
    settings = manifest.extra.get("settings")
    wanted = tuple(settings["size"]) if isinstance(settings, dict) and "size" in settings else None

    def check(data: bytes) -> None:
        shape = decode_map_png(data).shape
        if wanted is not None and shape != wanted:
            raise ValueError(f"map of {shape[0]}x{shape[1]}, the manifest says {wanted[0]}x{wanted[1]}")

    return check
