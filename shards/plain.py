"""Opening files of a shard set: regular files only, as a pipe or a device in their place could block a reader."""

import errno
import os
import stat
from pathlib import Path


def open_plain(path: Path) -> int:
    """Descriptor of a regular file, for reading. Links to one are followed: data folders made of links are common.

    Raises:
        OSError: missing, unreadable, or not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_plain(path: Path) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: see `open_plain`.
    """
    with open(open_plain(path), "rb") as file:
        return file.read()
