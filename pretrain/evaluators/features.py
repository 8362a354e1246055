"""What a frozen encoder computes for a whole set of images: each image once over all ranks, kept on disk as it goes.

The set is cut into parts of fixed size, whatever the number of ranks; a rank takes every world-size-th part. Batches
never cross parts, so an image's numbers do not depend on who computed them.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.errors import InputError
from engine.loading import make_loader
from engine.progress import ProgressBar
from pretrain.augment import normalize
from pretrain.evaluators.base import Subject
from pretrain.evaluators.cache import PartCache, key_digest
from pretrain.evaluators.prepare import CentreCrop, Corrupted, Prepare, RandomView
from pretrain.evaluators.sources import ImageSource
from pretrain.probe_config import ProbeConfig

PART = 1024  # images; also how much a kill can cost
READ_AHEAD = 64  # images that a loader process hands over at a time
UNREADABLE = -2
Outputs = dict[str, Tensor]
Compute = Callable[[Tensor], Outputs]


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


class Prepared(Dataset[tuple[Tensor, Tensor]]):
    """Images as uint8 `(batch, size, size, 3)` and labels; one that cannot be read has label `UNREADABLE`."""

    def __init__(self, source: ImageSource, prepare: Prepare, *, size: int) -> None:
        self.source, self.prepare, self.size = source, prepare, size

    def __getitem__(self, part: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Images `part[0]` to `part[1] - 1`."""
        return self.__getitems__(list(range(*part)))

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Read one batch."""
        images = np.zeros((len(numbers), self.size, self.size, 3), dtype=np.uint8)
        labels = np.full(len(numbers), UNREADABLE, dtype=np.int64)
        for i, number in enumerate(numbers):
            try:
                image, label = self.source.read(number)
                images[i], labels[i] = self.prepare(image, number), label
            except ValueError:
                continue
        return torch.from_numpy(images), torch.from_numpy(labels)


def collect(subject: Subject, probe: ProbeConfig, job: Job) -> Outputs:
    """Compute `job` over its whole source; the outputs, and `labels`, of every image in order, on CPU.

    Parts found in the cache are not computed again, so a killed evaluation goes on where it was; a damaged part is
    reported and computed anew.

    Returns:
        Name to `(num_images, ...)`, the same on every rank; `labels` int64 holds `UNREADABLE` where an image could not
        be read.
    """
    cache = PartCache(subject.cache, _cache_key(subject, job), report=subject.report)
    count, ranks = len(job.source), subject.ranks
    parts = [(start, min(start + PART, count)) for start in range(0, count, PART)]
    mine = parts[ranks.rank :: ranks.world_size]
    found = {part[0]: stored for part in mine if (stored := cache.load(part)) is not None}
    missing = [part for part in mine if part[0] not in found]
    show = ranks.is_main and bool(missing) and count > PART
    whole: Outputs = {}
    with (
        ProgressBar(count, job.title) if show else _NoBar() as bar,
        closing(_compute_parts(subject, probe, job, missing)) as computed,
    ):
        for turn in range(0, len(parts), ranks.world_size):
            here = parts[turn + ranks.rank] if turn + ranks.rank < len(parts) else None
            outputs: Outputs | None = None
            if here is not None:
                outputs = found.pop(here[0], None)
                if outputs is None:
                    outputs = next(computed)
                    cache.store(here, outputs)
            for part, values in zip(parts[turn:], ranks.gather(outputs), strict=False):
                _put(whole, part, values, count=count)
                bar.update(part[1] - part[0])
    return whole


def _put(whole: Outputs, part: tuple[int, int], values: Outputs, *, count: int) -> None:
    for name, value in values.items():
        if name not in whole:
            whole[name] = torch.empty((count, *value.shape[1:]), dtype=value.dtype)
        whole[name][part[0] : part[1]] = value


def _compute_parts(
    subject: Subject, probe: ProbeConfig, job: Job, parts: list[tuple[int, int]]
) -> Generator[Outputs, None, None]:
    size = probe.batch_size
    with closing(_part_pixels(subject, probe, job, parts)) as read:
        for pixels, labels in read:
            chunks = [_forward(subject, job, pixels[i : i + size]) for i in range(0, len(pixels), size)]
            yield {name: torch.cat([one[name] for one in chunks]) for name in chunks[0]} | {"labels": labels}


def _forward(subject: Subject, job: Job, pixels: Tensor) -> Outputs:
    mean, std = subject.statistics
    images = pixels.to(subject.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        outputs = job.compute(normalize(images, mean=mean, std=std))
    return {name: value.float().cpu() for name, value in outputs.items()}


def _part_pixels(
    subject: Subject, probe: ProbeConfig, job: Job, parts: list[tuple[int, int]]
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Input pixels and labels of each part; corrupted ones from the image cache where that is asked for."""
    keep = probe.corruptions.cache_images and isinstance(job.prepare, Corrupted)
    key = {"data": job.source.digest, "prepare": job.prepare.key}
    cache = PartCache(subject.cache if keep else None, key, report=subject.report)
    dataset = Prepared(job.source, job.prepare, size=subject.image_size)
    held = {part for part in parts if cache.holds(part)}
    with closing(_read_parts(dataset, [part for part in parts if part not in held], probe)) as read:
        for part in parts:
            found = cache.load(part) if part in held else None
            if found is not None:
                yield found["pixels"], found["labels"]
                continue
            if part in held:  # damaged: read outside the loader's order
                pixels, labels = dataset[part]
            else:
                pixels, labels = next(read)
            cache.store(part, {"pixels": pixels, "labels": labels})
            yield pixels, labels


def _read_parts(
    dataset: Prepared, parts: list[tuple[int, int]], probe: ProbeConfig
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Pixels and labels of whole parts, read ahead in batches by one loader for all of them."""
    if not parts:
        return
    if isinstance(dataset.prepare, Corrupted):
        dataset.prepare.warm_up()
    size = min(probe.batch_size, READ_AHEAD)
    batches = [list(range(i, min(i + size, stop))) for start, stop in parts for i in range(start, stop, size)]
    loader = iter(make_loader(dataset, batches, num_workers=min(probe.num_workers, len(batches))))
    for number, (start, stop) in enumerate(parts, start=1):
        batch = [next(loader) for _ in range(start, stop, size)]
        if number == len(parts):
            next(loader, None)  # at its end the loader ends its processes
        yield torch.cat([pixels for pixels, _ in batch]), torch.cat([labels for _, labels in batch])


def _cache_key(subject: Subject, job: Job) -> dict[str, Any]:
    return {
        "encoder": subject.hash,
        "data": job.source.digest,
        "prepare": job.prepare.key,
        "compute": job.key,
        "statistics": key_digest(subject.statistics),
    }


class _NoBar:
    """Stands in for the progress bar on the other ranks and for small sets."""

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        """Count nothing."""


def pooled(subject: Subject) -> Compute:
    """Computes the pooled features, `features` `(batch, num_features)`."""

    def compute(images: Tensor) -> Outputs:
        final = subject.backbone.forward_features(images)
        return {"features": subject.backbone.forward_head(final, pre_logits=True)}

    return compute


def pooled_features(
    subject: Subject, probe: ProbeConfig, source: ImageSource, *, prepare: Prepare | None = None, title: str = ""
) -> tuple[Tensor, Tensor]:
    """Pooled features of every readable labelled image.

    Args:
        prepare: how images become inputs; None takes the probe's centre crop.

    Returns:
        float32 `(num_samples, num_features)` and int64 `(num_samples,)`, on CPU, the same on every rank.

    Raises:
        InputError: no labelled image could be read.
    """
    prepare = prepare or CentreCrop(subject.image_size, probe.crop)
    job = Job(source, prepare, pooled(subject), "pooled", title or f"features of {source.name}")
    outputs = collect(subject, probe, job)
    keep = outputs["labels"] >= 0
    if not keep.any():
        raise InputError(f"{source.name}: no labelled sample can be read; a probe needs images with classes")
    if not keep.all():
        lost = int((~keep).sum())
        subject.report(f"{source.name}: {lost} of {len(keep)} samples unreadable or unlabelled, left out")
    return outputs["features"][keep], outputs["labels"][keep]


def view_features(subject: Subject, probe: ProbeConfig, source: ImageSource, *, number: int, count: int) -> Tensor:
    """Pooled features of random view `number` of `count` of every readable labelled image.

    Returns:
        float32 `(num_samples, num_features)`, the images as `pooled_features` gives them.
    """
    prepare = RandomView(subject.image_size, probe.seed, number)
    subject = subject if probe.linear.cache_views else replace(subject, cache=None)
    return pooled_features(subject, probe, source, prepare=prepare, title=f"view {number + 1} of {count}")[0]
