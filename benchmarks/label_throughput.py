"""How close labelling comes to the model's own speed: `python benchmarks/label_throughput.py [--shards IMAGES]`.

Pairs of one labelling of an image set (read, decode, forward, quantise, write, all of `teacher/label.py`'s work) and
one pass of the same model over batches of the same images that lie decoded in memory, on the same device and threads.
Then the parts that should cost nothing beside the forward, each alone: reading, and encoding and writing, the latter in
pairs with the same work label by label in one thread.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import environment, ratio_of_pairs, report, time_pairs
from engine.loading import make_loader
from shards.generate import Config as SampleConfig
from shards.generate import generate
from shards.labels import encode_label, write_label_shard
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder
from teacher.config import ModelConfig
from teacher.label_config import LabelConfig
from teacher.label_tasks import LabelWriter, default_encoders
from teacher.labeller import ImageBatch, ImageDataset, Labeller, Predicted, ShardBatches, encode_maps
from teacher.model import SaliencyModel
from teacher.saved import load_teacher, save_teacher

NUM_IN_MEMORY = 16
NOTES = (
    "`label_vs_forward` is the median over pairs of (seconds of the forward over batches in memory) / (seconds of the "
    "whole labelling): 1 would mean that reading, decoding, quantising and writing cost nothing. `first_batch_s` is "
    "the part of the labelling before its first batch is read, once a program: with few images it weighs much. `read` "
    "is its loader alone, start included; `store` is quantising, compressing and writing maps that lie in memory, "
    "compared with the same label by label in one thread. Rates are of the fastest run of each."
)


def main() -> None:
    """Measure and write `results/label_throughput.{json,md}`."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder, _images(options.shards, Path(folder)) as images:
        size = (options.image_size[0], options.image_size[1])
        _save_teacher(Path(folder) / "run", options.backbone, taps=options.taps, size=size)
        config = LabelConfig(
            batch_size=options.batch_size, num_workers=options.num_workers, precision=options.precision
        )
        bench = Bench(config, images, Path(folder))
        label_times, forward_times = time_pairs(bench.label, bench.forward, num_pairs=options.pairs)
        store_times, one_thread_times = time_pairs(bench.store, bench.store_in_one_thread, num_pairs=options.pairs)
        read_times = [bench.read() for _ in range(options.pairs)]
    num_images = images.num_samples
    report(
        "label_throughput",
        figures={
            "label_vs_forward": ratio_of_pairs(label_times, forward_times),
            "label_images_per_s": num_images / min(label_times),
            "forward_images_per_s": num_images / min(forward_times),
            "first_batch_s": statistics.median(bench.first_batch_s[1:]),
            "read_images_per_s": num_images / min(read_times),
            "store_images_per_s": num_images / min(store_times),
            "store_ms_per_label": 1000 * min(store_times) / num_images,
            "store_vs_one_thread": ratio_of_pairs(store_times, one_thread_times),
        },
        environment=environment(
            backbone=options.backbone, image_size=list(size),
            precision=options.precision, batch_size=options.batch_size, num_workers=options.num_workers,
            num_encoders=default_encoders(), num_images=num_images, pairs=options.pairs,
        ),
        title="Labelling against the model's forward alone",
        notes=NOTES,
    )  # fmt: skip


class Bench:
    """What is timed: a labelling, and its parts alone."""

    def __init__(self, config: LabelConfig, images: ShardSet, folder: Path) -> None:
        self.config, self.images, self.folder = config, images, folder
        self.shards = range(images.manifest.num_shards)
        self.teacher = load_teacher(folder / "run")
        self.labeller = Labeller(config, self.teacher, images, folder / "none")
        self.dataset = ImageDataset(images, size=self.teacher.model.image_size)
        self.numbers = count()
        self.first_batch_s: list[float] = []
        # the whole set decoded would be gigabytes: a few batches stand for all, cut to the size of each
        self.batches: list[Tensor] = []
        self.predicted: list[ImageBatch] = []
        for number, batch in enumerate(self._loader(num_workers=0)):
            self.batches.append(batch.images if number < NUM_IN_MEMORY else self._stand_in(batch))
            maps = self.labeller.predict(batch.images).cpu()
            self.predicted.append(ImageBatch(maps, batch.keys, batch.shard, batch.last, []))

    def label(self) -> None:
        """All of `teacher/label.py`'s work."""
        labeller = _Timed(self.config, self.teacher, self.images, self._new_folder())
        start = time.perf_counter()
        labeller.run(self.shards)
        self.first_batch_s.append(labeller.first_batch - start)

    def forward(self) -> None:
        """The model alone."""
        for batch in self.batches:
            self.labeller.predict(batch)
        if self.labeller.device.type == "cuda":
            torch.cuda.synchronize()

    def read(self) -> float:
        """Seconds of the labelling's loader alone."""
        start = time.perf_counter()
        for _ in self._loader(num_workers=self.config.num_workers):
            pass
        return time.perf_counter() - start

    def store(self) -> None:
        """Encoding and writing alone, as the labelling does it."""
        writer = LabelWriter(self.images, self._new_folder(), encode=encode_maps)
        writer.write(self.shards, self.predicted, lambda maps: Predicted(maps, None))

    def store_in_one_thread(self) -> None:
        """The same label by label."""
        directory = self._new_folder()
        for shard in self.shards:
            batches = [batch for batch in self.predicted if batch.shard == shard]
            pairs = [pair for batch in batches for pair in zip(batch.keys, batch.images.float().numpy(), strict=True)]
            labels = ((key, encode_label(density)) for key, density in pairs if key is not None)
            write_label_shard(directory, self.images, shard, labels)

    def _loader(self, *, num_workers: int) -> Any:
        sampler = ShardBatches(self.shards, self.images, self.folder / "none", batch_size=self.config.batch_size)
        return make_loader(self.dataset, sampler, num_workers=num_workers)

    def _stand_in(self, batch: ImageBatch) -> Tensor:
        same = [images for images in self.batches[:NUM_IN_MEMORY] if len(images) >= len(batch.keys)]
        return same[len(self.batches) % len(same)][: len(batch.keys)] if same else batch.images

    def _new_folder(self) -> Path:
        directory = self.folder / f"labels{next(self.numbers)}"
        directory.mkdir()
        return directory


class _Timed(Labeller):
    """Notes when its first batch comes."""

    first_batch = 0.0

    def predict_ahead(self, images: Tensor) -> Predicted:
        self.first_batch = self.first_batch or time.perf_counter()
        return super().predict_ahead(images)


def _save_teacher(run: Path, backbone: str, *, taps: list[int], size: tuple[int, int]) -> None:
    """A run with an untrained teacher."""
    model = ModelConfig(backbone=backbone, taps=taps)
    torch.manual_seed(0)
    state = SaliencyModel(model, image_size=size).state_dict()
    facts: dict[str, Any] = {"step": 0, "metrics": {}, "data": {}, "gaze": {}}
    save_teacher(run, state, model=model, image_size=size, facts=facts)


@contextmanager
def _images(shards: Path | None, folder: Path) -> Iterator[ShardSet]:
    """The given image shards, or generated ones of a photograph's size."""
    if shards is None:
        sample = SampleConfig(
            output=folder / "sample", num_train=256, num_val=1, num_gaze_train=1, num_gaze_val=1, image_size=384
        )
        generate(sample)
        shards = folder / "shards"
        pack(ImageFolder(folder / "sample" / "images" / "train"), shards, shard_samples=64)
    images = ShardSet(shards)
    yield images
    images.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, help="image shards; default: 256 generated images of 384x384 pixels")
    parser.add_argument("--backbone", default="resnet18", help="timm backbone of the teacher (default: %(default)s)")
    parser.add_argument("--taps", type=int, nargs="*", default=[1, 2, 3, 4], help="levels (default: %(default)s)")
    parser.add_argument("--image_size", type=int, nargs=2, default=[240, 320], help="pixels (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="images a forward (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=1, help="reading processes (default: %(default)s)")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no", help="(default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
