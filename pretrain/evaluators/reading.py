"""Images on their way to a frozen encoder: planned and read ahead, across jobs, by one set of processes.

A loader that is made anew for each of ImageNet-C's 75 conditions would start its processes 75 times and leave the
encoder waiting each time. Here the loader's batches are orders, written as it asks for them, so it goes from one job to
the next while the encoder is still at the first.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.loading import make_loader
from pretrain.evaluators.base import Statistics, Subject
from pretrain.evaluators.cache import Outputs, PartCache, key_digest
from pretrain.evaluators.prepare import Corrupted, Prepare, RandomView
from pretrain.evaluators.sources import ImageSource
from pretrain.probe_config import ProbeConfig

READ_AHEAD = 64  # images that a loader process hands over at a time
UNREADABLE = -2
Compute = Callable[[Tensor], Outputs]
Part = tuple[int, int]
Read = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Job:
    """What is computed of which images.

    Attributes:
        compute: normalised images `(batch, 3, size, size)` to named tensors `(batch, ...)`.
        key: all that decides `compute` besides the encoder's weights.
        title: for the progress bar.
    """

    source: ImageSource
    prepare: Prepare
    compute: Compute
    key: str
    title: str


@dataclass(frozen=True)
class Order:
    """Images that a loader process is asked for; `source` and `prepare` None: those that it was started with."""

    numbers: list[int]
    prepare: Prepare | None = None
    source: ImageSource | None = None


class Prepared(Dataset[Read]):
    """Answers orders with what `read_images` returns."""

    def __init__(self, source: ImageSource, prepare: Prepare, *, size: int) -> None:
        self.source, self.prepare, self.size = source, prepare, size

    def __getitems__(self, order: Order) -> Read:
        """Read one batch."""
        source = self.source if order.source is None else order.source
        prepare = self.prepare if order.prepare is None else order.prepare
        return read_images(source, prepare, order.numbers, size=self.size)


def read_images(source: ImageSource, prepare: Prepare, numbers: list[int], *, size: int) -> Read:
    """Images as uint8 `(batch, size, size, 3)` and labels; one that cannot be read has label `UNREADABLE`."""
    pixels = np.zeros((len(numbers), size, size, 3), dtype=np.uint8)
    labels = np.full(len(numbers), UNREADABLE, dtype=np.int64)
    found: list[tuple[int, np.ndarray]] = []
    for i, number in enumerate(numbers):
        try:
            image, label = source.read(number)
            if isinstance(prepare, RandomView):
                found.append((i, image))
            else:
                pixels[i] = prepare(image, number)
            labels[i] = label
        except ValueError:
            continue
    if found and isinstance(prepare, RandomView):
        views = prepare.each([image for _, image in found], [numbers[i] for i, _ in found])
        for (i, _), view in zip(found, views, strict=True):
            pixels[i] = view
    return torch.from_numpy(pixels), torch.from_numpy(labels)


@dataclass(frozen=True)
class Plan:
    """A job, and what of it is left to do.

    Attributes:
        parts: all of the job, as first and one past the last image.
        ordered: those of this rank's parts that the loader reads.
        outputs, pixels: what is kept of it; `pixels` of corrupted images where that is asked for.
    """

    job: Job
    parts: list[Part]
    ordered: list[Part]
    outputs: PartCache
    pixels: PartCache


class Ahead:
    """Plans jobs when the loader or the encoder first gets to them, and reads all of them with one loader.

    Args:
        jobs: taken one by one as they are needed.
        part: images in a part.
    """

    def __init__(self, subject: Subject, probe: ProbeConfig, jobs: Iterable[Job], *, part: int) -> None:
        self.subject, self.probe, self.part = subject, probe, part
        self.piece = min(probe.batch_size, READ_AHEAD, part)
        self._jobs = iter(jobs)
        self._to_compute: deque[Plan] = deque()
        self._to_read: deque[Plan] = deque()
        self._started_with: Job | None = None
        self._loader: Iterator[Read] | None = None

    def plans(self) -> Iterator[Plan]:
        """The jobs in order."""
        while self._to_compute or self._plan():
            yield self._to_compute.popleft()

    def read(self, plan: Plan, part: Part) -> Iterator[Read]:
        """Pixels and labels of a part, piece by piece: from the loader, the image cache, or read here and now.

        Every ordered part has to be read, each plan's in their order.
        """
        if part in plan.ordered:
            loader = self._loader = self._loader or self._start()
            pieces = (next(loader) for _ in range(part[0], part[1], self.piece))
        else:
            found = plan.pixels.load(part)
            if found is not None:
                yield found["pixels"], found["labels"]
                return
            # a damaged part was not ordered
            pieces = (self._here(plan.job, start, part[1]) for start in range(part[0], part[1], self.piece))
        if plan.pixels.folder is None:
            yield from pieces
            return
        kept = list(pieces)
        pixels, labels = torch.cat([one for one, _ in kept]), torch.cat([each for _, each in kept])
        plan.pixels.store(part, {"pixels": pixels, "labels": labels})
        yield pixels, labels

    def close(self) -> None:
        """End the loader's processes."""
        self._loader = None

    def _plan(self) -> bool:
        """Take up the next job; False when there is none."""
        job = next(self._jobs, None)
        if job is None:
            return False
        subject = self.subject
        report = subject.report
        outputs = PartCache(subject.cache, cache_key(subject, job), report=report)
        keep = self.probe.corruptions.cache_images and isinstance(job.prepare, Corrupted)
        key = {"data": job.source.digest, "prepare": job.prepare.key}
        pixels = PartCache(subject.cache if keep else None, key, report=report)
        count, ranks = len(job.source), subject.ranks
        parts = [(start, min(start + self.part, count)) for start in range(0, count, self.part)]
        mine = parts[ranks.rank :: ranks.world_size]
        plan = Plan(job, parts, [p for p in mine if not outputs.holds(p) and not pixels.holds(p)], outputs, pixels)
        self._to_compute.append(plan)
        self._to_read.append(plan)
        return True

    def _start(self) -> Iterator[Read]:
        """The loader, with no more processes than there is to read."""
        wanted = self.probe.num_workers
        while self._num_pieces() < wanted and self._plan():
            pass
        first = next(plan.job for plan in self._to_read if plan.ordered)
        self._started_with = first
        dataset = Prepared(first.source, first.prepare, size=self.subject.image_size)
        return iter(make_loader(dataset, self._orders(), num_workers=min(wanted, self._num_pieces())))

    def _num_pieces(self) -> int:
        return sum(-(-(stop - start) // self.piece) for plan in self._to_read for start, stop in plan.ordered)

    def _orders(self) -> Iterator[Order]:
        first = self._started_with
        assert first is not None
        while self._to_read or self._plan():
            plan = self._to_read.popleft()
            source, prepare = plan.job.source, None if plan.job is first else plan.job.prepare
            for start, stop in plan.ordered:
                for begin in range(start, stop, self.piece):
                    numbers = list(range(begin, min(begin + self.piece, stop)))
                    yield Order(numbers, prepare, None if source is first.source else source.part(numbers))

    def _here(self, job: Job, start: int, stop: int) -> Read:
        numbers = list(range(start, min(start + self.piece, stop)))
        return read_images(job.source, job.prepare, numbers, size=self.subject.image_size)


def to_inputs(pixels: Tensor, subject: Subject) -> Tensor:
    """Uint8 `(batch, size, size, 3)` to the encoder's normalised input `(batch, 3, size, size)`, on its device."""
    scale, shift = _on_device(subject.statistics, subject.device)
    images = pixels.to(subject.device, non_blocking=True).permute(0, 3, 1, 2).float()
    return images.mul_(scale).add_(shift)  # in place: this is the main process's only work beside the encoder


@lru_cache(maxsize=8)
def _on_device(statistics: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """What levels of 0 to 255 are multiplied by and what is added; with every batch it would wait for the device."""
    mean, std = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in statistics)
    scale, shift = (each.to(device, torch.float32) for each in (1 / (255 * std), -mean / std))
    return scale, shift


def cache_key(subject: Subject, job: Job) -> dict[str, object]:
    """All that decides a job's outputs."""
    return {
        "encoder": subject.hash,
        "data": job.source.digest,
        "prepare": job.prepare.key,
        "compute": job.key,
        "statistics": key_digest(subject.statistics),
    }
