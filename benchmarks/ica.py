"""Captioning with and without the ICA loss on real data: `python benchmarks/ica.py --help`.

Runs (or takes, where it is finished) the tables of configs/downstream/caption_{flickr8k,coco}.yaml, every arm and seed
with the same training budget on the same frozen features; `--jobs` runs go side by side as processes of one thread.
Where Java is missing METEOR is left out, and the same command completes it later where there is one.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import environment, report

from downstream.captioning.data import CaptionTask
from downstream.captioning.scoring import finish_scores, needs_scores
from downstream.captioning.table import PAPER_MATCHED, Cell, paper_set, table_of, tabulate, write_caption_table
from downstream.captioning.trainer import arms_of, train_captioner
from downstream.config import DownstreamConfig
from downstream.stage import stage_folder
from engine.launch import build_accelerator
from engine.program import parse_config
from engine.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
NOTES = """Show, Attend and Tell on frozen ImageNet features of EfficientNet-Lite0, trained with the words alone
(`baseline`), with the ICA loss (Kim et al.: 0.1 times the Lovasz hinge of a word's attention energies against the mask
of the object that it names; centred on their mean in `ica`, on the middle between their means inside and outside the
mask in `ica_middle`), and with the KLD to the normalised mask instead (`kld`). All arms have the same images, seeds,
epochs and batches; the epoch is chosen on held-out images. Mean and standard deviation over seeds, and the gain over
the baseline with the p-value of the paired t-test over seeds. The paper's values, in the last lines, are of the whole
data sets with another encoder: they say how large the paper's gain is, not what these numbers should be."""


def main() -> None:
    """Run the tables that the options give data for, and write `results/ica.{json,md}`."""
    options = _options()
    configs = _configs(options)
    tasks = {name: CaptionTask(config) for name, config in configs.items()}  # features are computed here, once
    _train_all(configs, jobs=options.jobs)
    figures: dict[str, float] = {}
    tables, facts = [], {}
    for name, config in configs.items():
        results = _results(config)
        write_caption_table(config, tasks[name], results)
        rows = tabulate(results)
        figures |= _figures(name, rows)
        figures[f"{name}_matched_objects"] = tasks[name].facts["matched_objects_per_caption"]["train"]
        tables.append(_section(name, config, tasks[name], rows))
        facts[name] = {key: tasks[name].facts[key] for key in ("sizes", "split", "grid", "vocabulary")}
    report(
        "ica",
        by_machine=False,
        figures=figures,
        environment=environment(seeds=options.seeds, trained_on=_devices(configs), **facts),
        title="Captioning with the ICA loss",
        notes=NOTES,
        table="\n\n".join(tables),
    )


def _configs(options: argparse.Namespace) -> dict[str, DownstreamConfig]:
    """Data set to its config, for those whose data is given."""
    given = {"flickr8k": (options.flickr8k, options.detections), "coco": (options.coco, options.instances)}
    files = {"flickr8k": "detections.json", "coco": "instances.json"}
    configs = {}
    for name, (folder, objects) in given.items():
        if folder is not None:
            recipe = str(ROOT / "configs" / "downstream" / f"caption_{name}.yaml")
            words = [
                "--config",
                recipe,
                f"--data.path={folder}",
                f"--caption.objects={objects or folder / files[name]}",
            ]
            words += ["--runs", str(options.runs), f"--caption.cache={options.runs / 'features'}"]
            words += ["--seeds", str(options.seeds), "--loop.tracker", "none", *options.override]
            configs[name], _ = parse_config(DownstreamConfig, argv=words)
    return configs


def _train_all(configs: dict[str, DownstreamConfig], *, jobs: int) -> None:
    """Train what is not finished, `jobs` runs at a time, and complete scores for which there is a Java now."""
    waiting = []
    for name, config in configs.items():
        for seed in range(config.seed, config.seed + config.seeds):
            for arm in arms_of(config):
                run = stage_folder(config, arm=arm, seed=seed)
                if not run.read_summary():
                    waiting.append((name, config, arm, seed))
                elif needs_scores(run):
                    finish_scores(run)
    started = time.perf_counter()
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        # the longest first, so that the last to end is a short one
        futures = {pool.submit(_train, config, arm, seed): (name, arm, seed) for name, config, arm, seed in waiting}
        for number, future in enumerate(as_completed(futures), start=1):
            name, arm, seed = futures[future]
            metrics, took = future.result()
            print(
                f"{number}/{len(waiting)} {name} {arm} seed {seed}: BLEU-4 {metrics['test/bleu4']:.4f}, "
                f"CIDEr {metrics['test/cider']:.4f}, {took:.0f} s (after {time.perf_counter() - started:.0f} s)",
                flush=True,
            )


def _train(config: DownstreamConfig, arm: str, seed: int) -> tuple[dict[str, float], float]:
    """One run, in a process of its own; what it says goes into a log beside its folder."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    run = stage_folder(config, arm=arm, seed=seed)
    config.runs.mkdir(parents=True, exist_ok=True)
    with open(run.path.with_suffix(".log"), "a") as log, redirect_stdout(log), redirect_stderr(log):
        build_accelerator(precision=config.precision, seed=seed)
        train_captioner(CaptionTask(config), config, arm=arm, seed=seed, ranks=Ranks())
    return run.read_summary()["metrics"], time.perf_counter() - started


def _devices(configs: dict[str, DownstreamConfig]) -> str:
    """Where the runs were trained, which need not be where they were scored."""
    runs = [
        stage_folder(config, arm=arm, seed=seed)
        for config in configs.values()
        for arm in arms_of(config)
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    return ", ".join(sorted({str(run.read_summary()["environment"]["device"]) for run in runs}))


def _results(config: DownstreamConfig) -> dict[tuple[str, int], dict[str, float]]:
    seeds = range(config.seed, config.seed + config.seeds)
    return {
        (arm, seed): stage_folder(config, arm=arm, seed=seed).read_summary()["metrics"]
        for arm in arms_of(config)
        for seed in seeds
    }


def _figures(name: str, rows: dict[str, dict[str, Cell]]) -> dict[str, float]:
    figures = {f"{name}_bleu4_baseline": rows["baseline"]["test/bleu4"].mean}
    for arm, cells in rows.items():
        for key, cell in cells.items():
            if cell.gain is not None and (key in ("test/bleu4", "test/cider") or key.startswith("attention/")):
                label = f"{name}_{key.split('/')[1]}_gain" + ("" if arm == "ica" else f"_{arm}")
                figures[label] = cell.gain
    return figures


def _section(name: str, config: DownstreamConfig, task: CaptionTask, rows: dict[str, dict[str, Cell]]) -> str:
    columns, lines = table_of(rows, paper=paper_set(config.caption, task.facts))
    facts: dict[str, Any] = task.facts
    sizes, matched = facts["sizes"], facts["matched_objects_per_caption"]
    unavailable: dict[str, str] = {}
    for arm in rows:
        summary = stage_folder(config, arm=arm, seed=config.seed).read_summary()
        unavailable |= summary.get("unavailable", {})
    text = [
        f"## {name}",
        "",
        f"{sizes['train']['images']} images to train, {sizes['val']['images']} to choose the epoch, "
        f"{sizes['test']['images']} to test ({facts['split']}); {config.epochs:g} epochs of batch "
        f"{config.data.batch_size}, beam {config.caption.beam}, vocabulary {facts['vocabulary']}. Matched objects per "
        f"caption: {matched['train']:.2f} (train), {matched['test']:.2f} (test); the paper: about {PAPER_MATCHED}. "
        f"Tokenizer: {summary['tokenizer']}. "
        + " ".join(f"{metric} is unavailable: {why}." for metric, why in unavailable.items()),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]
    return "\n".join(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder for runs")
    parser.add_argument("--flickr8k", type=Path, help="folder with captions.txt and images/; left out without it")
    parser.add_argument("--detections", type=Path, help="objects of the former; default: its detections.json")
    parser.add_argument("--coco", type=Path, help="folder with captions.json and images/; left out without it")
    parser.add_argument("--instances", type=Path, help="objects of the former; default: its instances.json")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("override", nargs="*", help="options of the recipes, e.g. -- --epochs 2 --caption.beam 1")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
