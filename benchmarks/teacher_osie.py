"""OSIE teachers over several seeds: `SACCADE_DATA=FOLDER python benchmarks/teacher_osie.py --runs RUNS`.

FOLDER holds `osie/`. Packs the fixed split of 500 and 200 images, trains `configs/teacher/osie.yaml` (from scratch) and
`osie_pretrained.yaml` (ImageNet weights) once per seed, and collects what the runs measured. Runs that are finished are
taken as they are, so it may be stopped and started again.

`--sizes 60 125 250 500` measures the learning curve over the number of training images instead, with one seed unless
more are given, into `results/teacher_osie_sizes.{json,md}`: the table of the seeds stays as it is.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import environment, report
from engine.program import parse_config
from engine.runs import RunFolder
from shards.pack import pack
from shards.sources.osie import Osie
from teacher.config import Config

ROOT = Path(__file__).resolve().parent.parent
NUM_TRAIN = 500
RECIPES = {"scratch": "osie", "pretrained": "osie_pretrained"}
SHOWN = ("nss", "kld", "cc", "sim", "auc_judd", "auc_borji", "auc_shuffled", "information_gain")
BASELINES = ("uniform", "centre_bias", "one_human", "split_half")
NOTES = """Teachers trained on 500 images of OSIE (eye tracking, 15 observers) and measured on the other 200, at 1/4 of
the 800x600 resolution with human maps of sigma 24 px. `scratch` is `configs/teacher/osie.yaml`, `pretrained` is
`configs/teacher/osie_pretrained.yaml` (EfficientNet-Lite0 with ImageNet weights); mean and standard deviation over
seeds. The best epoch by validation KLD is kept, so the validation images chose it.

The published state of the art on SALICON's test set (AUC .869, CC .913, KLD .19 to .26, NSS 1.99, SIM .81) cannot be
compared with these numbers: its gaze comes from mouse movements, its human maps are of many more observers and
smoother, its images and its training set (10,000) are others. What can be reached on OSIE is in the rows of humans:
one against all others, and half of them against the other half."""


SIZES_NOTES = """Teachers of the same two recipes trained on the first images of OSIE's training split, as packing
shuffled it (smaller sets lie in larger ones), and measured on the same 200 images. Steps, validations and warm-up are
those of the recipe on all 500 images, so only the number of different images changes; the best validation by KLD is
kept."""


def main() -> None:
    """Train what is missing, and write `results/teacher_osie.{json,md}`, or the learning curve's."""
    options = _options()
    shards = options.runs / "osie_shards"
    for split in ("train", "val"):
        if not (shards / split / "manifest.json").exists():
            pack(Osie(Path(os.environ["SACCADE_DATA"]) / "osie", split=split), shards / split, shard_samples=100)
    if options.sizes:
        _learning_curve(options, shards)
    else:
        _seeds(options, shards)


def _learning_curve(options: argparse.Namespace, shards: Path) -> None:
    """One row for each recipe and number of images."""
    seeds = options.seeds or [0]
    figures: dict[str, float] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    for name in options.only:
        for size in options.sizes:
            runs = [_run(RECIPES[name], seed, shards, options.runs, size=size) for seed in seeds]
            rows[f"{name}, {size} images"] = runs
            for metric in ("nss", "cc", "kld"):
                figures[f"{name}_{size}_{metric}"] = statistics.mean(run[f"attention/{metric}"] for run in runs)
    more = environment(seeds=seeds, sizes=options.sizes)
    title, table = "Teachers on OSIE by the number of training images", _table(rows)
    report("teacher_osie_sizes", figures=figures, environment=more, title=title, notes=SIZES_NOTES, table=table)


def _seeds(options: argparse.Namespace, shards: Path) -> None:
    """One row for each recipe: mean and deviation over seeds."""
    seeds = options.seeds or [0, 1, 2]
    scores: dict[str, list[dict[str, float]]] = {}
    for name, recipe in RECIPES.items():
        if name in options.only:
            scores[name] = [_run(recipe, seed, shards, options.runs) for seed in seeds]
    figures = {}
    for name, runs in scores.items():
        for metric in ("nss", "cc", "kld", "auc_judd"):
            values = [run[f"attention/{metric}"] for run in runs]
            figures[f"{name}_{metric}"] = statistics.mean(values)
            figures[f"{name}_{metric}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    folders = [RunFolder(options.runs / f"{RECIPES[name]}-seed{seed}") for name in scores for seed in seeds]
    trained_at = sorted({str(run.read_summary()["environment"]["commit"]) for run in folders})
    more = environment(seeds=seeds, trained_at=trained_at)
    title, table = "Teachers on OSIE", _table(scores)
    report("teacher_osie", figures=figures, environment=more, title=title, notes=NOTES, table=table)


def _run(recipe: str, seed: int, shards: Path, runs: Path, *, size: int = NUM_TRAIN) -> dict[str, float]:
    """Metrics of one run on the first `size` training images, trained if it is not finished."""
    part = "" if size == NUM_TRAIN else f"-{size}images"
    run = RunFolder(runs / f"{recipe}{part}-seed{seed}")
    if not run.read_summary():
        config = ROOT / "configs" / "teacher" / f"{recipe}.yaml"
        place = [f"--runs={runs}", f"--run={run.name}", f"--seed={seed}", "--loop.tracker=none"]
        train = [f"--data.train={shards / 'train'}"] if size == NUM_TRAIN else _limited(config, shards, size=size)
        program = [sys.executable, str(ROOT / "teacher" / "main.py"), "--config", str(config)]
        subprocess.run([*program, f"--data.val={shards / 'val'}", *train, *place], check=True)
    return {key: float(value) for key, value in run.read_summary()["metrics"].items()}


def _limited(path: Path, shards: Path, *, size: int) -> list[str]:
    """Options that train on `size` images with the recipe's numbers of steps, whatever is counted in epochs."""
    config, _ = parse_config(Config, argv=["--config", str(path)])
    scale = NUM_TRAIN / size
    return [
        f"--data.train=[{{shards: {shards / 'train'}, limit: {size}}}]",
        f"--max_steps={int(config.epochs * NUM_TRAIN / config.data.batch_size)}",
        f"--validate_every={config.validate_every * scale}",
        f"--optim.warmup_epochs={config.optim.warmup_epochs * scale}",
    ]


def _table(scores: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for name, runs in scores.items():
        cells = []
        for metric in SHOWN:
            values = [run[f"attention/{metric}"] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = next(iter(scores.values()))[0]
    for row in BASELINES:
        cells = [f"{first[f'{row}/{metric}']:.3f}" for metric in SHOWN]
        lines.append(f"| {row.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder for runs and shards")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: 0 1 2; with --sizes 0)")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of training images: the learning curve instead")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="(default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
