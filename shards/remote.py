"""Sets behind a URL: indices and shards are copied into the node's cache, or read by range where there is no room.

The rule: a shard is fetched as a whole when the cache has room for it, because the window shuffle reads all its samples
soon; room is made from copies that nobody has used for a minute. Where there is none (a small cache, a full disk), or
while another process of the node is fetching that very shard, samples are read by range; neighbours that are read in
order are fetched together. What arrives whole must have the SHA-256 of the manifest, what arrives in part the CRC-32 of
the index; anything else is dropped and fetched again.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

from engine.errors import InputError
from shards.cache import Cache
from shards.faults import ContentFault, DeniedFile, RemoteFault, ServerSays
from shards.fetch import CONTENT_TRIES, Fetcher, RemoteOptions
from shards.plain import open_plain

CHUNK_BYTES = 8 << 20
MAX_READ_AHEAD = 2 << 20
FIRST_READ_AHEAD = 256 << 10
NEIGHBOUR_BYTES = 16 << 10
BUSY_PAUSE_S = 1.0
FULL_PAUSE_S = 30.0
POLL_S = 0.05
WHOLE_WAIT_S = 60.0

Accept = Callable[[bytes], bool]


class RemoteFolder:
    """A set's folder behind a URL, with the cache of this node."""

    def __init__(self, where: str, options: RemoteOptions) -> None:
        self.where, self.options = where, options
        self.fetcher = Fetcher(where, options)
        self.cache = Cache(options.cache_folder, options.cache_bytes)
        self._warned = False

    def read(self, name: str, *, sha256: str | None = None) -> bytes:
        """A whole small file; with its hash given, from the cache where that has it.

        Raises:
            RemoteFault, OSError: see `Fetcher.read`.
        """
        if sha256 is None:
            # Manifest and list of bad samples: always from the server, so that a set packed anew is noticed.
            with suppress(ContentFault):
                return self.fetcher.read(name, accept=_is_json)
            return self.fetcher.read(name)  # whoever parses it says what is wrong with it
        copy, deadline, fetched = f"{sha256}.file", time.monotonic() + self.options.timeout_s, []

        def fetch() -> bytes:
            fetched.append(self.get(name, accept=lambda data: hashlib.sha256(data).hexdigest() == sha256))
            return fetched[0]

        outcome: Any = "busy"
        while outcome == "busy" and time.monotonic() < deadline:
            data = self.cache.read(copy)
            if data is not None and hashlib.sha256(data).hexdigest() == sha256:
                return data
            if data is not None:
                self.cache.drop(copy)
            outcome = self.caching(lambda: self.cache.store(copy, fetch))
            if outcome == "busy":
                time.sleep(POLL_S)
        return fetched[0] if fetched else fetch()

    def get(self, name: str, **what: Any) -> bytes:
        """`Fetcher.read` for what must be there: no right to read it is no fault of a sample, so it ends the program.

        Raises:
            RemoteFault, ServerSays: see `Fetcher.read`.
        """
        try:
            return self.fetcher.read(name, **what)
        except DeniedFile as error:
            raise RemoteFault(f"{error.strerror}, then run the same command again") from error

    def open(self, name: str, *, num_bytes: int, sha256: str) -> "RemoteShard":
        """A shard; nothing is fetched yet."""
        return RemoteShard(self, name, num_bytes=num_bytes, sha256=sha256)

    def whole(self, name: str, *, num_bytes: int, sha256: str) -> BinaryIO:
        """A whole shard, copied into the cache.

        Raises:
            RemoteFault, OSError: see `Fetcher.read`.
            InputError: the cache has no room for it.
        """
        shard, deadline = self.open(name, num_bytes=num_bytes, sha256=sha256), time.monotonic() + WHOLE_WAIT_S
        while not shard.fetch(patiently=True):
            if time.monotonic() > deadline:
                break
            time.sleep(BUSY_PAUSE_S)
        try:
            return open(open_plain(self.cache.path(shard.copy)), "rb")
        except FileNotFoundError as error:
            raise InputError(
                f"{self.cache.folder}: no room to copy {self.where}/{name} ({num_bytes / 1e6:.0f} MB) to: raise "
                "SACCADE_CACHE_GB or free the disk"
            ) from error

    def caching(self, act: Callable[[], Any]) -> Any:
        """Run something that writes to the cache; None when the disk does not let it, said once."""
        try:
            return act()
        except ServerSays:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            self.warn(f"{self.cache.folder}: {reason}: reading {self.where} by range instead, slower but complete")
            return None

    def warn(self, message: str) -> None:
        """Say what slows reading down, once per process and set."""
        if not self._warned:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            self._warned = True


class RemoteShard:
    """A shard behind a URL."""

    def __init__(self, folder: RemoteFolder, name: str, *, num_bytes: int, sha256: str) -> None:
        self.folder, self.name, self.num_bytes, self.sha256 = folder, name, num_bytes, sha256
        self.copy = f"{sha256}.tar"
        self._whole = folder.options.whole_shards
        self._checked, self._next_try = False, 0.0
        self._ahead = _ReadAhead(num_bytes)

    def read(self, offset: int, size: int, accept: Accept | None = None) -> bytes:
        """`size` bytes at `offset`, from the copy, from a new copy, or by range.

        Raises:
            RemoteFault, OSError: see `Fetcher.read`.
        """
        data = self._from_copy(offset, size)
        if data is not None and (accept is None or accept(data)):
            return data
        # A copy whose hash was right when it came here is not fetched again: its shard may itself be at fault.
        if data is None or not self._checked:
            if data is not None:
                self.folder.cache.drop(self.copy)
            if self.fetch():
                data = self._from_copy(offset, size)
                if data is not None and (accept is None or accept(data)):
                    return data
        return self._by_range(offset, size, accept)

    def fetch(self, *, patiently: bool = False) -> bool:
        """Copy the shard into the cache if that may be tried now. Returns whether the copy is there.

        Args:
            patiently: try even where the last try was just now or a range would do.

        Raises:
            RemoteFault, OSError: see `Fetcher.read`.
        """
        if not patiently and (not self._whole or time.monotonic() < self._next_try):
            return False
        cache = self.folder.cache
        try:
            outcome = self.folder.caching(lambda: cache.fill(self.copy, self.num_bytes, self._download))
        except ContentFault as fault:
            if patiently:
                raise
            self._whole = False
            self.folder.warn(f"{fault.strerror}; reading it sample by sample instead")
            return False
        self._next_try = time.monotonic() + (BUSY_PAUSE_S if outcome == "busy" else FULL_PAUSE_S)
        if outcome == "stored":
            self._next_try, self._ahead = 0.0, _ReadAhead(self.num_bytes)
        return bool(outcome == "stored")

    def close(self) -> None:
        """Drop what was read ahead."""
        self._ahead = _ReadAhead(self.num_bytes)

    def _from_copy(self, offset: int, size: int) -> bytes | None:
        data = self.folder.cache.read(self.copy, offset, size)
        return data if data is not None and len(data) == size else None

    def _by_range(self, offset: int, size: int, accept: Accept | None) -> bytes:
        known = self._ahead.take(offset, size)
        if known is not None and (accept is None or accept(known)):
            return known
        ahead = self._ahead.plan(offset, size)
        right = None if accept is None else lambda data: accept(data[:size])
        if ahead:
            try:
                data = self.folder.get(self.name, offset=offset, size=size + ahead, accept=right)
                self._ahead.keep(offset, data)
                return data[:size]
            except ContentFault:
                self._ahead.stop()  # what lies behind may be missing where the sample itself is not
        return self.folder.get(self.name, offset=offset, size=size, accept=accept)

    def _download(self, file: BinaryIO) -> None:
        for _ in range(CONTENT_TRIES):
            file.seek(0)
            digest = hashlib.sha256()
            for start in range(0, self.num_bytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, self.num_bytes - start)
                data = self.folder.get(self.name, offset=start, size=size)
                digest.update(data)
                file.write(data)
            if digest.hexdigest() == self.sha256:
                self._checked = True
                return
        raise ContentFault(f"{self.folder.where}/{self.name}: its SHA-256 is not the manifest's")


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


class _ReadAhead:
    """The bytes behind the last read, fetched with it while reads follow each other, twice as many each time."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._begin, self._data = 0, b""
        self._last_end, self._amount, self._most = -NEIGHBOUR_BYTES, 0, MAX_READ_AHEAD

    def stop(self) -> None:
        """Fetch nothing ahead from now on."""
        self._most = 0

    def take(self, offset: int, size: int) -> bytes | None:
        """A range that is at hand, else None."""
        begin = offset - self._begin
        if not 0 <= begin <= begin + size <= len(self._data):
            return None
        self._last_end = offset + size
        return self._data[begin : begin + size]

    def plan(self, offset: int, size: int) -> int:
        """How many bytes to fetch beyond a range."""
        follows = 0 <= offset - self._last_end < NEIGHBOUR_BYTES
        self._amount = min(self._most, max(FIRST_READ_AHEAD, 2 * self._amount)) if follows else 0
        self._last_end = offset + size
        return max(0, min(self._amount, self._num_bytes - offset - size))

    def keep(self, offset: int, data: bytes) -> None:
        """Keep what came."""
        self._begin, self._data = offset, data
