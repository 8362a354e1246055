"""Bytes of remote files through fsspec: one request at a time, checked, and tried again when that may help.

Two kinds of fault are told apart. The server cannot be reached or does not answer rightly: tried again with growing
pauses, then `RemoteFault`, which ends the program with one line. The server answers well but with other bytes than the
manifest promises, or has no such file: after a few tries `ServerSays`, an `OSError` that readers count as a bad
sample, as they do for local files.
"""

import inspect
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat

from engine.errors import InputError
from shards.faults import (
    ADVICE,
    ContentFault,
    DeniedFile,
    MissingFile,
    RemoteFault,
    ServerSays,
    about_the_file,
    describe,
    raise_if_hopeless,
)

CONTENT_TRIES = 4
MAX_PAUSE_S = 30.0
MAX_FILE_BYTES = 1 << 30
DEFAULT_CACHE_GB = 32.0

_HTTP = ("http", "https")
_GOOGLE = ("gs", "gcs")
# One per process and protocol, never dropped: after a fork the connections are shared with the parent, and clearing
# them up here would shut them there.
_clients: dict[tuple[int, str], Any] = {}


@dataclass(frozen=True)
class RemoteOptions:
    """How sets on s3://, gs:// and https:// are read."""

    cache: str = ""
    """Folder for copies; empty takes SACCADE_CACHE, else the user's cache folder. Share it between runs on a node."""
    cache_gb: NonNegativeFloat = 0.0
    """Size that all copies together may reach, 10^9 bytes; 0 takes SACCADE_CACHE_GB, else 32."""
    whole_shards: bool = True
    """Fetch a shard as a whole where the cache has room for it; false reads single samples by range, which moves fewer
    bytes when many nodes share each shard."""
    retries: NonNegativeInt = 8
    """Further tries after a failed request."""
    backoff_s: PositiveFloat = 0.5
    """Pause before the first further try, seconds; it doubles each time up to 30, give or take a quarter."""
    timeout_s: PositiveFloat = 60.0
    """Seconds after which a request counts as failed."""

    @property
    def cache_folder(self) -> Path:
        """The cache's folder on this node."""
        chosen = self.cache or os.environ.get("SACCADE_CACHE", "")
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(chosen or f"{base}/saccade").expanduser().absolute()

    @property
    def cache_bytes(self) -> int:
        """The cache's bound in bytes.

        Raises:
            InputError: SACCADE_CACHE_GB is no number.
        """
        text = os.environ.get("SACCADE_CACHE_GB") or DEFAULT_CACHE_GB
        try:
            return int((self.cache_gb or float(text)) * 1e9)
        except (ValueError, OverflowError) as error:
            raise InputError(f"SACCADE_CACHE_GB is {text!r}: give a number of gigabytes") from error


class Fetcher:
    """Reads files below one URL. Pickles, and connects anew in every process."""

    def __init__(self, url: str, options: RemoteOptions) -> None:
        self.url, self.options = url, options
        self.protocol = url.partition("://")[0]
        # Not the module's generator: pauses must not move the random state that training depends on.
        self._random = random.SystemRandom()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["options"])  # type: ignore[misc]

    def read(
        self,
        name: str,
        *,
        offset: int = 0,
        size: int | None = None,
        accept: Callable[[bytes], bool] | None = None,
    ) -> bytes:
        """`size` bytes of a file from `offset` on, or the whole of a small file.

        Args:
            accept: says whether these are the right bytes; others are fetched again.

        Raises:
            RemoteFault: the server cannot be reached or answers with faults, for longer than the retries last.
            ContentFault: it keeps on delivering too little, or what `accept` refuses.
            MissingFile, DeniedFile: no such file, or not for us.
        """
        url, tries, started = f"{self.url}/{name}", self.options.retries + 1, time.monotonic()
        wrong, last = 0, ""
        for attempt in range(tries):
            if attempt:
                time.sleep(self._pause(attempt))
            try:
                data = self._request(url, offset, size)
                if size is not None and len(data) != size:
                    raise ContentFault(f"{len(data)} of {size} bytes came")
                if accept is not None and not accept(data):
                    raise ContentFault("not the bytes that the manifest or index names")
                return data
            except ContentFault as fault:
                wrong, last = wrong + 1, str(fault.strerror)
                if wrong == min(tries, CONTENT_TRIES):
                    raise ContentFault(f"{url}: {last}, {wrong} times: copy the set there again") from fault
            except ServerSays:
                raise
            except Exception as error:  # each protocol's client has its own; what none can mend is sorted out here
                last = describe(error)
                raise_if_hopeless(error, url=url, described=last)
        seconds = time.monotonic() - started
        raise RemoteFault(f"{url}: {last}; gave up after {tries} tries in {seconds:.0f} s: {ADVICE}")

    def _pause(self, attempt: int) -> float:
        return min(MAX_PAUSE_S, self.options.backoff_s * 2.0 ** (attempt - 1)) * self._random.uniform(0.75, 1.25)

    def _request(self, url: str, offset: int, size: int | None) -> bytes:
        filesystem = _client(self.protocol)
        end = None if size is None else offset + size
        if self.protocol in _HTTP:
            return bytes(sync(filesystem.loop, _get, filesystem, url, offset, size, timeout=self.options.timeout_s))
        path = filesystem._strip_protocol(url)
        start = None if size is None else offset
        timeout = self.options.timeout_s
        try:
            if not isinstance(filesystem, AsyncFileSystem):
                return bytes(filesystem.cat_file(path, start=start, end=end))
            return bytes(sync(filesystem.loop, filesystem._cat_file, path, start=start, end=end, timeout=timeout))
        except Exception as error:  # each protocol's client has its own
            fault = about_the_file(error, url)
            if fault is None:
                raise
            raise fault from error


def _client(protocol: str) -> Any:
    key = (os.getpid(), protocol)
    if key not in _clients:
        _clients[key] = _connect(protocol)
    return _clients[key]


def _connect(protocol: str) -> Any:
    """A client of our own, with the user's fsspec settings; its own retries are off where that can be said."""
    given = fsspec.config.conf.get(protocol, {})
    more: dict[str, Any] = {}
    if protocol in _HTTP:
        more["client_kwargs"] = {"trust_env": True} | given.get("client_kwargs", {})
    elif protocol in ("s3", "s3a"):
        more["config_kwargs"] = {"retries": {"total_max_attempts": 1}} | given.get("config_kwargs", {})
    try:
        if protocol in _GOOGLE:
            return _connect_google()
        filesystem = fsspec.filesystem(protocol, skip_instance_cache=True, **more)
    except ImportError as error:
        raise InputError(
            f"{protocol}://: a package is missing ({error}): python -m pip install -e '.[remote]'"
        ) from error
    if protocol in ("s3", "s3a"):
        filesystem.retries = 1
        filesystem.max_concurrency = 1  # else it asks for the size of a whole file first
    return filesystem


def _connect_google() -> Any:
    """gcsfs over plain HTTPS.

    Its newer default class first asks over gRPC what kind the bucket is: that needs a right more than reading does, and
    gRPC's threads do not survive the fork that makes a loader's workers.
    """
    from gcsfs.core import GCSFileSystem

    filesystem = GCSFileSystem(skip_instance_cache=True)
    filesystem._request = MethodType(inspect.unwrap(GCSFileSystem._request), filesystem)  # without retries of its own
    return filesystem


async def _get(filesystem: Any, url: str, offset: int, size: int | None) -> bytes:
    """One GET over fsspec's session, reading no more than was asked for whatever the server sends."""
    headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    limit = MAX_FILE_BYTES if size is None else size
    if size is not None:
        headers["Range"] = f"bytes={offset}-{offset + size - 1}"
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(url), **{**filesystem.kwargs, "headers": headers}) as response:
        if url.startswith("https:") and any(hop.url.scheme != "https" for hop in (*response.history, response)):
            raise RemoteFault(f"{url}: redirects to an unencrypted address: correct the URL")
        if response.status in (404, 410):
            raise MissingFile(url)
        if response.status in (401, 403):
            raise DeniedFile(url)
        if response.status == 416:
            raise ContentFault("the file is shorter than the manifest says")
        response.raise_for_status()
        if size is not None and response.status != 206:
            raise RemoteFault(f"{url}: the server ignores byte ranges: use one that serves them, such as nginx or S3")
        parts, total = [], 0
        while total <= limit and (part := await response.content.read(1 << 20)):
            parts.append(part)
            total += len(part)
    if total > limit:
        raise ContentFault(f"more than the {limit} bytes asked for came")
    return b"".join(parts)
