"""Runs that are killed at random moments against runs that are not: `python benchmarks/kill.py`.

Trains a small student on the generated sample with pretrain/main.py, on one rank and on two (DDP, gloo). Every process
of the disturbed runs gets SIGKILL at a random moment, from its start to its end, and the same command is given again;
of two ranks either both are killed, or one, and the other has to stop by itself. At the end weights, optimiser and
random states are compared with those of the undisturbed run, and the samples of every step as the run noted them.
"""

import argparse
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import environment, report
from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.progress import ProgressBar
from engine.runs import flatten
from shards.generate import Config as SampleConfig
from shards.generate import main as generate
from shards.pack import pack
from shards.sources.image_folder import ImageFolder
from tests.pretrain.runs import order, pretrain, start

GRACE_S = 15.0
MODEL = {"backbone": "test_vit", "projector_hidden": 32, "projector_out": 16}


@dataclass
class Found:
    """What the comparison of all disturbed runs came to."""

    kills: int = 0
    runs: int = 0
    lost_or_doubled: int = 0
    differing: int = 0
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Measure and write `results/kill.{json,md}`."""
    options = _options()
    chance = random.Random(options.seed)
    found = Found()
    with tempfile.TemporaryDirectory() as folder, ProgressBar(options.kills, "kills") as progress:
        config = _config(Path(folder), options)
        for ranks, kills in ((1, options.kills - options.kills // 2), (2, options.kills // 2)):
            _disturb(config, ranks, kills, chance, found, progress)
    report(
        "kill",
        figures={
            "kills": found.kills,
            "lost_or_doubled": found.lost_or_doubled,
            "weights_that_differ": found.differing,
            "runs": found.runs,
        },
        environment=environment(seed=options.seed, steps=options.steps, checkpoint_every=options.checkpoint_every),
        title="Random kills",
        notes=(
            f"{found.runs} runs of {options.steps} steps on one rank and on two, ended `kills` times by SIGKILL of one "
            f"or all ranks, {min(found.seconds):.1f} to {max(found.seconds):.1f} s after their start, and started "
            "again. `lost_or_doubled`: samples that a step of a disturbed run missed "
            "or had too many, against the undisturbed run of as many ranks. `weights_that_differ`: tensors of the last "
            "checkpoint (weights, optimiser, random states of all ranks) that are not equal bit for bit."
        ),
    )


def _disturb(config: Path, ranks: int, kills: int, chance: random.Random, found: Found, progress: ProgressBar) -> None:
    """Runs on `ranks` ranks, one after another, until they took `kills` kills; each is compared with a whole one."""
    whole = f"whole-{ranks}"
    pretrain(config, "--run", f"warm-{ranks}", "--max_steps", 1, world_size=ranks)  # imports everything once
    started = time.monotonic()
    pretrain(config, "--run", whole, world_size=ranks)
    life = time.monotonic() - started
    runs = Path(yaml.safe_load(config.read_text())["runs"])
    goal = found.kills + kills
    while found.kills < goal:
        found.runs += 1
        name = f"killed-{found.runs}"
        while found.kills < goal and _kill_once(config, name, ranks, life, chance, found):
            progress.update()
        pretrain(config, "--run", name, world_size=ranks)
        _compare(runs / whole, runs / name, found)


def _kill_once(config: Path, name: str, ranks: int, life: float, chance: random.Random, found: Found) -> bool:
    """Start the run and kill it; False if it ended before."""
    begun = time.monotonic()
    launched = start(config, "--run", name, world_size=ranks)
    victim = None if ranks == 1 or chance.random() < 0.5 else chance.randrange(ranks)
    launched.processes[0].join(chance.uniform(0.2, 1.1) * life)
    launched.signal(signal.SIGKILL, rank=victim)
    seconds = time.monotonic() - begun
    for process in launched.processes:
        process.join(GRACE_S)
    launched.kill()  # what a launcher does with a rank that still waits for the others to come up
    if all(process.exitcode == 0 for process in launched.processes):
        return False
    found.kills += 1
    found.seconds.append(seconds)
    return True


def _compare(whole: Path, killed: Path, found: Found) -> None:
    one, other = order(whole), order(killed)
    for step in one.keys() | other.keys():
        wanted, had = (Counter(map(tuple, steps.get(step, []))) for steps in (one, other))
        found.lost_or_doubled += ((wanted - had) + (had - wanted)).total()
    trees = [_tensors(run) for run in (whole, killed)]
    names = trees[0].keys() | trees[1].keys()
    found.differing += sum(not _equal(trees[0].get(name), trees[1].get(name)) for name in names)


def _tensors(run: Path) -> dict[str, Any]:
    """Leaves of the last checkpoint by name."""
    _, tensors, _ = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    return flatten(tensors | {"rng": {str(rank): state for rank, state in enumerate(tensors["rng"])}})


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _config(folder: Path, options: argparse.Namespace) -> Path:
    """A generated sample, packed, and the recipe of a small student on it."""
    sample = SampleConfig(
        output=folder / "sample", num_train=96, num_val=1, num_gaze_train=1, num_gaze_val=1, image_size=64
    )
    generate(sample)
    pack(ImageFolder(folder / "sample" / "images" / "train"), folder / "shards", shard_samples=24)
    recipe = {
        "run": "kill",
        "runs": str(folder / "runs"),
        "arm": "contrastive",
        "max_steps": options.steps,
        "data": {"shards": str(folder / "shards"), "batch_size": 12, "image_size": 32},
        "model": MODEL | {"backbone_options": {"drop_path_rate": 0.2}},
        "optim": {"name": "adamw", "lr": 0.001, "lr_scaling": "none", "warmup_epochs": 0.5},
        "loop": {
            "log_every": 5,
            "checkpoint_every": options.checkpoint_every,
            "num_workers": 1,
            "tracker": "none",
            "record_order": True,
            "ignore_failures": True,
        },
    }
    path = folder / "kill.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=32, help="kills, half of them of two ranks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run (default: %(default)s)")
    parser.add_argument("--checkpoint_every", type=int, default=7, help="steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
