"""What checkpoints cost the training: `python benchmarks/save.py`.

Trains the model of configs/pretrain/imagenette.yaml (ResNet-18 at 64 pixels, AdamW, batch 256, bf16) on batches from
memory, and times steps, copies of the state and waits by the same calls that the training loop makes. By turns: a block
of steps with a checkpoint written in the background, one whose step waits until it is on disk, one without.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import environment, report
from engine.launch import build_accelerator
from engine.loop import Training, start_training
from engine.passes import Backward
from engine.program import REPOSITORY, config_to_dict, parse_config
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.config import Config
from pretrain.data import Batch
from pretrain.model import Student, input_statistics
from pretrain.objective import Objective, memory_format
from pretrain.views import NUM_COLOURS

RECIPE = REPOSITORY / "configs" / "pretrain" / "imagenette.yaml"
STEPS_PER_CHECKPOINT = 100


def main() -> None:
    """Measure and write `results/save.{json,md}`."""
    options = _options()
    config, _ = parse_config(Config, default_config=RECIPE, argv=["--loop.tracker", "none"])
    config = replace(config, data=replace(config.data, batch_size=options.batch_size), compile=False)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, _training(config, Path(folder)) as training:
        step = _stepper(training, config)
        for _ in range(2):
            step()
        blocks = [_block(training, step, steps=options.steps) for _ in range(options.pairs)]
        size = sum(file.stat().st_size for file in training.run.checkpoints.rglob("*") if file.is_file())
    plain = statistics.median(seconds for block in blocks for seconds in block["none"])
    extra = {
        kind: statistics.median(sum(block[kind]) - sum(block["none"]) for block in blocks) for kind in ("async", "sync")
    }
    copy = statistics.median(block["copy"][0] for block in blocks)
    report(
        "save",
        figures={
            "save_stall": max(extra["async"], copy) / (STEPS_PER_CHECKPOINT * plain),
            "save_stall_in_the_step": extra["sync"] / (STEPS_PER_CHECKPOINT * plain),
            "copy_s": copy,
            "background_s": extra["async"],
            "waiting_s": extra["sync"],
            "step_s": plain,
        },
        environment=environment(
            batch_size=options.batch_size, pairs=options.pairs,
            checkpoint_mib=round(size / training.config.keep_checkpoints / 2**20, 1),
        ),
        title="What a checkpoint costs the training",
        notes=(
            f"`save_stall` is the share of the training's time that one checkpoint per {STEPS_PER_CHECKPOINT} steps "
            f"takes: the seconds that a block of {options.steps} steps with a save in the background (`background_s`: "
            "the copy of the state, and what the writing thread takes from the steps beside it) needs more than one "
            "without, median over pairs, and at least the seconds of the copy (`copy_s`); over the seconds of that "
            "many steps. `save_stall_in_the_step` is the same where the step waits for the disk."
        ),
    )  # fmt: skip


def _block(training: Training, step: "Step", *, steps: int) -> dict[str, list[float]]:
    """Seconds of the steps of three blocks: with a save in the background, with one to wait for, with none."""
    found: dict[str, list[float]] = {"copy": []}
    for kind in ("none", "async", "sync"):
        found[kind] = []
        for number in range(steps):
            started = time.perf_counter()
            step()
            if kind != "none" and number == 0:
                before = time.perf_counter()
                training.save(step.count)
                if kind == "async":
                    found["copy"].append(time.perf_counter() - before)
                else:
                    training.finish_saving()
            found[kind].append(time.perf_counter() - started)
        training.finish_saving()
    return found


class Step:
    """One optimiser step on the next of a few batches in memory; waits for the device."""

    def __init__(self, training: Training, objective: Objective, batches: Iterator[Batch]) -> None:
        self.training, self.objective, self.batches, self.count = training, objective, batches, 0

    def __call__(self) -> None:
        """Make the step."""
        training = self.training
        self.objective(next(self.batches), step=self.count, backward=Backward(training.accelerator, training.module))
        training.optimizer.step()
        training.optimizer.zero_grad()
        if training.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.count += 1


def _training(config: Config, folder: Path) -> Training:
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    student = Student(config, num_classes=10).to(memory_format=memory_format(config))  # type: ignore[call-overload]
    return start_training(
        student,
        accelerator=accelerator,
        ranks=Ranks(),
        run=RunFolder(folder / "run"),
        config=config,
        resolved=config_to_dict(config),
        batch_size=config.data.batch_size,
        steps_per_epoch=37,
        total_steps=1000,
        identity={},
    )


def _stepper(training: Training, config: Config) -> Step:
    backbone = training.accelerator.unwrap_model(training.module).backbone
    objective = Objective(training.module, config, input_statistics(backbone), training.accelerator.device)
    return Step(training, objective, _batches(config))


def _batches(config: Config) -> Iterator[Batch]:
    size, side, views = config.data.batch_size, config.data.image_size, config.num_views
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(size, 56, 56, generator=generator)
    batch = Batch(
        images=torch.randint(0, 256, (views, size, side, side, 3), dtype=torch.uint8, generator=generator),
        boxes=torch.tensor([0.1, 0.1, 0.8, 0.8]).repeat(views, size, 1),
        flips=torch.zeros(views, size, dtype=torch.bool),
        colours=torch.zeros(views, size, NUM_COLOURS),
        maps=maps / maps.sum((1, 2), keepdim=True),
        labels=torch.zeros(size, dtype=torch.int64),
        valid=torch.ones(size, dtype=torch.bool),
        bad=[],
    )
    while True:
        yield batch


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (default: the temporary folder)")
    parser.add_argument("--batch_size", type=int, default=256, help="images a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a block (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=7, help="blocks of each kind (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
