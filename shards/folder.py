"""The folder of a set, local or remote: its small files, and its shards opened for reading by position."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from shards.fetch import RemoteOptions
from shards.location import is_remote, url_of
from shards.plain import open_plain, read_plain
from shards.remote import RemoteFolder

Accept = Callable[[bytes], bool]


class ShardBytes(Protocol):
    """An open shard."""

    num_bytes: int
    """Bytes that there are; never more than that are asked for."""

    def read(self, offset: int, size: int, accept: Accept | None = None) -> bytes:
        """`size` bytes; fewer at the end of a shard that is cut short. A remote shard is asked again where `accept`
        refuses what came; a local one has nothing else to give."""

    def close(self) -> None:
        """Give back what it holds."""


class Folder(Protocol):
    """Where a set lies. Pickles into workers."""

    @property
    def where(self) -> Path | str:
        """Path or URL, fit to be printed."""

    def read(self, name: str, *, sha256: str | None = None) -> bytes:
        """A whole small file.

        Raises:
            OSError: missing or unreadable.
            RemoteFault: the server cannot be reached.
        """

    def open(self, name: str, *, num_bytes: int, sha256: str) -> ShardBytes:
        """Open a shard; the manifest promises `num_bytes` and `sha256`.

        Raises:
            OSError: missing or unreadable.
        """

    def whole(self, name: str, *, num_bytes: int, sha256: str) -> BinaryIO:
        """A whole shard as an open local file.

        Raises:
            OSError: missing or unreadable.
            InputError: it is remote and cannot be copied to this node.
        """


class LocalShard:
    """A shard on a disk: one `pread` per request."""

    def __init__(self, path: Path) -> None:
        self._descriptor = open_plain(path)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int, accept: Accept | None = None) -> bytes:
        """See `ShardBytes`."""
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class LocalFolder:
    """A folder on a disk."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def read(self, name: str, *, sha256: str | None = None) -> bytes:
        """See `Folder`."""
        return read_plain(self.where / name)

    def open(self, name: str, *, num_bytes: int, sha256: str) -> LocalShard:
        """See `Folder`."""
        return LocalShard(self.where / name)

    def whole(self, name: str, *, num_bytes: int, sha256: str) -> BinaryIO:
        """See `Folder`."""
        return open(open_plain(self.where / name), "rb")


def open_folder(where: Path | str, *, remote: RemoteOptions | None = None) -> Folder:
    """The folder at a path or URL. Nothing is read yet.

    Raises:
        InputError: a URL that cannot be used; see `url_of`.
    """
    if is_remote(where):
        return RemoteFolder(url_of(where), remote or RemoteOptions())
    return LocalFolder(Path(where))
