"""Open shards of one set: found by number, opened when first read, the least recently used closed again."""

import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from shards.folder import Accept, Folder, ShardBytes
from shards.index import SUFFIX, IndexFault, ShardIndex, parse_index
from shards.manifest import Manifest
from shards.order import MAX_WINDOW

MAX_OPEN_SHARDS = MAX_WINDOW
FAULT_KEPT_S = 60.0  # a shard that could not be opened is tried again, for servers recover
TAR_SUFFIX = ".tar"


class BadSample(ValueError):
    """One sample cannot be used. `key` is empty where the index itself is unreadable."""

    def __init__(self, key: str, shard: str, reason: str) -> None:
        super().__init__(key, shard, reason)
        self.key, self.shard, self.reason = key, shard, reason

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key[:80]!r}: {self.reason}"


@dataclass(slots=True)
class OpenShard:
    """An open tar and its index."""

    data: ShardBytes
    index: ShardIndex

    def read(self, offset: int, size: int, accept: Accept | None = None) -> bytes:
        # Never more than is there: a buffer is made for what is asked, and an index may promise anything.
        left = self.data.num_bytes - offset
        return self.data.read(offset, size if size <= left else max(0, left), accept)


class ShardFiles:
    """Open shards of one set, the least recently used closed first. Opens anew in every process."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._faults: dict[int, tuple[float, str]] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["manifest"])  # type: ignore[misc]

    def get(self, shard: int) -> OpenShard:
        """The open shard.

        Raises:
            BadSample: the shard or its index is missing, damaged or not the one the manifest names.
            RemoteFault: its server cannot be reached.
        """
        if self._process != os.getpid():
            # After a fork the descriptors are shared copies; preads do not disturb each other, but closing is ours.
            self._process, self._open = os.getpid(), OrderedDict()
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        since, fault = self._faults.get(shard, (-FAULT_KEPT_S, ""))
        if time.monotonic() - since >= FAULT_KEPT_S:
            try:
                return self._keep(shard, self._open_shard(shard))
            except IndexFault as error:
                fault = str(error)
            except OSError as error:
                fault = f"{self.manifest.files[shard]}: {error.strerror or error}"
            self._faults[shard] = time.monotonic(), fault
        raise BadSample("", self.manifest.files[shard], f"the whole shard is unreadable: {fault}")

    def close(self) -> None:
        """Close all descriptors."""
        while self._open:
            self._open.popitem()[1].data.close()

    def _keep(self, shard: int, opened: OpenShard) -> OpenShard:
        self._open[shard] = opened
        while len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].data.close()
        return opened

    def _open_shard(self, shard: int) -> OpenShard:
        name, manifest = self.manifest.files[shard], self.manifest
        index = read_shard_index(self.folder, manifest, shard)
        if len(index) != manifest.num_samples_of[shard] or index.kind != manifest.kind:
            raise IndexFault("the index has another number of samples or kind than the manifest says")
        num_bytes, sha256 = int(manifest.num_bytes_of[shard]), manifest.hash_of(shard, "sha256")
        return OpenShard(self.folder.open(name, num_bytes=num_bytes, sha256=sha256), index)


def read_shard_index(folder: Folder, manifest: Manifest, shard: int) -> ShardIndex:
    """A shard's index as it is on disk or on the server.

    Raises:
        IndexFault: missing, damaged or not the one the manifest names.
        RemoteFault: its server cannot be reached.
    """
    name = manifest.files[shard].removesuffix(TAR_SUFFIX) + SUFFIX
    sha256 = manifest.hash_of(shard, "index_sha256")
    try:
        data = folder.read(name, sha256=sha256)
    except OSError as error:
        raise IndexFault(f"{name}: {error.strerror or error}") from error
    return parse_index(data, name=name, sha256=sha256)
