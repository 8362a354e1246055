"""Writing files so that a reader sees the old content or the new one, never a half."""

import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
# Far longer than a small file takes on a slow file system: one that does not answer until then hangs.
HANG_S = 30.0


def fsync_directory(path: Path) -> None:
    """Flush a directory entry, so that a rename inside it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, flush it, and rename it into place."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    atomic_write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def append_lines(path: Path, *lines: str) -> None:
    """Append lines, each ended by a line break: all of them, or none.

    Raises:
        OSError: nothing was written.
    """
    data = "".join(f"{line}\n" for line in lines).encode()
    with open(path, "ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            done = 0
            while done < len(data):
                done += file.write(data[done:])
        except OSError:
            with suppress(OSError):
                file.truncate(start)
            raise


def give_time(work: Callable[[], None]) -> threading.Thread:
    """Do `work` on small files, which must not raise, and go on without it after half a minute.

    A file system whose server is gone may not answer for hours, and whoever asks it waits as long.

    Returns:
        The thread of the work: alive while it hangs. The process may end without it.
    """
    thread = threading.Thread(target=work, name="files", daemon=True)
    thread.start()
    thread.join(HANG_S)
    return thread


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, none if it is not there; a line cut off by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without an error.

    Every file in it is flushed before the rename. If the block fails, the temporary directory is removed
    and `path` is as it was. An existing `path` is replaced.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        fsync_directory(temporary)
        if path.exists():
            # rename(2) cannot replace a directory with content: move the old one aside first.
            old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
