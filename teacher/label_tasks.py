"""What programs that write label sets share: an array task's part of the shards, whole shards or none, the seal."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from engine.array_task import array_task
from engine.errors import InputError
from engine.progress import ProgressBar, report
from shards.controls import CONTROLS, write_control
from shards.labels import MAP, labels_complete, seal_labels, write_label_shard
from shards.packing import available_cores
from shards.reader import ShardSet

NUM_NAMED = 20
PENDING_SHARDS = 4
# One thread compresses several thousand maps a second; more than a few wait for Python's lock.
MAX_ENCODERS = 4

PredictionT = TypeVar("PredictionT")
Labels = list[tuple[str, bytes]]


class LabelOptions(Protocol):
    """Options that all programs which write label sets share."""

    shards: Path
    first_shard: int
    num_shards: int | None
    output: Path
    task: int | None
    num_tasks: int | None
    controls: str
    control_seed: int


class LoadedImages(Protocol):
    """Images of one shard as a loader brings them; see `ImageBatch`."""

    images: Any
    keys: list[str | None]
    shard: int
    last: bool
    failed: list[str]


def write_set(
    config: LabelOptions,
    images: ShardSet,
    directory: Path,
    *,
    task: Sequence[int],
    write: Callable[[Sequence[int]], list[str]],
    teacher: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Write what is missing of this task's shards; when all shards of the set are there, seal it and write controls.

    Args:
        write: labels the given shards, and returns a line for every image that is left without a label.
        teacher, settings: what the manifest says about the labels.

    Raises:
        InputError: what `write` refuses, and unusable files in the way.
    """
    todo = [shard for shard in task if not labels_complete(directory, images, shard)]
    if todo:
        failed = write(todo)
        for line in failed[:NUM_NAMED]:
            report(f"no label: {line}")
        report(f"{directory}: {len(todo)} shards labelled, {len(failed)} images without a label")
    else:
        report(f"{directory}: all {len(task)} shards of this task were there already")
    count = images.manifest.num_shards
    missing = sum(not labels_complete(directory, images, shard) for shard in range(count))
    if missing:
        report(f"{directory}: {missing} of {count} shards are still to come from other tasks")
        return
    seal_labels(directory, images, teacher=teacher, settings=settings)
    report(f"{directory}: sealed, {images.num_samples} images in {count} shards")
    for kind in parse_controls(config.controls):
        path, _ = write_control(kind, images, directory, config.output, seed=config.control_seed)
        report(f"{path}: control {kind} written")


def parse_controls(text: str) -> list[str]:
    """Names from a comma-separated list.

    Raises:
        InputError: a control that does not exist.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CONTROLS:
            raise InputError(f"controls: unknown control '{name}': known are {', '.join(CONTROLS)}")
    return names


def shards_of_task(config: LabelOptions, images: ShardSet) -> range:
    """This process's shards: its rank's part of its task's part of the range.

    Raises:
        InputError: the range or the task lies outside the set or the tasks.
    """
    total, first = images.manifest.num_shards, config.first_shard
    stop = total if config.num_shards is None else first + config.num_shards
    if first >= total or stop > total:
        raise InputError(
            f"first_shard {first}, num_shards {config.num_shards}: {config.shards} has shards 0 to {total - 1}"
        )
    task, num_tasks = array_task(config.task, config.num_tasks)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    part, num_parts = task * world_size + rank, num_tasks * world_size
    bounds = [first + i * (stop - first) // num_parts for i in (part, part + 1)]
    return range(*bounds)


class ShardBatches:
    """Batch sampler over shards. The batches of a shard depend on nothing but the shard and the batch size, because a
    forward's last bits may depend on what else is in its batch. Shards that others have written by now are left out."""

    def __init__(self, shards: Sequence[int], images: ShardSet, directory: Path, *, batch_size: int) -> None:
        self.shards, self.images, self.directory, self.batch_size = shards, images, directory, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for shard in self.shards:
            if labels_complete(self.directory, self.images, shard):
                continue
            size = int(self.images.shard_sizes[shard])
            for start in range(0, size, self.batch_size):
                yield [(shard, row) for row in range(start, min(start + self.batch_size, size))]


def default_encoders() -> int:
    """Encoding threads: half of this rank's cores, as the other half reads, and at least 1."""
    cores = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_ENCODERS, cores // 2))


class LabelWriter(Generic[PredictionT]):
    """Takes images as a loader brings them and predicts in this thread; encodes whole batches in a few others, and
    writes whole shards in one more. What is written does not depend on which batch is encoded first.

    Args:
        encode: keys of a batch (None where unreadable) and its prediction to key and stored bytes; called in several
            threads at once, so it may wait for a device that has not finished the batch.
        member: extension of what is written.
        num_encoders: encoding threads; None chooses by the cores.
    """

    def __init__(
        self,
        images: ShardSet,
        directory: Path,
        *,
        encode: Callable[[list[str | None], PredictionT], Iterable[tuple[str, bytes]]],
        member: str = MAP,
        num_encoders: int | None = None,
    ) -> None:
        self.images, self.directory, self.encode, self.member = images, directory, encode, member
        self.num_encoders = num_encoders or default_encoders()

    @property
    def max_batches(self) -> int:
        """Batches that are predicted and not encoded yet, at most; the device goes on while they wait."""
        return 2 * self.num_encoders + 1

    def write(
        self, shards: Sequence[int], loader: Iterable[LoadedImages], predict: Callable[[Any], PredictionT]
    ) -> list[str]:
        """Label these shards. Returns key and reason of every image left without a label.

        Raises:
            Exception: what predicting, encoding or writing raised; a shard with an error is not written, those that
                were predicted whole before it are.
        """
        total = int(sum(self.images.shard_sizes[shard] for shard in shards))
        failed: list[str] = []
        encoding: deque[Future[Labels]] = deque()
        writing: deque[Future[None]] = deque()
        done: list[Future[Labels]] = []
        # the writer ends first: its shards wait for their encoders
        with (
            ThreadPoolExecutor(self.num_encoders) as encoders,
            ThreadPoolExecutor(1) as writer,
            ProgressBar(total, "labelling") as bar,
        ):
            for batch in loader:
                done.append(encoders.submit(self._encode, batch.keys, predict(batch.images)))
                failed += batch.failed
                encoding.append(done[-1])
                if batch.last:
                    writing.append(writer.submit(self._write, batch.shard, done))
                    done = []
                _drain(encoding, self.max_batches - 1)
                _drain(writing, PENDING_SHARDS)
                bar.update(len(batch.keys), failed=len(failed))
            _drain(writing, 0)
        for shard in shards:
            if self.images.shard_sizes[shard] == 0:
                write_label_shard(self.directory, self.images, shard, [], member=self.member)
        return failed

    def _encode(self, keys: list[str | None], prediction: PredictionT) -> Labels:
        return list(self.encode(keys, prediction))

    def _write(self, shard: int, done: list[Future[Labels]]) -> None:
        if labels_complete(self.directory, self.images, shard):
            return  # another task was faster
        encoded = (label for batch in done for label in batch.result())
        write_label_shard(self.directory, self.images, shard, encoded, member=self.member)


def _drain(futures: deque[Future[Any]], limit: int) -> None:
    """Wait for the oldest until at most `limit` are left; what one of them raised is raised here."""
    while len(futures) > limit:
        futures.popleft().result()
