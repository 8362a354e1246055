"""The work of `teacher/label.py`: read, predict, encode and write overlap; a shard is written whole or not at all."""

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attention.maps import encode_map
from engine.environment import environment
from engine.forking import end_opencv_threads
from engine.loading import make_loader
from shards.decode import image_size
from shards.gaze import resize_density
from shards.labels import STEP, claim_directory, label_directory, labels_complete
from shards.map_png import encode_map_png
from shards.reader import BadSample, ShardSet
from teacher.data import load_image
from teacher.label_config import LabelConfig
from teacher.label_tasks import LabelWriter, ShardBatches, parse_controls, shards_of_task, write_set
from teacher.saved import SavedTeacher, load_teacher

# Below it torch gives no work of a tensor to other threads, so a map's sum does not depend on the maps beside it.
SERIAL_VALUES = 32768


def label(config: LabelConfig) -> Path:
    """Label this task's shards, and seal the set when all are there.

    Returns:
        The folder of the label set.

    Raises:
        InputError: no teacher or another one, no images, a range outside the set, or a folder with other labels.
    """
    parse_controls(config.controls)
    teacher = load_teacher(config.run, expected=config.hash)
    images = ShardSet(config.shards, remote=config.remote)
    task = shards_of_task(config, images)
    directory = label_directory(config.output, teacher.hash)
    claim_directory(directory, {"images": images.manifest.digest, "size": list(config.map_size)})
    write_set(
        config,
        images,
        directory,
        task=task,
        write=lambda todo: Labeller(config, teacher, images, directory).run(todo),
        teacher=describe(teacher),
        settings={"size": list(config.map_size)},
    )
    return directory


def check(config: LabelConfig) -> list[str]:
    """Teacher, images and this task's range, without writing anything."""
    parse_controls(config.controls)
    teacher = load_teacher(config.run, expected=config.hash)
    images = ShardSet(config.shards, remote=config.remote)
    task = shards_of_task(config, images)
    directory = label_directory(config.output, teacher.hash)
    done = sum(labels_complete(directory, images, shard) for shard in task)
    return [
        f"teacher: {config.run}, {teacher.facts['model']['backbone']}, hash {teacher.hash[:16]}",
        f"images: {config.shards}, {images.num_samples} in {images.manifest.num_shards} shards",
        f"task: {len(task)} shards, {done} of them labelled already, into {directory}",
    ]


def describe(teacher: SavedTeacher) -> dict[str, Any]:
    """What the label manifest says about its teacher. Nothing of it depends on the clock, the machine or the task."""
    software = environment()
    names = ("image_size", "step", "data", "sources", "gaze", "metrics")
    return {
        "hash": teacher.hash,
        "backbone": teacher.facts["model"]["backbone"],
        # a teacher of an earlier version does not say all
        **{name: teacher.facts[name] for name in names if name in teacher.facts},
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


class Predicted(NamedTuple):
    """Densities on their way from the device.

    Attributes:
        densities: `(batch, rows, columns)` on the host, in page-locked memory where there is a GPU; not to be read
            before `ready`.
        ready: reached by the GPU when they are there; None where they are there already.
    """

    densities: Tensor
    ready: torch.cuda.Event | None


class Labeller:
    """Predicts in this thread; others encode and write, while the loader's processes read on."""

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
        end_opencv_threads()  # the encoders are the parallelism
        batches = ShardBatches(shards, self.images, self.directory, batch_size=self.config.batch_size)
        dataset = ImageDataset(self.images, size=self.model.image_size)
        loader = make_loader(dataset, batches, num_workers=self.config.num_workers)
        writer = LabelWriter(self.images, self.directory, encode=encode_maps)
        return writer.write(shards, loader, self.predict_ahead)

    def predict(self, images: Tensor) -> Tensor:
        """Densities `(batch, *map_size)` of uint8 images, on the labelling device."""
        kind = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=kind) if kind else nullcontext():
            density = self.model(images.to(self.device, non_blocking=True)).exp()
            return resize_density(density, self.config.map_size)

    def predict_ahead(self, images: Tensor) -> Predicted:
        """The same on the host, without waiting for the device, which may go on with the next batch."""
        densities = self.predict(images)
        if self.device.type != "cuda":
            return Predicted(densities, None)
        # a copy to the host that does not block goes to page-locked memory of torch's own pool
        host = densities.to("cpu", non_blocking=True)
        ready = torch.cuda.Event(blocking=True)  # whoever waits sleeps
        ready.record(torch.cuda.current_stream(self.device))
        return Predicted(host, ready)


def encode_maps(keys: Sequence[str | None], predicted: Predicted) -> Iterator[tuple[str, bytes]]:
    """Key and stored bytes, those of `encode_label`, of each readable image of a batch; waits until it is there."""
    if predicted.ready is not None:
        predicted.ready.synchronize()
    densities = predicted.densities.float()
    num_together = max(1, (SERIAL_VALUES - 1) // max(1, densities[0].numel())) if len(densities) else 1
    parts = [encode_map(part, step=STEP) for part in densities.split(num_together)]
    for key, codes in zip(keys, (codes for part in parts for codes in part.numpy()), strict=True):
        if key is not None:
            yield key, encode_map_png(codes)
