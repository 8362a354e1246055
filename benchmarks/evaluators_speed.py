"""What evaluating costs beside the encoder: `python benchmarks/evaluators_speed.py`.

- `corruptions_two_workers_vs_one`: the evaluator `imagenet_c` with all 15 corruptions made on the fly by two reading
  processes against one. The encoder takes 4 x 4 pixels, so that the corruptions are all the work.
- `bare_corruptions_two_processes_vs_one`: the same corruptions in processes that do nothing else: the machine's limit.
- `jpeg_rate_vs_forward`: features of a released set's JPEGs (ImageNet-C's layout, condition after condition: list,
  read, decode, crop, forward) against the same encoder's forward over the same pixels in memory.
"""

import argparse
import multiprocessing
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import environment, ratio_of_pairs, report, time_pairs
from torch import Tensor, nn

from engine.progress import silent
from engine.ranks import Ranks
from pretrain.evaluators.base import Subject
from pretrain.evaluators.corruptions import COMMON, corrupt
from pretrain.evaluators.features import pooled, pooled_each
from pretrain.evaluators.imagenet_c import imagenet_c
from pretrain.evaluators.prepare import ReleasedCrop
from pretrain.evaluators.reading import read_images, to_inputs
from pretrain.evaluators.sources import FolderImages
from pretrain.evaluators.subjects import open_subject
from pretrain.probe_config import CorruptionConfig, LinearConfig, LoadConfig, ProbeConfig
from shards.generate import Config as SampleConfig
from shards.generate import generate
from shards.pack import pack
from shards.sources.image_folder import ImageFolder

NUM_TRAIN = 16


class Thumbnail(nn.Module):
    """Stands for an encoder that costs nothing."""

    def forward_features(self, images: Tensor) -> Tensor:
        """Every few pixels of `(batch, 3, height, width)`: a 4 x 4 grid."""
        height, width = images.shape[2:]
        return images[:, :, :: height // 4, :: width // 4]

    def forward_head(self, features: Tensor, *, pre_logits: bool) -> Tensor:
        """As one row an image: `(batch, 48)`."""
        return features.reshape(len(features), -1)


def main() -> None:
    """Measure and write `results/evaluators_speed.{json,md}`."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        two, one = _time_corruptions(Path(folder), options)
        bare_two, bare_one = _time_bare_corruptions(options)
        read, forward = _time_jpegs(Path(folder), options)
    report(
        "evaluators_speed",
        figures={
            "corruptions_two_workers_vs_one": ratio_of_pairs(two, one),
            "bare_corruptions_two_processes_vs_one": ratio_of_pairs(bare_two, bare_one),
            "jpeg_rate_vs_forward": ratio_of_pairs(read, forward),
            "corrupted_images_per_s_two_workers": 15 * options.corrupted / min(two),
            "jpeg_images_per_s": options.conditions * options.images / min(read),
            "forward_images_per_s": options.conditions * options.images / min(forward),
        },
        environment=environment(
            image_size=options.image_size, backbone=options.backbone, images=options.images,
            conditions=options.conditions, corrupted=options.corrupted, num_workers=options.num_workers,
            pairs=options.pairs, threads=options.threads,
        ),
        title="What evaluating costs beside the encoder",
        notes=(
            "Medians over pairs, by turns in one run. `corruptions_two_workers_vs_one`: seconds of `imagenet_c` (15 "
            "corruptions on the fly, severity 3, nothing cached, the encoder taking 4 x 4 pixels) with one "
            "reading process over seconds with two; `bare_...`: the same of processes that do nothing but corrupt, "
            "which is what two cores of this machine give. `jpeg_rate_vs_forward`: seconds of the forward over "
            "pixels in memory over seconds of features from folders of JPEGs, one after another as imagenet_c reads a "
            "released set, the start of the reading processes included; 1 would mean that reading is free."
        ),
    )  # fmt: skip


def _time_corruptions(folder: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of imagenet_c with two reading processes and with one."""
    sample = _sample(folder / "few", num_val=options.corrupted, size=options.image_size)
    for split in ("train", "val"):
        pack(ImageFolder(sample / split), folder / split, workers=1)
    probe = ProbeConfig(
        run=None,
        encoder="timm:test_resnet",
        train=folder / "train",
        val=folder / "val",
        batch_size=32,  # what a reading process hands over at a time: so small a set must not end in one of them
        load=LoadConfig(image_size=options.image_size),
        linear=LinearConfig(epochs=1, rates=[0.1]),
        corruptions=CorruptionConfig(severities=[3]),
    )
    subject = replace(_subject(probe), backbone=Thumbnail())

    def evaluate(num_workers: int) -> None:
        imagenet_c(subject, replace(probe, num_workers=num_workers))

    # glass blur is compiled at its first use, which is no matter of processes
    corrupt(np.zeros((64, 64, 3), dtype=np.uint8), "glass_blur", severity=1, seed=0)
    return time_pairs(lambda: evaluate(2), lambda: evaluate(1), num_pairs=options.pairs, warmup=0)


def _time_bare_corruptions(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of the corruptions alone in two processes and in one, the same images in all."""
    rng = np.random.default_rng(0)
    shape = (options.corrupted // 4, options.image_size, options.image_size, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)

    def share(rank: int, num_ranks: int) -> None:
        for name in COMMON:
            for seed, image in enumerate(images[rank::num_ranks]):
                corrupt(image, name, severity=3, seed=seed)

    def run(num_ranks: int) -> None:
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=share, args=(rank, num_ranks)) for rank in range(num_ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

    return time_pairs(lambda: run(2), lambda: run(1), num_pairs=options.pairs, warmup=0)


def _time_jpegs(folder: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of features from JPEGs, condition after condition, and of the forward alone."""
    sample = _sample(folder / "many", num_val=options.images, size=options.image_size + 32) / "val"
    classes = tuple(sorted(path.name for path in sample.iterdir()))
    conditions = [folder / "released" / "fog" / str(severity) for severity in range(1, options.conditions + 1)]
    for condition in conditions:
        shutil.copytree(sample, condition)
    probe = ProbeConfig(
        run=None,
        encoder=f"timm:{options.backbone}",
        load=LoadConfig(image_size=options.image_size),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    subject = _subject(probe)
    prepare, compute = ReleasedCrop(options.image_size), pooled(subject)
    first = FolderImages(conditions[0], classes=classes)
    pixels, _ = read_images(first, prepare, list(range(len(first))), size=options.image_size)
    if subject.device.type == "cuda":
        pixels = pixels.pin_memory()

    def read() -> None:
        sets = ((FolderImages(condition, classes=classes), prepare) for condition in conditions)
        for _ in pooled_each(subject, probe, sets):
            pass

    def forward() -> None:
        with torch.no_grad():
            for _ in conditions:
                found = [compute(to_inputs(part, subject))["features"] for part in pixels.split(probe.batch_size)]
                torch.cat(found).cpu()

    return time_pairs(read, forward, num_pairs=options.pairs)


def _subject(probe: ProbeConfig) -> Subject:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return replace(open_subject(probe, ranks=Ranks(), device=device), cache=None, report=silent)


def _sample(folder: Path, *, num_val: int, size: int) -> Path:
    """Generated labelled images, in a folder for each split and class."""
    generate(
        SampleConfig(
            output=folder, num_train=NUM_TRAIN, num_val=num_val, num_gaze_train=1, num_gaze_val=1, image_size=size
        )
    )
    return folder / "images"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet18", help="encoder that reads JPEGs (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--images", type=int, default=192, help="JPEGs of a condition (default: %(default)s)")
    parser.add_argument("--conditions", type=int, default=4, help="folders of JPEGs (default: %(default)s)")
    parser.add_argument("--corrupted", type=int, default=384, help="images of each corruption (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="images a forward (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that read JPEGs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the encoder on a CPU (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
