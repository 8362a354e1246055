"""What a frozen encoder computes for a whole set of images: each image once over all ranks, kept on disk as it goes.

The set is cut into parts of fixed size, whatever the number of ranks; a rank takes every world-size-th part. Batches
never cross parts, so an image's numbers do not depend on who computed them.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from engine.errors import InputError
from engine.progress import ProgressBar
from pretrain.evaluators.base import Subject
from pretrain.evaluators.cache import Outputs
from pretrain.evaluators.prepare import CentreCrop, Prepare, RandomView
from pretrain.evaluators.reading import Ahead, Compute, Job, Part, Plan, Read, to_inputs
from pretrain.evaluators.sources import ImageSource
from pretrain.probe_config import ProbeConfig

PART = 1024  # images; also how much a kill can cost


def collect(subject: Subject, probe: ProbeConfig, job: Job) -> Outputs:
    """Compute `job` over its whole source; the outputs, and `labels`, of every image in order, on CPU.

    Parts found in the cache are not computed again, so a killed evaluation goes on where it was; a damaged part is
    reported and computed anew.

    Returns:
        Name to `(num_images, ...)`, the same on every rank; `labels` int64 holds `UNREADABLE` where an image could not
        be read.
    """
    (outputs,) = collect_each(subject, probe, [job])
    return outputs


def collect_each(subject: Subject, probe: ProbeConfig, jobs: Iterable[Job]) -> Iterator[Outputs]:
    """As `collect`, for one job after another; the reading processes are started once and run ahead across jobs.

    Args:
        jobs: taken as the reading gets to them; every rank gives the same.
    """
    with closing(Ahead(subject, probe, jobs, part=PART)) as ahead:
        for plan in ahead.plans():
            yield _collect(subject, probe, plan, ahead)


def _collect(subject: Subject, probe: ProbeConfig, plan: Plan, ahead: Ahead) -> Outputs:
    count, ranks, parts = len(plan.job.source), subject.ranks, plan.parts
    whole: Outputs = {}
    with open_bar(count, plan.job.title, shown=_is_long(subject, plan)) as bar:
        for turn in range(0, len(parts), ranks.world_size):
            here = parts[turn + ranks.rank] if turn + ranks.rank < len(parts) else None
            outputs = None if here is None else _part_outputs(subject, probe, plan, here, ahead)
            for part, values in zip(parts[turn:], ranks.gather(outputs), strict=False):
                _put(whole, part, values, count=count)
                bar.update(part[1] - part[0])
    return whole


def _is_long(subject: Subject, plan: Plan) -> bool:
    return subject.ranks.is_main and bool(plan.ordered) and len(plan.parts) > 1


def _part_outputs(subject: Subject, probe: ProbeConfig, plan: Plan, part: Part, ahead: Ahead) -> Outputs:
    """A part's outputs, from the cache where they are there and whole."""
    found = None if part in plan.ordered else plan.outputs.load(part)
    if found is None:
        found = _compute(subject, plan.job.compute, ahead.read(plan, part), size=probe.batch_size)
        plan.outputs.store(part, found)
    return found


def _put(whole: Outputs, part: Part, values: Outputs, *, count: int) -> None:
    for name, value in values.items():
        if name not in whole:
            whole[name] = torch.empty((count, *value.shape[1:]), dtype=value.dtype)
        whole[name][part[0] : part[1]] = value


def _compute(subject: Subject, compute: Compute, pieces: Iterator[Read], *, size: int) -> Outputs:
    """Outputs and labels of one part; what is computed stays on the device until the part is done.

    So the device is waited for once a part, and the next images are brought while it computes.
    """
    labels: list[Tensor] = []
    chunks: list[Outputs] = []
    for pixels in _batches(subject, pieces, labels, size=size):
        with torch.no_grad():
            found = compute(to_inputs(pixels, subject))
            chunks.append({name: value.detach().float() for name, value in found.items()})
    outputs = {name: torch.cat([chunk[name] for chunk in chunks]).cpu() for name in chunks[0]}
    return outputs | {"labels": torch.cat(labels)}


def _batches(subject: Subject, pieces: Iterator[Read], labels: list[Tensor], *, size: int) -> Iterator[Tensor]:
    """Pixels on the device, `size` images at a time (the last batch smaller); their labels go to `labels`."""
    waiting: list[Tensor] = []
    for pixels, answers in pieces:
        labels.append(answers)
        waiting.append(pixels.to(subject.device, non_blocking=True))
        while sum(map(len, waiting)) >= size:
            together = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            yield together[:size]
            waiting = [together[size:]] if len(together) > size else []
    if waiting:
        yield torch.cat(waiting)


class NoBar:
    """Stands in for the progress bar on the other ranks and for small sets."""

    def __enter__(self) -> "NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, n: int = 1, **fields: object) -> None:
        """Count nothing."""


def open_bar(total: int, label: str, *, shown: bool) -> ProgressBar | NoBar:
    """A progress bar, or what stands in for one that is not shown."""
    return ProgressBar(total, label) if shown else NoBar()


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
        float32 `(num_samples, num_features)` and int64 `(num_samples,)`, on CPU, the same on every rank; not to be
        changed in place, as other evaluators may be given the same tensors.

    Raises:
        InputError: no labelled image could be read.
    """
    prepare = prepare or CentreCrop(subject.image_size, probe.crop)
    shared = {} if subject.shared is None else subject.shared
    key = (subject.hash, subject.statistics, source.digest, prepare.key)
    if key not in shared:
        (shared[key],) = pooled_each(subject, probe, [(source, prepare)], title=title)
    return shared[key]


def pooled_each(
    subject: Subject, probe: ProbeConfig, sets: Iterable[tuple[ImageSource, Prepare]], *, title: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `pooled_features`, for one set after another, read by the same processes.

    Raises:
        InputError: a set of which no labelled image could be read.
    """
    sources: deque[ImageSource] = deque()

    def jobs() -> Iterator[Job]:
        for source, prepare in sets:
            sources.append(source)
            yield Job(source, prepare, pooled(subject), "pooled", title or f"features of {source.name}")

    for outputs in collect_each(subject, probe, jobs()):
        yield _labelled(outputs, sources.popleft(), subject)


def _labelled(outputs: Outputs, source: ImageSource, subject: Subject) -> tuple[Tensor, Tensor]:
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
    # shared views would fill the memory: no other evaluator takes them
    subject = replace(subject, cache=subject.cache if probe.linear.cache_views else None, shared=None)
    return pooled_features(subject, probe, source, prepare=prepare, title=f"view {number + 1} of {count}")[0]
