"""Loaders of whole batches, and the count of what they could not read."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.errors import Fault, InputError
from engine.faults import SampleNote
from engine.forking import end_opencv_threads
from engine.pulse import PULSE
from engine.stop import outlast_stop_signals
from engine.training import Training


class TensorBatch:
    """Base of dataclasses that hold a batch: moves their tensors and leaves the rest.

    Attributes:
        positions: which samples it holds, as its loader was asked for them; set when it comes out of the loader.
        key_of: the data set's `key_of`, the key of the sample at a position, where it has one; set likewise.
    """

    positions: list[Any] | None = None
    key_of: Callable[[Any], str] | None = None

    def note(self) -> Callable[[], SampleNote]:
        """Says, when called, which samples the batch holds; keeps none of its tensors."""
        return partial(_name_samples, self.positions or [], self.key_of)

    def to(self, device: torch.device) -> Self:
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory; the loader calls it where there is a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{name: function(v) for name, v in values.items() if isinstance(v, Tensor)})  # type: ignore[type-var]


class PositionedLoader(DataLoader[Any]):
    """A loader of whole batches that writes on each which samples were asked for."""

    batch_sampler: "_Remembering"

    def __iter__(self) -> Any:
        asked = self.batch_sampler.asked = deque()
        for batch in super().__iter__():
            positions = asked.popleft()
            PULSE.beat()
            if isinstance(batch, TensorBatch):
                batch.positions, batch.key_of = positions, getattr(self.dataset, "key_of", None)
            yield batch


class _Remembering:
    """A batch sampler that remembers what it gave to the workers and has not come back yet."""

    def __init__(self, batches: Iterable[list[Any]]) -> None:
        self.batches = batches
        self.asked: deque[list[Any]] = deque()

    def __iter__(self) -> Iterator[list[Any]]:
        for positions in self.batches:
            self.asked.append(positions)
            yield positions

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


class CountedBatch(Protocol):
    """A batch that says what it could not read."""

    bad: list[str]


BatchT = TypeVar("BatchT", bound=CountedBatch)


def single_thread_worker(worker_id: int) -> None:
    """One thread per worker: the workers are the parallelism, and OpenCV's own threads would fight over the cores."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    outlast_stop_signals(worker_id)


def make_loader(dataset: Dataset[Any], batches: Any, *, num_workers: int) -> DataLoader[Any]:
    """A loader of whole batches, which the data set makes itself, read ahead by `num_workers` processes.

    Args:
        batches: batch sampler.
    """
    workers: dict[str, Any] = {}
    if num_workers:
        end_opencv_threads()
        workers = {"worker_init_fn": single_thread_worker, "prefetch_factor": 4}
    return PositionedLoader(
        dataset,
        batch_sampler=_Remembering(batches),  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # a generator of its own: else every loader takes a number from torch's global one, and a resumed run, which
        # makes its loaders anew, would not end in the same bits
        generator=torch.Generator(),
        **workers,
    )


def counted(batches: Iterator[BatchT], training: Training, *, start: int, max_fraction: float) -> Iterator[BatchT]:
    """Count bad samples over all ranks as the batches go by, so that all ranks stop together.

    The count lives in the checkpoint's `extra`, so it survives a resume.

    Raises:
        InputError: more than `max_fraction` of the samples read since the run began were bad, and more than one; with 0
            at the first. The metrics then end in a line with the count.
    """
    extra = training.extra
    extra.setdefault("num_bad", 0)
    for step, batch in enumerate(batches, start=start):
        training.at("step")  # from here on this rank waits for the others, not for its data
        if training.ranks.any(bool(batch.bad)):
            reasons = [reason for part in training.ranks.gather(batch.bad) for reason in part]
            for reason in reasons:
                training.report(f"bad sample at step {step + 1}: {reason}")
            extra["num_bad"] += len(reasons)
            num_read = (step + 1) * training.batch_size
            if extra["num_bad"] > (max(1, max_fraction * num_read) if max_fraction else 0):
                if training.tracker is not None:
                    training.tracker.log({"data/num_bad": extra["num_bad"]}, step=step + 1)
                raise InputError(
                    f"{extra['num_bad']} of {num_read} samples could not be read (data.max_bad_fraction "
                    f"{max_fraction}); the last: {reasons[-1]}; run shards/verify.py on the shards"
                )
        yield batch


def _name_samples(positions: list[Any], key_of: Callable[[Any], str] | None) -> SampleNote:
    """Positions, and keys where there are any; None for one that cannot be found out."""
    note: SampleNote = {"positions": positions}
    if key_of is not None:
        note["keys"] = [_key(key_of, position) for position in positions]
    return note


def _key(key_of: Callable[[Any], str], position: Any) -> str | None:
    try:
        return key_of(position)
    except (ValueError, OSError, Fault):
        return None


def _as_it_is(batch: Any) -> Any:
    return batch
