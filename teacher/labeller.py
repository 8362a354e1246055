"""The work of `teacher/label.py`: read, predict and write overlap; a shard is written whole or not at all."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.array_task import array_task
from engine.environment import environment
from engine.errors import InputError
from engine.files import atomic_write
from engine.loading import make_loader
from engine.progress import ProgressBar, report
from shards.controls import CONTROLS, write_control
from shards.decode import image_size
from shards.gaze import resize_density
from shards.labels import encode_label, label_directory, labels_complete, seal_labels, write_label_shard
from shards.reader import BadSample, ShardSet
from teacher.data import load_image
from teacher.label_config import LabelConfig
from teacher.saved import SavedTeacher, load_teacher

SETTINGS = ".settings.json"
NUM_NAMED = 20
PENDING_SHARDS = 4


def label(config: LabelConfig) -> Path:
    """Label this task's shards, and seal the set when all are there.

    Returns:
        The folder of the label set.

    Raises:
        InputError: no teacher or another one, no images, a range outside the set, or a folder with other labels.
    """
    controls = parse_controls(config.controls)
    teacher = load_teacher(config.run, expected=config.hash)
    images = ShardSet(config.shards)
    task = shards_of_task(config, images)
    directory = label_directory(config.output, teacher.hash)
    claim_directory(directory, config, images)
    todo = [shard for shard in task if not labels_complete(directory, images, shard)]
    if todo:
        failed = Labeller(config, teacher, images, directory).run(todo)
        for line in failed[:NUM_NAMED]:
            report(f"no label: {line}")
        report(f"{directory}: {len(todo)} shards labelled, {len(failed)} images without a label")
    else:
        report(f"{directory}: all {len(task)} shards of this task were there already")
    count = images.manifest.num_shards
    missing = sum(not labels_complete(directory, images, shard) for shard in range(count))
    if missing:
        report(f"{directory}: {missing} of {count} shards are still to come from other tasks")
        return directory
    seal_labels(directory, images, teacher=describe(teacher), settings={"size": list(config.map_size)})
    report(f"{directory}: sealed, {images.num_samples} images in {count} shards")
    for kind in controls:
        path, _ = write_control(kind, images, directory, config.output, seed=config.control_seed)
        report(f"{path}: control {kind} written")
    return directory


def check(config: LabelConfig) -> list[str]:
    """Teacher, images and this task's range, without writing anything."""
    parse_controls(config.controls)
    teacher = load_teacher(config.run, expected=config.hash)
    images = ShardSet(config.shards)
    task = shards_of_task(config, images)
    directory = label_directory(config.output, teacher.hash)
    done = sum(labels_complete(directory, images, shard) for shard in task)
    return [
        f"teacher: {config.run}, {teacher.facts['model']['backbone']}, hash {teacher.hash[:16]}",
        f"images: {config.shards}, {images.num_samples} in {images.manifest.num_shards} shards",
        f"task: {len(task)} shards, {done} of them labelled already, into {directory}",
    ]


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


def shards_of_task(config: LabelConfig, images: ShardSet) -> range:
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


def claim_directory(directory: Path, config: LabelConfig, images: ShardSet) -> None:
    """Create the label folder for these images and settings, or check that it was created for the same.

    Raises:
        InputError: it holds this teacher's labels of other images or of another size.
    """
    settings = {"images": images.manifest.digest, "size": list(config.map_size)}
    path = directory / SETTINGS
    directory.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        # two tasks may both come here; they write the same bytes, or the check below tells the second
        atomic_write(path, (json.dumps(settings) + "\n").encode())
    found = json.loads(path.read_text())
    if found != settings:
        what = "images" if found.get("images") != settings["images"] else "size"
        raise InputError(
            f"{directory} holds this teacher's labels of other {what} ({str(found.get(what))[:12]}, now "
            f"{str(settings[what])[:12]}): give another --output"
        )


def describe(teacher: SavedTeacher) -> dict[str, Any]:
    """What the label manifest says about its teacher. Nothing of it depends on the clock, the machine or the task."""
    software = environment()
    return {
        "hash": teacher.hash,
        "backbone": teacher.facts["model"]["backbone"],
        "image_size": teacher.facts["image_size"],
        "step": teacher.facts["step"],
        "data": teacher.facts["data"],
        # a teacher of an earlier version does not say
        **({"sources": teacher.facts["sources"]} if "sources" in teacher.facts else {}),
        "gaze": teacher.facts["gaze"],
        "metrics": teacher.facts["metrics"],
        "software": {name: software[name] for name in ("python", "torch", "timm", "numpy")},
    }


@dataclass
class ImageBatch:
    """Images of one shard.

    Attributes:
        images: uint8 `(batch, height, width, 3)`; zeros where unreadable.
        keys: key of each image, None where it is unreadable.
        shard: the shard's number.
        last: whether the shard ends here.
        failed: key and reason of each unreadable image.
    """

    images: Tensor
    keys: list[str | None]
    shard: int
    last: bool
    failed: list[str]

    def pin_memory(self) -> "ImageBatch":
        """The batch in page-locked memory; the loader calls it where there is a GPU."""
        return ImageBatch(self.images.pin_memory(), self.keys, self.shard, self.last, self.failed)


class ImageDataset(Dataset[ImageBatch]):
    """Reads and decodes a batch of one shard per call: a list of (shard, row)."""

    def __init__(self, shards: ShardSet, *, size: tuple[int, int]) -> None:
        self.shards, self.size = shards, size

    def __getitem__(self, position: tuple[int, int]) -> ImageBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> ImageBatch:
        """Read one batch; unreadable images are named, not replaced."""
        images = np.zeros((len(positions), *self.size, 3), dtype=np.uint8)
        keys: list[str | None] = [None] * len(positions)
        failed = []
        for i, (shard, row) in enumerate(positions):
            try:
                sample = self.shards.read(shard, row)
            except BadSample as error:
                failed.append(str(error))
                continue
            try:
                images[i] = load_image(sample.image, None, stored=image_size(sample.image), size=self.size)
                keys[i] = sample.key
            except ValueError as error:
                failed.append(f"{self.shards.manifest.files[shard]}: sample {sample.key[:80]!r}: {error}")
        shard, row = positions[-1]
        last = row + 1 == int(self.shards.shard_sizes[shard])
        return ImageBatch(torch.from_numpy(images), keys, shard, last, failed)


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


class Labeller:
    """Predicts in this thread; encodes and writes in another, while the loader's processes read on."""

    def __init__(self, config: LabelConfig, teacher: SavedTeacher, images: ShardSet, directory: Path) -> None:
        self.config, self.images, self.directory = config, images, directory
        local_rank = os.environ.get("LOCAL_RANK", "0")
        self.device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
        self.model = teacher.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # the same labels from every task: no kernel is chosen by timing
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True

    def run(self, shards: Sequence[int]) -> list[str]:
        """Label these shards. Returns key and reason of every image left without a label."""
        batches = ShardBatches(shards, self.images, self.directory, batch_size=self.config.batch_size)
        dataset = ImageDataset(self.images, size=self.model.image_size)
        loader = make_loader(dataset, batches, num_workers=self.config.num_workers)
        total = int(sum(self.images.shard_sizes[shard] for shard in shards))
        failed: list[str] = []
        pending: list[Future[Any]] = []
        maps: list[tuple[list[str | None], Tensor]] = []
        with ThreadPoolExecutor(1) as writer, ProgressBar(total, "labelling") as bar:
            for batch in loader:
                maps.append((batch.keys, self.predict(batch.images)))
                failed += batch.failed
                if batch.last:
                    pending.append(writer.submit(self._write, batch.shard, maps))
                    maps = []
                if len(pending) > PENDING_SHARDS:
                    pending.pop(0).result()
                bar.update(len(batch.keys), failed=len(failed))
            for future in pending:
                future.result()
        for shard in shards:
            if self.images.shard_sizes[shard] == 0:
                write_label_shard(self.directory, self.images, shard, [])
        return failed

    def predict(self, images: Tensor) -> Tensor:
        """Densities float32 `(batch, *map_size)` of uint8 images, on the labelling device."""
        kind = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=kind) if kind else nullcontext():
            density = self.model(images.to(self.device, non_blocking=True)).exp()
            return resize_density(density, self.config.map_size)

    def _write(self, shard: int, maps: list[tuple[list[str | None], Tensor]]) -> None:
        if labels_complete(self.directory, self.images, shard):
            return  # another task was faster
        encoded = (
            (key, encode_label(density))
            for keys, densities in maps
            for key, density in zip(keys, densities.float().cpu().numpy(), strict=True)
            if key is not None
        )
        write_label_shard(self.directory, self.images, shard, encoded)
