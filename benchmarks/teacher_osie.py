"""OSIE teachers over several seeds: `SACCADE_DATA=FOLDER python benchmarks/teacher_osie.py --runs RUNS`.

FOLDER holds `osie/`. Packs the fixed split of 500 and 200 images, trains `configs/teacher/osie.yaml` (from scratch) and
`osie_pretrained.yaml` (ImageNet weights) once per seed, and collects what the runs measured. Runs that are finished are
taken as they are, so it may be stopped and started again.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import environment, report
from engine.runs import RunFolder
from shards.pack import pack
from shards.sources.osie import Osie

ROOT = Path(__file__).resolve().parent.parent
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


def main() -> None:
    """Train what is missing, and write `results/teacher_osie.{json,md}`."""
    options = _options()
    shards = options.runs / "osie_shards"
    for split in ("train", "val"):
        if not (shards / split / "manifest.json").exists():
            pack(Osie(Path(os.environ["SACCADE_DATA"]) / "osie", split=split), shards / split, shard_samples=100)
    scores: dict[str, list[dict[str, float]]] = {}
    for name, recipe in RECIPES.items():
        if name in options.only:
            scores[name] = [_run(recipe, seed, shards, options.runs) for seed in options.seeds]
    figures = {}
    for name, runs in scores.items():
        for metric in ("nss", "cc", "kld", "auc_judd"):
            values = [run[f"attention/{metric}"] for run in runs]
            figures[f"{name}_{metric}"] = statistics.mean(values)
            figures[f"{name}_{metric}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    more = environment(seeds=options.seeds)
    title, table = "Teachers on OSIE", _table(scores)
    report("teacher_osie", figures=figures, environment=more, title=title, notes=NOTES, table=table)


def _run(recipe: str, seed: int, shards: Path, runs: Path) -> dict[str, float]:
    """Metrics of one run, trained if it is not finished."""
    run = RunFolder(runs / f"{recipe}-seed{seed}")
    if not run.read_summary():
        data = [f"--data.{split}={shards / split}" for split in ("train", "val")]
        place = [f"--runs={runs}", f"--run={run.name}", f"--seed={seed}", "--loop.tracker=none"]
        program = [sys.executable, str(ROOT / "teacher" / "main.py")]
        config = str(ROOT / "configs" / "teacher" / f"{recipe}.yaml")
        subprocess.run([*program, "--config", config, *data, *place], check=True)
    return {key: float(value) for key, value in run.read_summary()["metrics"].items()}


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="(default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
