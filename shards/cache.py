"""Copies of remote files on this node: one folder of bounded size, shared by all processes of all runs.

Files are named for the SHA-256 that the manifest promises, so a changed set never meets an old copy. A file is written
under a `.part` name that its writer holds locked, and renamed when it is whole and its hash is right. A killed writer's
lock goes with it, and whoever comes next takes the part over. Readers open a copy for each read, so a copy can be
deleted at any time and its bytes are free at once.
"""

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

from shards.plain import open_plain

PART = ".part"
LOCK = ".lock"
# A folder that somebody names for the cache may hold files of their own: nothing else in it is counted or deleted.
_OURS = re.compile(rf"[0-9a-f]{{64}}\.(tar|file)({re.escape(PART)})?")
TOUCH_S = 30.0

Outcome = Literal["stored", "busy", "full"]


class Cache:
    """Copies of at most `max_bytes` in a folder, the least recently used deleted first. No copy is precious.

    Copies are named `<SHA-256>.tar` or `<SHA-256>.file`; files of other names are left alone.

    Args:
        idle_s: copies used within this many seconds are never deleted for others: a cache that is smaller than what
            is being read would otherwise fetch the same shards over and over.
    """

    def __init__(self, folder: Path, max_bytes: int, *, idle_s: float = 60.0) -> None:
        self.folder, self.max_bytes, self.idle_s = folder, max_bytes, idle_s
        self._touched: dict[str, float] = {}

    def path(self, name: str) -> Path:
        """Where the copy lies when there is one."""
        return self.folder / name

    def size(self, name: str) -> int | None:
        """Bytes of a copy, None when there is none."""
        try:
            found = os.stat(self.path(name), follow_symlinks=False)
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes | None:
        """Bytes of a copy, None when there is none or it cannot be read; marks it as used."""
        try:
            descriptor = open_plain(self.path(name))
        except OSError:
            return None
        try:
            total = os.fstat(descriptor).st_size
            wanted = total - offset if size is None else min(size, total - offset)
            data = os.pread(descriptor, max(0, wanted), offset)
            now = time.monotonic()
            if now - self._touched.get(name, -TOUCH_S) >= TOUCH_S:
                os.utime(descriptor)
                self._touched[name] = now
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return data

    def drop(self, name: str) -> None:
        """Delete a copy that turned out to be damaged."""
        with suppress(OSError):
            self.path(name).unlink()

    def fill(self, name: str, num_bytes: int, write: Callable[[BinaryIO], object]) -> Outcome:
        """Have `write` write a file of `num_bytes` bytes, unless another process is doing so.

        Returns:
            "stored": the copy is there. "busy": another process is writing it. "full": there is no room within the
            bound.

        Raises:
            OSError: the disk is full or the folder cannot be written. Whatever `write` raises leaves no copy.
        """
        if num_bytes > self.max_bytes:
            return "full"
        with self._claimed(name) as file:
            if file is None:
                return "busy"
            return "stored" if self.size(name) == num_bytes else self._put(name, file, num_bytes, write)

    def store(self, name: str, make: Callable[[], bytes]) -> Outcome:
        """The same for a small file whose size is not known before `make` has fetched it."""
        with self._claimed(name) as file:
            if file is None:
                return "busy"
            if self.size(name) is not None:
                return "stored"
            data = make()
            return self._put(name, file, len(data), lambda part: part.write(data))

    @contextmanager
    def _claimed(self, name: str) -> Iterator[BinaryIO | None]:
        """The part of a copy, locked; None when another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = self.path(name + PART)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "r+b") as file:
            if not _lock_now(descriptor) or not _is_at(descriptor, part):
                yield None
                return
            try:
                yield file
            finally:
                if _is_at(descriptor, part):
                    part.unlink(missing_ok=True)

    def _put(self, name: str, file: BinaryIO, num_bytes: int, write: Callable[[BinaryIO], object]) -> Outcome:
        part = self.path(name + PART)
        if not self._reserve(part, file.fileno(), num_bytes):
            return "full"
        write(file)
        # Not flushed to the disk: what a power cut leaves is found out when it is read.
        file.flush()
        os.rename(part, self.path(name))
        return "stored"

    def _reserve(self, part: Path, descriptor: int, num_bytes: int) -> bool:
        """Make room, and take it at once: parts count with the size they will have."""
        with self._exclusive():
            os.ftruncate(descriptor, 0)
            total, idle = self._scan(keep=part.name)
            excess = total + num_bytes - self.max_bytes
            if excess > 0 and _delete(idle, excess) < excess:
                return False
            if num_bytes:
                try:
                    os.posix_fallocate(descriptor, 0, num_bytes)
                except OSError as error:
                    # The disk is fuller than the bound knows: old copies make room before anything is given up.
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or _delete(idle, num_bytes) < num_bytes:
                        raise
                    os.posix_fallocate(descriptor, 0, num_bytes)
            return True

    def _scan(self, *, keep: str) -> tuple[int, list[tuple[int, int, str]]]:
        """Bytes held, and (time of last use, size, path) of the copies that may go, the oldest last."""
        idle, total = [], 0
        before = time.time_ns() - int(self.idle_s * 1e9)
        for entry in os.scandir(self.folder):
            if entry.name == keep or not _OURS.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            if entry.name.endswith(PART) and _delete_orphan(Path(entry.path)):
                continue
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            total += found.st_size
            if not entry.name.endswith(PART) and found.st_mtime_ns <= before:
                idle.append((found.st_mtime_ns, found.st_size, entry.path))
        return total, sorted(idle, reverse=True)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One process at a time; held for a look through the folder, never during a download."""
        with open(self.folder / LOCK, "a") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            yield


def _lock_now(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has that name: its first writer may have renamed it before the lock was ours."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _delete_orphan(part: Path) -> bool:
    """Delete a part whose writer is gone. Only who holds a part's lock may delete or rename it."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        orphan = _lock_now(descriptor) and _is_at(descriptor, part)
        if orphan:
            part.unlink()
        return orphan
    finally:
        os.close(descriptor)


def _delete(idle: list[tuple[int, int, str]], num_bytes: int) -> int:
    """Delete copies from the end of the list until `num_bytes` are free; the bytes freed."""
    freed = 0
    while idle and freed < num_bytes:
        _, size, path = idle.pop()
        Path(path).unlink(missing_ok=True)
        freed += size
    return freed
