"""Writing one shard: a tar that stock webdataset reads, then its index.

A shard is complete exactly when both its tar and its index exist. The tar is flushed and put in place under its name
first, the index last, so that a writer killed at any moment leaves either nothing, or a tar without index that the next
writer of the same shard takes over. An index whose tar is gone is removed before a new tar takes that place.
"""

import errno
import hashlib
import os
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from engine.errors import InputError
from engine.files import fsync_directory
from shards.index import SUFFIX, ShardIndex, build_index, read_index, write_index
from shards.keys import check_key
from shards.manifest import ShardRecord
from shards.tar import BLOCK, END, Member, TarError, header_of, padded, scan

INFO = "json"
LABEL = "cls"
_READ_BYTES = 1 << 20


def shard_name(number: int) -> str:
    """File name of one shard's tar."""
    return f"shard-{number:06d}.tar"


def index_path(tar: Path) -> Path:
    """Path of the index that belongs to a tar."""
    return tar.with_suffix(SUFFIX)


def is_complete(tar: Path) -> bool:
    """Whether this shard was written to its end."""
    return index_path(tar).exists() and tar.exists()


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses; `remove_temporaries` knows it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def remove_temporaries(directory: Path) -> None:
    """Delete what killed writers left. Only for directories that one writer at a time may use."""
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples one after the other; `close()` publishes the shard and returns its manifest record.

    Used as a context manager, an error inside the block removes the temporary file.
    """

    def __init__(self, path: Path, *, kind: str = "images", skipped: Sequence[tuple[str, str]] = ()) -> None:
        self.path, self.kind, self.skipped = Path(path), kind, list(skipped)
        self._rows: list[tuple[str, int, int, int, int, int, int]] = []
        self._keys: set[str] = set()
        self._digest, self._position = hashlib.sha256(), 0
        self._temporary = temporary_name(self.path)
        self._file: BinaryIO = open(self._temporary, "wb")  # noqa: SIM115 - closed by close() and abort()

    def add(self, key: str, members: Mapping[str, bytes], *, label: int = -1) -> None:
        """Append one sample.

        Args:
            members: extension -> bytes; the first one is the primary payload. Empty for a sample that has none
                (an image without label map): it keeps its row, so that label rows match image rows.
            label: class index, also written as a `.cls` member; -1 for none.

        Raises:
            InputError: the key is unusable or already in this shard.
        """
        if key in self._keys:
            raise InputError(f"{self.path.name}: key {key[:80]!r} occurs twice: rename one of the files")
        self._keys.add(check_key(key))
        parts = dict(members)
        if label >= 0:
            info = parts.pop(INFO, None)
            parts[LABEL] = str(label).encode()
            parts |= {} if info is None else {INFO: info}
        place: dict[str, tuple[int, int]] = {ext: self._append(f"{key}.{ext}", data) for ext, data in parts.items()}
        primary = next(iter(members), None)
        offset, size = place[primary] if primary is not None else (0, -1)
        crc = zlib.crc32(members[primary]) if primary is not None else 0
        self._rows.append((key, offset, size, crc, label, *place.get(INFO, (0, -1))))

    def close(self) -> ShardRecord:
        """Flush, put the tar in place, write the index."""
        self._write(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = build_index(
            self._rows,
            kind=self.kind,
            sha256=self._digest.hexdigest(),
            num_bytes=self._position,
            skipped=self.skipped,
        )
        if not self.path.exists():
            index_path(self.path).unlink(missing_ok=True)  # of a tar that is gone: it must not pass for this one's
        won = _link_or_keep(self._temporary, self.path)
        if not won:
            index = index_of_tar(self.path, keys=index.keys(), kind=self.kind, skipped=self.skipped)
        return _record(self.path, index, write_index(index_path(self.path), index))

    def abort(self) -> None:
        """Drop what was written."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or not self._file.closed:
            self.abort()

    def _append(self, name: str, data: bytes) -> tuple[int, int]:
        self._write(header_of(name, len(data)))
        offset = self._position
        self._write(data)
        self._write(bytes(padded(len(data)) - len(data)))
        return offset, len(data)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)


def record_of(tar: Path) -> ShardRecord:
    """Manifest record of a complete shard, from its index.

    Raises:
        IndexFault: the index is missing or damaged.
    """
    index = read_index(index_path(tar))
    return _record(tar, index, hashlib.sha256(index_path(tar).read_bytes()).hexdigest())


def index_of_tar(tar: Path, *, keys: Sequence[str], kind: str, skipped: Sequence[tuple[str, str]] = ()) -> ShardIndex:
    """Index of a tar that is already in place: a pure function of its bytes and of the keys it should hold.

    Two writers of one shard may race (array jobs do): the first tar stays, and every writer derives the same index
    from it, so it does not matter whose index comes last.

    Raises:
        TarError: the tar is damaged or holds other keys.
    """
    digest = hashlib.sha256()
    found: dict[str, dict[str, Member]] = {}
    with open(tar, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
        size = file.tell()
        for member in scan(file):
            key, _, ext = member.name.rpartition("/")[2].partition(".")
            full = member.name[: len(member.name) - len(ext) - 1] if key else member.name
            found.setdefault(full, {})[ext] = member
        rows = [_row(file, key, found.pop(key, {})) for key in keys]
    if found:
        raise TarError(f"{tar.name}: holds the unexpected key {next(iter(found))[:80]!r}")
    return build_index(rows, kind=kind, sha256=digest.hexdigest(), num_bytes=size, skipped=skipped)


def _row(file: BinaryIO, key: str, members: dict[str, Member]) -> tuple[str, int, int, int, int, int, int]:
    def read(member: Member) -> bytes:
        return os.pread(file.fileno(), member.size, member.offset)

    label = int(read(members.pop(LABEL))) if LABEL in members else -1
    info = members.pop(INFO, None)
    primary = next(iter(members.values()), None)
    offset, size, crc = (primary.offset, primary.size, zlib.crc32(read(primary))) if primary else (0, -1, 0)
    return (key, offset, size, crc, label, info.offset if info else 0, info.size if info else -1)


def _record(tar: Path, index: ShardIndex, index_sha256: str) -> ShardRecord:
    return ShardRecord(tar.name, len(index), index.num_bytes, index.sha256, index.keys_digest, index_sha256)


def _link_or_keep(temporary: Path, final: Path) -> bool:
    """Give `temporary` its final name unless that is taken. Returns whether this writer's file is now in place."""
    try:
        os.link(temporary, final)
        won = True
    except FileExistsError:
        won = False
    except OSError as error:
        # Some network file systems have no hard links; there, a rename is the nearest thing.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        os.replace(temporary, final)
        fsync_directory(final.parent)
        return True
    temporary.unlink()
    fsync_directory(final.parent)
    return won


def estimated_bytes(size: int) -> int:
    """Bytes one sample of `size` image bytes takes in a tar, with class and info members."""
    return 3 * BLOCK + padded(size) + 2 * BLOCK
