"""Reading samples by position: one `pread` for the image, one for its label map, no tar parsing.

A `ShardSet` holds the manifest and opens shards when they are first read, in each process anew, so it can be handed to
DataLoader workers by fork or by pickle. Whatever is wrong with one sample raises `BadSample`, which the caller counts;
whatever is wrong with the set as a whole raises `InputError` when it is opened.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from attention.maps import decode_map_np
from engine.errors import InputError
from shards.fetch import RemoteOptions
from shards.folder import LocalFolder, open_folder
from shards.manifest import Manifest, check_labels, read_manifest
from shards.map_png import Codes, read_map_png, summed
from shards.opening import BadSample, OpenShard, ShardFiles, read_shard_index
from shards.quarantine import bad_rows, order_digest, read_quarantine
from shards.tar import BLOCK, TarError, parse_header

MAX_PAYLOAD_BYTES = 1 << 30


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
class Stored:
    """One sample before anything is decoded, for those who read whole batches.

    `image` and `label` as in `Sample`; `codes`: of its map, for `stack_codes`; `decode_map` makes densities of them.
    """

    image: bytes
    label: int
    codes: Codes | None


class ShardSet:
    """An image set, with or without label maps.

    Args:
        root: folder or URL of the image set.
        labels: folder or URL of the label set to join, or None.
        teacher_hash: the teacher that must have written the labels (the first 8 or more characters of its checkpoint
            hash are enough); None accepts any.
        objects: the labels are objects (`shards/objects.py` reads them), and samples come without map.
        check: compare each image's CRC-32 as it is read. Maps, and whatever comes from a server, are
            always compared.
        remote: how URLs are read; None takes the defaults.

    `shard_sizes` counts usable samples: quarantined ones are left out, and rows are numbered without them.

    Raises:
        InputError: no set, an empty one, or labels that do not belong to these images or this teacher.
        RemoteFault: a server that cannot be reached, here or when reading.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        labels: Path | str | None = None,
        teacher_hash: str | None = None,
        objects: bool = False,
        check: bool = True,
        remote: RemoteOptions | None = None,
    ) -> None:
        folder = open_folder(root, remote=remote)
        self.root, self.remote = folder.where, remote
        self.check = check or not isinstance(folder, LocalFolder)
        self.objects = objects
        self.manifest = read_manifest(folder, kind="images")
        self._images = ShardFiles(folder, self.manifest)
        entries = read_quarantine(folder, self.manifest)
        self.label_manifest: Manifest | None = None
        self._maps: ShardFiles | None = None
        if labels is not None:
            folder = open_folder(labels, remote=remote)
            self.label_manifest = read_manifest(folder, kind="labels")
            check_labels(folder.where, self.label_manifest, self.manifest, teacher_hash=teacher_hash, objects=objects)
            self._maps = ShardFiles(folder, self.label_manifest)
            entries = entries + read_quarantine(folder, self.label_manifest)
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

    def stored_keys(self, shard: int) -> list[str]:
        """All keys of a shard, quarantined ones included, in the order on disk.

        Raises:
            IndexFault: the shard's index is unreadable.
        """
        return read_shard_index(self._images.folder, self.manifest, shard).keys()

    def read(self, shard: int, row: int) -> Sample:
        """Read one usable sample.

        Raises:
            BadSample: anything wrong with it: short, changed, empty, without label map where one is due.
            RemoteFault: its server cannot be reached.
            IndexError: no such shard or row.
        """
        stored = self.read_stored(shard, row)
        density = None if stored.codes is None else decode_map_np(summed(stored.codes))
        return Sample(self.key(shard, row), stored.image, stored.label, density, self, shard, row)

    def read_stored(self, shard: int, row: int) -> Stored:
        """Read one usable sample with the codes of its map; raises as `read` does."""
        if not (0 <= shard < len(self.shard_sizes) and 0 <= row < self.shard_sizes.item(shard)):
            raise IndexError(f"shard {shard}, row {row}: outside the set")
        stored = self._stored_row(shard, row)
        opened = self._images.get(shard)
        image = self._payload(opened, shard, stored, check=self.check)
        codes = None if self._maps is None or self.objects else self._read_codes(self._maps.get(shard), shard, stored)
        return Stored(image, opened.index.label.item(stored), codes)

    def read_label(self, shard: int, row: int) -> bytes | None:
        """The label of a usable sample as it is stored; None where there is none. Raises as `stored_map` does."""
        return self.stored_map(shard, self._stored_row(shard, row))

    def key(self, shard: int, row: int) -> str:
        """Key of a usable sample.

        Raises:
            BadSample: the shard's index is unreadable.
        """
        return self._images.get(shard).index.key(self._stored_row(shard, row))

    def read_info(self, shard: int, row: int) -> dict[str, Any]:
        """The JSON member of a sample; see `Sample.info`."""
        stored = self._stored_row(shard, row)
        opened = self._images.get(shard)
        offset, size = int(opened.index.info_offset[stored]), int(opened.index.info_size[stored])
        try:
            if size < 0 or offset < BLOCK:
                raise ValueError("no such member")
            # Read with the header before it, the one thing that tells a remote shard whether these are the right bytes.
            data = opened.read(offset - BLOCK, BLOCK + size, lambda found: _is_member(found, size))
            value = json.loads(data[BLOCK:])
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

    def _payload(self, opened: OpenShard, shard: int, row: int, *, check: bool) -> bytes:
        index = opened.index
        size, crc = index.size.item(row), index.crc.item(row) if check else None
        if not 0 < size <= MAX_PAYLOAD_BYTES:
            reason = "no data" if size < 0 else "zero bytes" if size == 0 else f"{size} bytes are too many"
            raise self._bad_sample(opened, shard, row, reason)
        try:
            data = opened.read(index.offset.item(row), size, lambda found: crc is None or isal_zlib.crc32(found) == crc)
        except OSError as error:
            raise self._bad_sample(opened, shard, row, f"cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise self._bad_sample(opened, shard, row, f"cut short: {len(data)} of {size} bytes")
        if crc is not None and isal_zlib.crc32(data) != crc:
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

    def _read_codes(self, opened: OpenShard, shard: int, stored: int) -> Codes:
        reason = "none was written for this image"
        if opened.index.size.item(stored) >= 0:
            data = self._payload(opened, shard, stored, check=True)
            try:
                return read_map_png(data)
            except ValueError as error:
                reason = str(error)
        raise self._bad_sample(opened, shard, stored, reason)

    def _bad_sample(self, opened: OpenShard, shard: int, row: int, reason: str) -> BadSample:
        what = "label map" if opened.index.kind == "labels" else "image"
        return BadSample(opened.index.key(row), self.manifest.files[shard], f"{what}: {reason}")


def _is_member(data: bytes, size: int) -> bool:
    """Whether these are the header of a member of that size and JSON."""
    try:
        json.loads(data[BLOCK:])
        return parse_header(data[:BLOCK]).size == size
    except (TarError, ValueError, RecursionError):
        return False
