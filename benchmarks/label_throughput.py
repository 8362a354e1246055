"""How close labelling comes to the model's own speed: `python benchmarks/label_throughput.py [--shards IMAGES]`.

Pairs of one labelling of an image set (read, decode, forward, quantise, write, all of `teacher/label.py`'s work) and
one pass of the same model over batches of the same images that lie decoded in memory, on the same device and threads.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, ratio_of_pairs, report, time_pairs
from shards.generate import Config as SampleConfig
from shards.generate import generate
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder
from teacher.config import ModelConfig
from teacher.label_config import LabelConfig
from teacher.labeller import ImageDataset, Labeller, ShardBatches
from teacher.model import SaliencyModel
from teacher.saved import load_teacher, save_teacher


def main() -> None:
    """Measure and write `results/label_throughput.{json,md}`."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder, _images(options.shards, Path(folder)) as images:
        model = ModelConfig(backbone=options.backbone, taps=options.taps)
        size = (options.image_size[0], options.image_size[1])
        torch.manual_seed(0)
        state = SaliencyModel(model, image_size=size).state_dict()
        facts: dict[str, Any] = {"step": 0, "metrics": {}, "data": {}, "gaze": {}}
        save_teacher(Path(folder) / "run", state, model=model, image_size=size, facts=facts)
        config = LabelConfig(
            batch_size=options.batch_size, num_workers=options.num_workers, precision=options.precision
        )
        label_times, forward_times, num_images, device = _measure(config, images, Path(folder), options)
    ratio = ratio_of_pairs(label_times, forward_times)
    report(
        "label_throughput",
        figures={
            "label_vs_forward": ratio,
            "label_images_per_s": num_images / min(label_times),
            "forward_images_per_s": num_images / min(forward_times),
        },
        environment=environment(
            device=device, backbone=options.backbone, image_size=list(size), precision=options.precision,
            batch_size=options.batch_size, num_workers=options.num_workers, num_images=num_images, pairs=options.pairs,
        ),
        title="Labelling against the model's forward alone",
        notes=(
            "`label_vs_forward` is the median over pairs of (seconds of the forward over batches in memory) / (seconds "
            "of the whole labelling): 1 would mean that reading, decoding, quantising and writing cost nothing. "
            "Rates are of the fastest run of each."
        ),
    )  # fmt: skip


def _measure(
    config: LabelConfig, images: ShardSet, folder: Path, options: argparse.Namespace
) -> tuple[list[float], list[float], int, str]:
    """Seconds of each labelling and of each forward pass, the number of images, the device."""
    teacher = load_teacher(folder / "run")
    shards = range(images.manifest.num_shards)
    dataset = ImageDataset(images, size=teacher.model.image_size)
    sampler = ShardBatches(shards, images, folder / "none", batch_size=config.batch_size)
    # where there is a GPU, in page-locked memory, as the labelling's own loader gives them
    loaded = (dataset.__getitems__(positions) for positions in sampler)
    batches = [(batch.pin_memory() if torch.cuda.is_available() else batch).images for batch in loaded]
    numbers = count()
    model = Labeller(config, teacher, images, folder / "none")

    def label() -> None:
        directory = folder / f"labels{next(numbers)}"
        directory.mkdir()
        Labeller(config, teacher, images, directory).run(shards)

    def forward() -> None:
        for batch in batches:
            model.predict(batch)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    ours, theirs = time_pairs(label, forward, num_pairs=options.pairs)
    return ours, theirs, images.num_samples, str(model.device)


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
