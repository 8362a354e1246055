"""From shards to batches of views: the data set that the loader's workers run, and the loader itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.errors import InputError
from engine.loading import TensorBatch, make_loader
from engine.settings import LoopConfig
from pretrain.config import DataConfig, ViewsConfig
from pretrain.views import NUM_COLOURS, View, cut_views, draw_view, view_generator
from shards.decode import image_size
from shards.location import is_remote
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
        maps: attention densities of the whole images, float32 `(batch, rows, columns)`, or None without labels.
        labels: class numbers `(batch,)`, -1 for none.
        valid: bool `(batch,)`; false where the sample could not be read, its place filled with zeros.
        bad: key and reason of each sample that could not be read.
    """

    images: Tensor
    boxes: Tensor
    flips: Tensor
    colours: Tensor
    maps: Tensor | None
    labels: Tensor
    valid: Tensor
    bad: list[str]


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


class ViewDataset(Dataset[Batch]):
    """Reads samples by position and cuts their views; a whole batch per call."""

    def __init__(
        self, shards: ShardSet, *, views: ViewsConfig, num_views: int, image_size: int, seed: int, map_size: int
    ) -> None:
        self.shards, self.views, self.num_views, self.seed = shards, views, num_views, seed
        self.image_size, self.map_size = image_size, map_size

    def __getitem__(self, position: Position) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[Position]) -> Batch:
        """Read one batch; unreadable samples are marked, not replaced."""
        count, size, num_views = len(positions), self.image_size, self.num_views
        images = np.empty((num_views, count, size, size, 3), dtype=np.uint8)
        boxes = np.tile(np.array([0, 0, 1, 1], dtype=np.float32), (num_views, count, 1))
        flips = np.zeros((num_views, count), dtype=bool)
        colours = np.zeros((num_views, count, NUM_COLOURS), dtype=np.float32)
        maps = np.ones((count, self.map_size, self.map_size), dtype=np.float32) if self.map_size else None
        labels = np.full(count, -1, dtype=np.int64)
        valid, bad = np.zeros(count, dtype=bool), []
        for i, position in enumerate(positions):
            try:
                sample, drawn, pixels = self._read(position)
            except BadSample as error:
                bad.append(str(error))
                images[:, i] = 0
                continue
            images[:, i], labels[i], valid[i] = pixels, sample.label, True
            for v, view in enumerate(drawn):
                boxes[v, i], flips[v, i], colours[v, i] = view.box, view.flip, view.colours
            if maps is not None:
                maps[i] = sample.map
        return Batch(
            images=torch.from_numpy(images),
            boxes=torch.from_numpy(boxes),
            flips=torch.from_numpy(flips),
            colours=torch.from_numpy(colours),
            maps=torch.from_numpy(maps) if maps is not None else None,
            labels=torch.from_numpy(labels),
            valid=torch.from_numpy(valid),
            bad=bad,
        )

    def _read(self, position: Position) -> tuple[Any, list[View], np.ndarray]:
        epoch, shard, row = position
        sample = self.shards.read(shard, row)
        number = int(self.shards.shard_starts[shard]) + row
        try:
            height, width = image_size(sample.image)
            drawn = []
            for v in range(self.num_views):
                rng = view_generator(self.seed, epoch=epoch, sample=number, view=v)
                drawn.append(draw_view(rng, self.views, height=height, width=width))
            return sample, drawn, cut_views(sample.image, drawn, size=self.image_size)
        except ValueError as error:
            raise BadSample(sample.key, f"shard {shard}", str(error)) from error


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
