"""Memory and time of a large local batch in parts: `python benchmarks/micro_batch.py`.

Each figure of memory is the growth of a fresh process's peak during one training step (forward, contrast, backward; on
a GPU, of the allocator's) over what model and batch take; batches are noise that lies in memory.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.common import environment, ratio_of_pairs, report, time_pairs
from benchmarks.loss import in_fresh_process, peak_growth
from engine.passes import Backward
from engine.settings import OptimConfig
from pretrain.config import Config, DataConfig, ModelConfig
from pretrain.data import Batch
from pretrain.model import Student, input_statistics
from pretrain.objective import Objective
from pretrain.views import NUM_COLOURS


def main() -> None:
    """Measure and write `results/micro_batch.{json,md}`."""
    options = _options()
    config = Config(
        arm="contrastive",
        data=DataConfig(image_size=options.image_size),
        model=ModelConfig(backbone=options.backbone),
        precision=options.precision,
        diagnostics_every=0,
    )
    small, large, middle = options.micro_batch, options.batch, 4 * options.micro_batch
    in_parts = replace(config, optim=OptimConfig(micro_batch=small))
    cases = {
        "small": (config, small),
        "large": (in_parts, large),
        "whole": (config, middle),
        "parts": (in_parts, middle),
    }
    mib = {
        name: in_fresh_process(_extra_memory, which, count, options.device) / 2**20
        for name, (which, count) in cases.items()
    }
    parts, whole = time_pairs(
        _step(in_parts, middle, options.device), _step(config, middle, options.device), num_pairs=options.pairs
    )
    report(
        "micro_batch",
        figures={
            f"memory_{large}_vs_{small}": mib["small"] / mib["large"],
            f"memory_{middle}_parts_vs_whole": mib["whole"] / mib["parts"],
            f"time_{middle}_parts_vs_whole": ratio_of_pairs(parts, whole),
            f"extra_mib_{small}": mib["small"],
            f"extra_mib_{large}_in_parts": mib["large"],
            f"extra_mib_{middle}_whole": mib["whole"],
        },
        environment=environment(
            backbone=options.backbone, image_size=options.image_size, pairs=options.pairs,
            precision=options.precision, micro_batch=small, batch=large,
        ),
        title="A large local batch in parts",
        notes=(
            f"`memory_{large}_vs_{small}` is the extra memory of a contrastive step on {small} images in one pass over "
            f"that on {large} images in parts of {small}, all {large} contrasted with each other: 1 is flat. "
            f"`..._parts_vs_whole` compare {middle} images in parts with one pass: memory of one pass over that in "
            "parts, and the median over pairs of the seconds of one pass over those in parts, which goes forward twice."
        ),
    )  # fmt: skip


def _extra_memory(config: Config, count: int, device: str) -> int:
    return peak_growth(_step(config, count, device), device)


def _step(config: Config, count: int, device: str) -> Callable[[], float]:
    """A training step on `count` images, without the optimiser's; one on a few images has warmed everything up."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=config.precision)
    student = Student(config, num_classes=0)
    statistics = input_statistics(student.backbone)
    module = accelerator.prepare(student)
    objective = Objective(module, config, statistics, accelerator.device)
    backward = Backward(accelerator, module)
    objective(_noise(8, config), step=0, backward=backward)  # the gradients, too, are there from now on
    batch = _noise(count, config)
    return lambda: objective(batch, step=0, backward=backward)["loss"].item()


def _noise(count: int, config: Config) -> Batch:
    size, views = config.data.image_size, (config.num_views, count)
    colours = torch.zeros(*views, NUM_COLOURS)
    colours[..., :3], colours[..., 4] = 1.0, -1.0
    return Batch(
        images=torch.randint(256, (*views, size, size, 3), dtype=torch.uint8),
        boxes=torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*views, 4),
        flips=torch.zeros(views, dtype=torch.bool),
        colours=colours,
        maps=None,
        labels=torch.full((count,), -1),
        valid=torch.ones(count, dtype=torch.bool),
        bad=[],
    )


def _options() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4096, help="images of the large batch (default: %(default)s)")
    parser.add_argument("--micro_batch", type=int, default=256, help="images of a part (default: %(default)s)")
    parser.add_argument("--backbone", default="resnet50" if gpu else "resnet18", help="(default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=224 if gpu else 32, help="pixels (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=2, help="timed pairs (default: %(default)s)")
    parser.add_argument("--precision", default="bf16" if gpu else "no", help="(default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    options: Any = parser.parse_args()
    return options


if __name__ == "__main__":
    main()
