"""The checks behind `shards/verify.py`: one shard at a time, against manifest, index and itself."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from shards.decode import decode_rgb, image_size
from shards.folder import Folder
from shards.index import IndexFault, ShardIndex
from shards.manifest import Manifest, holds_objects
from shards.map_png import decode_map_png
from shards.objects import check_objects
from shards.opening import read_shard_index
from shards.tar import Member, TarError, scan
from shards.writer import LABEL

_CHUNK = 1 << 20


@dataclass(slots=True)
class ShardReport:
    """What was found in one shard.

    `bad`: stored row -> key and reason. `changed`: its bytes as a whole are not those of the manifest: unreadable
    (`lost`), of another size or SHA-256. `broken`: where the tar breaks off, with `behind`, the rows that lie there in
    whole or in part. `strays`: what the tar holds beside the index's members. `damaged`: rows whose own bytes explain
    `changed`. `without`: rows without a label. `left_out`: rows that readers leave out, which are no fault.
    `key_hashes`: `(samples,)` uint64.
    """

    shard: int
    num_samples: int
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)
    behind: set[int] = field(default_factory=set)
    lost: bool = False
    without: set[int] = field(default_factory=set)
    left_out: set[int] = field(default_factory=set)
    key_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    @property
    def unusable(self) -> dict[int, tuple[str, str]]:
        """What is wrong with samples that are in use: row -> key and reason, in order."""
        return {row: self.bad[row] for row in sorted(self.bad.keys() - self.left_out)}

    @property
    def faults(self) -> list[str]:
        """What is wrong with the shard as a whole, less what samples that are left out explain: a tar that breaks off
        at them, and changed bytes where everything else is sound. One that breaks off before others is a fault: other
        tools lose those in silence."""
        broken = [] if self.behind and self.behind <= self.left_out else self.broken
        damaged = self.damaged | self.behind
        explained = damaged and damaged <= self.left_out and not broken and not self.strays
        return ([] if explained else self.changed) + broken + self.strays

    def is_sound(self, row: int) -> bool:
        """Whether a sample is all there and nothing is wrong with it."""
        return not self.lost and row not in self.bad and row not in self.behind and row not in self.without


def check_shard(folder: Folder, manifest: Manifest, shard: int, *, decode: bool) -> ShardReport:
    """Compare one shard with the manifest, its index with its tar, and every sample with what the index says.

    Args:
        decode: also decode every image.
    """
    report = ShardReport(shard, int(manifest.num_samples_of[shard]))
    name = manifest.files[shard]
    try:
        index = read_shard_index(folder, manifest, shard)
        compare_index(index, manifest, shard)
        size, sha256 = int(manifest.num_bytes_of[shard]), manifest.hash_of(shard, "sha256")
        file = folder.whole(name, num_bytes=size, sha256=sha256)
    except (IndexFault, OSError) as error:
        reason = str(error) if isinstance(error, IndexFault) else f"{name}: {error.strerror}"
        report.changed.append(reason)
        report.bad = {row: ("", f"whole shard unreadable: {reason}") for row in range(report.num_samples)}
        report.damaged, report.lost = set(report.bad), True
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
    # A row without payload has no bytes that could have changed.
    report.damaged = {row for row in report.bad if index.size[row] >= 0}
    report.without = set(np.flatnonzero(index.size < 0).tolist())
    keys = index.keys()
    report.key_hashes = np.array(
        [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") for key in keys], dtype=np.uint64
    )
    return report


def compare_index(index: ShardIndex, manifest: Manifest, shard: int) -> None:
    """Compare what an index and the manifest both say of a shard.

    Raises:
        IndexFault: they disagree.
    """
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
        report.changed.append(f"{size} bytes, the manifest says {manifest.num_bytes_of[shard]}")
        return
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != manifest.hash_of(shard, "sha256"):
        report.changed.append("SHA-256 is not the manifest's")


def _check_structure(file: BinaryIO, index: ShardIndex, report: ShardReport) -> None:
    """Members of the tar against the rows of the index: same names, places and classes, nothing more."""
    members: dict[int, Member] = {}
    try:
        for member in scan(file):
            members[member.offset] = member
    except TarError as error:
        report.broken.append(f"tar: {error}")
    reached = max(members, default=-1) if report.broken else index.num_bytes
    keys = index.keys()
    for row, key in enumerate(keys):
        for offset, size in ((index.offset, index.size), (index.info_offset, index.info_size)):
            if size[row] < 0:
                continue
            if offset[row] > reached:
                report.behind.add(row)
                continue
            member_there = members.pop(int(offset[row]), None)
            if member_there is None or member_there.size != size[row] or split_name(member_there.name)[0] != key:
                report.bad.setdefault(row, (key, "the tar holds another member in its place"))
    _check_classes(file, index, members.values(), report)


def _check_classes(file: BinaryIO, index: ShardIndex, members: Iterable[Member], report: ShardReport) -> None:
    """The members that are no payload and no JSON: only classes, and those of the index."""
    labels: dict[str, int] = {}
    for member in members:
        key, extension = split_name(member.name)
        text = os.pread(file.fileno(), min(member.size, 32), member.offset)
        if extension == LABEL and text.isdigit():
            labels[key] = int(text)
        else:
            report.strays.append(f"tar: member {member.name[:80]!r} is not in the index")
    for row, key in enumerate(index.keys()):
        if labels.pop(key, -1) != index.label[row] and row not in report.behind:
            report.bad.setdefault(row, (key, "its class in the tar is not the index's"))
    report.strays += [f"tar: class of {key[:80]!r}, which has no image" for key in labels]


def split_name(name: str) -> tuple[str, str]:
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
    objects = holds_objects(manifest)
    check = check_objects if objects else _map_checker(manifest)

    def check_row(index: ShardIndex, row: int) -> None:
        if index.size[row] >= 0:
            check(_payload(file, index, row))
        elif not objects:  # a detector may have passed over an image; samples are read without objects all the same
            raise ValueError("no label map: none was written for this image")

    return check_row


def _map_checker(manifest: Manifest) -> Callable[[bytes], None]:
    settings = manifest.extra.get("settings")
    wanted = tuple(settings["size"]) if isinstance(settings, dict) and "size" in settings else None

    def check(data: bytes) -> None:
        shape = decode_map_png(data).shape
        if wanted is not None and shape != wanted:
            raise ValueError(f"map of {shape[0]}x{shape[1]}, the manifest says {wanted[0]}x{wanted[1]}")

    return check
