"""Batches of examples with their surrogate maps."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from downstream.config import DownstreamConfig
from downstream.protocol import Examples, Inputs, Task
from engine.loading import make_loader
from engine.settings import LoopConfig
from shards.order import SampleOrder, StepBatches

BatchT = TypeVar("BatchT")
Item = TypeVar("Item")


@dataclass
class Batch:
    """One rank's examples of one step.

    Attributes:
        targets: as in `Examples`.
        maps: modality to surrogate densities `(batch, *positions)`.
        use: modality to bool `(batch,)`: whether the example is supervised; stays on the host.
        bad: reasons for what could not be read.
    """

    inputs: Inputs
    targets: Tensor
    maps: dict[str, Tensor] = field(default_factory=dict)
    use: dict[str, Tensor] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def on(self, device: torch.device) -> "Batch":
        """The batch on `device`, but for `use`, which decides what the host asks for."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        targets = self.targets.to(device, non_blocking=True)
        return Batch(moved(self.inputs), targets, moved(self.maps), self.use, self.bad)


class ExampleDataset(Dataset[Batch]):
    """Reads examples and their surrogates by position; a whole batch per call.

    Args:
        maps: modality to densities of all examples `(examples, *positions)`.
        use: modality to bool `(examples,)`.
    """

    def __init__(self, examples: Examples, *, maps: dict[str, Tensor], use: dict[str, Tensor]) -> None:
        self.examples, self.maps, self.use = examples, maps, use

    def __getitem__(self, position: tuple[int, int, int]) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[tuple[int, int, int]]) -> Batch:
        """Read one batch of (epoch, shard, row)."""
        rows = np.array([row for _, _, row in positions], dtype=np.int64)
        index = torch.from_numpy(rows)
        return Batch(
            self.examples.inputs(rows),
            self.examples.targets[index],
            {name: maps[index] for name, maps in self.maps.items()},
            {name: use[index] for name, use in self.use.items()},
        )


def training_batches(
    dataset: Dataset[BatchT],
    *,
    count: int,
    batch_size: int,
    seed: int,
    num_workers: int,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
) -> Iterator[BatchT]:
    """This rank's batches of steps `start_step` to `stop_step`, in the exact elastic order of `shards/order.py`.

    Args:
        dataset: reads a batch of positions (epoch, shard, row) per call.
        count: its rows, all in shard 0.
    """
    steps = StepBatches(
        SampleOrder(np.array([count]), seed=seed, window=1),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        stop_step=stop_step,
    )
    return iter(make_loader(dataset, steps, num_workers=num_workers))


def place(task: Task, device: torch.device, *, loop: LoopConfig) -> None:
    """Put the examples of `task` on a GPU where they can be (`to`), so that no step waits for a copy from the host.

    Loader processes cannot read from there, so with `loop.num_workers` all stays on the host.
    """
    if device.type != "cuda" or loop.num_workers:
        return
    for name in ("train", "held_out", "test"):
        examples = getattr(task, name)
        if hasattr(examples, "to"):
            setattr(task, name, examples.to(device))


def rows_of_rank(count: int, *, rank: int, world_size: int, size: int) -> list[np.ndarray]:
    """One rank's rows for evaluation, in batches of at most `size`: each row on exactly one rank."""
    rows = np.arange(rank * count // world_size, (rank + 1) * count // world_size)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def limited(items: list[Item], config: DownstreamConfig) -> list[Item]:
    """A random `data.limit` of the training set's items, in their order; all of them without a limit."""
    limit = config.data.limit
    if limit is None or limit >= len(items):
        return items
    rows = np.sort(np.random.default_rng(config.data.held_out_seed).permutation(len(items))[:limit])
    return [items[row] for row in rows]
