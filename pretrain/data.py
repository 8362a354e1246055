"""From shards to batches of views: the data set that the loader's workers run, and the loader itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attention.maps import decode_map
from engine.errors import InputError
from engine.loading import TensorBatch, make_loader
from engine.settings import LoopConfig
from pretrain.config import DataConfig, ViewsConfig
from pretrain.reuse import ArrayPool
from pretrain.views import ViewCutter, Views, draw_views
from shards.decode import ImageHeader, image_header
from shards.location import is_remote
from shards.map_png import Codes, MapRows, stack_codes
from shards.order import SampleOrder, StepBatches
from shards.reader import BadSample, ShardSet

Position = tuple[int, int, int]  # epoch, shard, row


@dataclass
class Batch(TensorBatch):
    """One rank's samples of one step. Views come first: `(num_views, batch, ...)`.

    Attributes:
        images: uint8 `(num_views, batch, size, size, 3)`.
        boxes: crops `(num_views, batch, 4)` as top, left, height, width, fractions of the image.
        flips: bool `(num_views, batch)`.
        colours: float32 `(num_views, batch, NUM_COLOURS)`.
        maps: attention maps of the whole images, `(batch, rows, columns)`, as uint8 codes of `attention.maps` or as
            float densities; None without labels. `densities` gives the latter.
        labels: class numbers `(batch,)`, -1 for none.
        valid: bool `(batch,)`; false where the sample could not be read, its place filled with zeros.
        bad: file, key and reason of each sample that could not be read.
        sizes: int64 `(batch, 2)`, height and width in pixels of the upright images that `boxes` are fractions of, 0
            where the sample could not be read; None in a batch that was not made of files.
    """

    images: Tensor
    boxes: Tensor
    flips: Tensor
    colours: Tensor
    maps: Tensor | None
    labels: Tensor
    valid: Tensor
    bad: list[str]
    sizes: Tensor | None = None

    def densities(self) -> Tensor:
        """Attention densities of the whole images, float `(batch, rows, columns)`, on the device of the maps."""
        assert self.maps is not None
        return decode_map(self.maps) if self.maps.dtype == torch.uint8 else self.maps


def find_label_set(path: Path) -> Path:
    """The label set at `path`: the folder itself, or the only set inside it; a URL must name the set.

    Raises:
        InputError: no set there, or more than one.
    """
    if is_remote(path):
        return path
    if (path / "manifest.json").is_file():
        return path
    found = sorted(p.parent for p in path.glob("*/manifest.json")) if path.is_dir() else []
    if len(found) != 1:
        what = f"holds {len(found)} label sets ({', '.join(p.name for p in found)})" if found else "holds no label set"
        raise InputError(f"data.labels {path} {what}: give the folder of one, as teacher/label.py named it")
    return found[0]


class _File(NamedTuple):
    """A sample on its way into a batch: the image file, what its header says, class, codes of its map."""

    data: bytes
    header: ImageHeader
    label: int
    codes: Codes


_NO_CODES = MapRows((0, 0), b"")


class ViewDataset(Dataset[Batch]):
    """Reads samples by position and cuts their views; a whole batch per call."""

    def __init__(
        self, shards: ShardSet, *, views: ViewsConfig, num_views: int, image_size: int, seed: int, map_size: int
    ) -> None:
        self.shards, self.views, self.num_views, self.seed = shards, views, num_views, seed
        self.image_size, self.map_size = image_size, map_size
        self._images, self._maps, self._cutter = ArrayPool(), ArrayPool(), ViewCutter(image_size)

    def __getitem__(self, position: Position) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[Position]) -> Batch:
        """Read one batch; unreadable samples are marked, not replaced.

        Files are read and decoded one by one; what lies between is computed for the batch at once, since Python takes
        longer over a sample's few dozen numbers than the decoder over a small image.
        """
        bad: dict[int, str] = {}
        files = [self._read(number, position, bad) for number, position in enumerate(positions)]
        sizes = np.array([file.header[:2] for file in files], dtype=np.int64)
        views = self._draw(positions, sizes)
        images = self._cut(positions, files, views, bad)
        boxes = (views.crops / sizes[:, [0, 1, 0, 1]]).astype(np.float32)
        labels = np.array([file.label for file in files], dtype=np.int64)
        valid = np.ones(len(files), dtype=bool)
        if bad:
            failed = sorted(bad)
            valid[failed], labels[failed], sizes[failed], views.flips[:, failed] = False, -1, 0, False
            images[:, failed], boxes[:, failed], views.colours[:, failed] = 0, (0, 0, 1, 1), 0
        maps = self._codes(files) if self.map_size else None
        return Batch(
            images=torch.from_numpy(images),
            boxes=torch.from_numpy(boxes),
            flips=torch.from_numpy(views.flips),
            colours=torch.from_numpy(views.colours),
            maps=None if maps is None else torch.from_numpy(maps),
            labels=torch.from_numpy(labels),
            valid=torch.from_numpy(valid),
            bad=[bad[number] for number in sorted(bad)],
            sizes=torch.from_numpy(sizes),
        )

    def key_of(self, position: Position) -> str:
        """Key of the sample at a position.

        Raises:
            BadSample: the shard's index is unreadable.
        """
        _, shard, row = position
        return self.shards.key(shard, row)

    def _read(self, number: int, position: Position, bad: dict[int, str]) -> _File:
        """One sample; where it cannot be read, its reason goes into `bad` and an empty one takes its place."""
        _, shard, row = position
        try:
            stored = self.shards.read_stored(shard, row)
            codes = _NO_CODES if stored.codes is None else stored.codes
            if self.map_size and codes.shape != (self.map_size, self.map_size):
                raise ValueError(f"its label map is {codes.shape}, those of the set are {self.map_size} on a side")
            return _File(stored.image, image_header(stored.image), stored.label, codes)
        except ValueError as error:
            bad[number] = self._reason(position, error)
        return _File(b"", ImageHeader(1, 1, False), -1, np.zeros((self.map_size, self.map_size), dtype=np.uint8))

    def _draw(self, positions: list[Position], sizes: np.ndarray) -> Views:
        epochs, shards, rows = np.array(positions, dtype=np.int64).T
        return draw_views(
            self.views,
            seed=self.seed,
            epochs=epochs,
            samples=self.shards.shard_starts[shards] + rows,
            sizes=sizes,
            num_views=self.num_views,
        )

    def _cut(self, positions: list[Position], files: list[_File], views: Views, bad: dict[int, str]) -> np.ndarray:
        size = self.image_size
        images = self._images.take((self.num_views, len(files), size, size, 3), np.uint8)
        crops, flips = views.crops.swapaxes(0, 1).tolist(), views.flips.T.tolist()
        for number, file in enumerate(files):
            if number not in bad:
                try:
                    self._cutter.cut(file.data, file.header, crops[number], flips[number], out=images[:, number])
                except ValueError as error:
                    bad[number] = self._reason(positions[number], error)
        return images

    def _codes(self, files: list[_File]) -> np.ndarray:
        maps = self._maps.take((len(files), self.map_size, self.map_size), np.uint8)
        stack_codes([file.codes for file in files], maps)
        return maps

    def _reason(self, position: Position, error: ValueError) -> str:
        """Where the unreadable sample lies, its key, and what is wrong with it."""
        if not isinstance(error, BadSample):
            _, shard, row = position
            error = BadSample(self.shards.key(shard, row), self.shards.manifest.files[shard], str(error))
        return f"{self.shards.root}/{error}"


def view_batches(
    dataset: ViewDataset,
    *,
    data: DataConfig,
    loop: LoopConfig,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
    seed: int,
) -> Iterator[Batch]:
    """This rank's batches of steps `start_step` to `stop_step`, read ahead by `loop.num_workers` processes."""
    order = SampleOrder(dataset.shards.shard_sizes, seed=seed, window=data.window)
    steps = StepBatches(
        order,
        batch_size=data.batch_size,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        stop_step=stop_step,
    )
    return iter(make_loader(dataset, steps, num_workers=loop.num_workers))
