"""Reading samples by position: one `pread` for the image, one for its label map, no tar parsing.

A `ShardSet` holds the manifest and opens shards when they are first read, in each process anew, so it can be handed to
DataLoader workers by fork or by pickle. Whatever is wrong with one sample raises `BadSample`, which the caller counts;
whatever is wrong with the set as a whole raises `InputError` when it is opened.
"""

import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attention.maps import decode_map_np
from engine.errors import InputError
from shards.decode import decode_map_png
from shards.index import IndexFault, ShardIndex, read_index
from shards.manifest import Manifest, check_labels, read_manifest
from shards.plain import open_plain
from shards.quarantine import bad_rows, order_digest, read_quarantine
from shards.writer import index_path

MAX_OPEN_SHARDS = 64
MAX_PAYLOAD_BYTES = 1 << 30


class BadSample(ValueError):
    """One sample cannot be used. `key` is empty where the index itself is unreadable."""

    def __init__(self, key: str, shard: str, reason: str) -> None:
        super().__init__(key, shard, reason)
        self.key, self.shard, self.reason = key, shard, reason

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key[:80]!r}: {self.reason}"


@dataclass(slots=True)
class Sample:
    """One sample as stored.

    `image`: the encoded file. `label`: class index, -1 for none. `map`: `(height, width)` float32 density over the
    whole image, None when the set was opened without labels.
    """

    key: str
    image: bytes
    label: int
    map: np.ndarray | None
    shards: "ShardSet"
    shard: int
    row: int

    def info(self) -> dict[str, Any]:
        """The JSON member: `width`, `height` (pixels), `name`, and for gaze sets `fixations`.

        `fixations` is a list per observer of [x, y] pixels counted from 0. Read from disk when asked for.

        Raises:
            BadSample: absent or damaged.
        """
        return self.shards.read_info(self.shard, self.row)


@dataclass(slots=True)
class _Open:
    """An open tar, its bytes on disk, and its index."""

    descriptor: int
    num_bytes: int
    index: ShardIndex

    def read(self, offset: int, size: int) -> bytes:
        # Never more than is there: a buffer is made for what is asked, and an index may promise anything.
        return os.pread(self.descriptor, max(0, min(size, self.num_bytes - offset)), offset)


class _Files:
    """Open shards of one directory, the least recently used closed first. Opens anew in every process."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self.manifest = root, manifest
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._faults: dict[int, str] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"], state["manifest"])  # type: ignore[misc]

    def get(self, shard: int) -> _Open:
        """The open shard.

        Raises:
            BadSample: the shard or its index is missing, damaged or not the one the manifest names.
        """
        if self._process != os.getpid():
            # After a fork the descriptors are shared copies; preads do not disturb each other, but closing is ours.
            self._process, self._open = os.getpid(), OrderedDict()
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        if shard not in self._faults:
            try:
                return self._keep(shard, self._open_shard(shard))
            except (IndexFault, OSError) as error:
                self._faults[shard] = str(error)
        raise BadSample("", self.manifest.files[shard], f"the whole shard is unreadable: {self._faults[shard]}")

    def close(self) -> None:
        """Close all descriptors."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def _keep(self, shard: int, opened: _Open) -> _Open:
        self._open[shard] = opened
        while len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].descriptor)
        return opened

    def _open_shard(self, shard: int) -> _Open:
        path = self.root / self.manifest.files[shard]
        index = read_index(index_path(path), sha256=self.manifest.hash_of(shard, "index_sha256"))
        if len(index) != self.manifest.num_samples_of[shard] or index.kind != self.manifest.kind:
            raise IndexFault("the index has another number of samples or kind than the manifest says")
        descriptor = open_plain(path)
        return _Open(descriptor, os.fstat(descriptor).st_size, index)


class ShardSet:
    """An image set, with or without label maps.

    Args:
        root: folder of the image set.
        labels: folder of the label set to join, or None.
        teacher_hash: the teacher that must have written the labels; None accepts any.
        check: compare each image's CRC-32 as it is read (about 0.4 microseconds per kB). Maps are always compared.

    `shard_sizes` counts usable samples: quarantined ones are left out, and rows are numbered without them.

    Raises:
        InputError: no set, an empty one, or labels that do not belong to these images or this teacher.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        labels: Path | str | None = None,
        teacher_hash: str | None = None,
        check: bool = True,
    ) -> None:
        self.root, self.check = Path(root), check
        self.manifest = read_manifest(self.root, kind="images")
        self._images = _Files(self.root, self.manifest)
        entries = read_quarantine(self.root, self.manifest)
        self.label_manifest: Manifest | None = None
        self._maps: _Files | None = None
        if labels is not None:
            self.label_manifest = read_manifest(labels, kind="labels")
            check_labels(Path(labels), self.label_manifest, self.manifest, teacher_hash=teacher_hash)
            self._maps = _Files(Path(labels), self.label_manifest)
            entries = entries + read_quarantine(Path(labels), self.label_manifest)
        self.digest = order_digest(self.manifest, entries)
        self._bad = bad_rows(entries)
        self.shard_sizes = self.manifest.num_samples_of.copy()
        for shard, rows in self._bad.items():
            self.shard_sizes[shard] -= len(rows)
        self.shard_starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        if self.num_samples == 0:
            raise InputError(f"{self.root}: the set holds no usable samples: pack one with at least one image")

    @property
    def num_samples(self) -> int:
        """Usable samples."""
        return int(self.shard_sizes.sum())

    @property
    def num_quarantined(self) -> int:
        """Samples left out because a list of bad samples names them."""
        return sum(len(rows) for rows in self._bad.values())

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; empty for an unlabelled set."""
        return self.manifest.classes

    def keys(self, shard: int) -> list[str]:
        """Keys of a shard's usable samples, in row order.

        Raises:
            BadSample: the shard's index is unreadable.
        """
        keys = self._images.get(shard).index.keys()
        bad = set(self._bad[shard].tolist()) if shard in self._bad else set()
        return [key for row, key in enumerate(keys) if row not in bad]

    def read(self, shard: int, row: int) -> Sample:
        """Read one usable sample.

        Raises:
            BadSample: anything wrong with it: short, changed, empty, without label map where one is due.
            IndexError: no such shard or row.
        """
        if not (0 <= shard < self.manifest.num_shards and 0 <= row < self.shard_sizes[shard]):
            raise IndexError(f"shard {shard}, row {row}: outside the set")
        stored = self._stored_row(shard, row)
        opened = self._images.get(shard)
        image = self._payload(opened, shard, stored, check=self.check)
        density = None if self._maps is None else self._read_map(shard, stored)
        label = int(opened.index.label[stored])
        return Sample(opened.index.key(stored), image, label, density, self, shard, row)

    def read_info(self, shard: int, row: int) -> dict[str, Any]:
        """The JSON member of a sample; see `Sample.info`."""
        stored = self._stored_row(shard, row)
        opened = self._images.get(shard)
        size = int(opened.index.info_size[stored])
        try:
            if size < 0:
                raise ValueError("no such member")
            value = json.loads(opened.read(int(opened.index.info_offset[stored]), size))
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except (ValueError, OSError, RecursionError) as error:
            raise self._bad_sample(opened, shard, stored, f"its JSON member is unusable ({error})") from error
        return value

    def close(self) -> None:
        """Close all files; reading again opens them anew."""
        self._images.close()
        if self._maps is not None:
            self._maps.close()

    def _stored_row(self, shard: int, row: int) -> int:
        """Row on disk of a usable row: the bad rows before it are jumped over."""
        if shard in self._bad:
            bad = self._bad[shard]
            row += int(np.searchsorted(bad - np.arange(len(bad)), row, side="right"))
        return row

    def _payload(self, opened: _Open, shard: int, row: int, *, check: bool) -> bytes:
        index = opened.index
        size = int(index.size[row])
        if not 0 < size <= MAX_PAYLOAD_BYTES:
            reason = "no data" if size < 0 else "zero bytes" if size == 0 else f"{size} bytes are too many"
            raise self._bad_sample(opened, shard, row, reason)
        try:
            data = opened.read(int(index.offset[row]), size)
        except OSError as error:
            raise self._bad_sample(opened, shard, row, f"cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise self._bad_sample(opened, shard, row, f"cut short: {len(data)} of {size} bytes")
        if check and zlib.crc32(data) != index.crc[row]:
            raise self._bad_sample(opened, shard, row, "its bytes have changed since packing (CRC-32)")
        return data

    def stored_map(self, shard: int, stored_row: int) -> bytes | None:
        """PNG bytes of a label map by its row on disk, quarantined rows included; None where there is none.

        Raises:
            BadSample: damaged, or the set was opened without labels.
        """
        if self._maps is None:
            raise BadSample("", self.manifest.files[shard], "the set was opened without labels")
        opened = self._maps.get(shard)
        return self._payload(opened, shard, stored_row, check=True) if opened.index.size[stored_row] >= 0 else None

    def _read_map(self, shard: int, stored: int) -> np.ndarray:
        data = self.stored_map(shard, stored)
        try:
            if data is None:
                raise ValueError("none was written for this image")
            return decode_map_np(decode_map_png(data))
        except ValueError as error:
            assert self._maps is not None  # stored_map has used it
            raise self._bad_sample(self._maps.get(shard), shard, stored, str(error)) from error

    def _bad_sample(self, opened: _Open, shard: int, row: int, reason: str) -> BadSample:
        what = "label map" if opened.index.kind == "labels" else "image"
        return BadSample(opened.index.key(row), self.manifest.files[shard], f"{what}: {reason}")
