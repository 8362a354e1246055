"""What every benchmark needs: the environment it ran in, timing in pairs, and results written the same way."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.environment import environment as engine_environment

RESULTS = Path(__file__).resolve().parent / "results"


def add_source(parser: argparse.ArgumentParser, *, holds: str, below: str = "") -> None:
    """Add `--source`, the folder of the images that a benchmark is run on.

    Where it is not given, it is the folder that the environment variable SACCADE_DATA names, or `below` in it; without
    either the program ends with one line and exit code 2.

    Args:
        holds: what the folder must hold, for messages.
    """

    def folder(text: str) -> Path:
        if text and Path(text).is_dir():
            return Path(text)
        found = f"{text} is no folder" if text else "no --source given, and SACCADE_DATA is not set"
        parser.exit(2, f"{parser.prog}: {found}: give a folder with {holds} as --source\n")

    data = os.environ.get("SACCADE_DATA", "")
    default = str(Path(data, below)) if data else ""
    parser.add_argument("--source", type=folder, default=default, help=f"folder with {holds} (default: SACCADE_DATA)")


def environment(**more: Any) -> dict[str, Any]:
    """Return what a figure depends on: versions, processor, cores, commit, and whatever the benchmark adds."""
    return {**engine_environment(), **more}


def time_pairs(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    num_pairs: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Time two functions by turns, so that a busy moment of the machine hits both.

    Args:
        ours: called without arguments.
        theirs: called without arguments.
        num_pairs: number of timed pairs.
        warmup: untimed pairs before.
        clock: seconds; `time.process_time` for the processor time of this process, which other programs disturb less.

    Returns:
        Seconds of each call of `ours` and of `theirs`.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(warmup + num_pairs):
        for function, taken in zip((ours, theirs), times, strict=True):
            start = clock()
            function()
            if pair >= warmup:
                taken.append(clock() - start)
    return times


def ratio_of_pairs(ours: list[float], theirs: list[float]) -> float:
    """Median over pairs of `theirs / ours`: above 1, ours is faster."""
    return statistics.median(other / own for own, other in zip(ours, theirs, strict=True))


def report(
    name: str,
    *,
    figures: Mapping[str, float],
    environment: Mapping[str, Any],
    title: str,
    notes: str,
    table: str = "",
    by_machine: bool = True,
) -> None:
    """Write `results/NAME.json` and `.md`, and print the result as one line of JSON.

    Speeds and memory that a machine with a GPU measured go to `results/gpu/`, beside those of a machine without one.

    Args:
        name: of the benchmark.
        figures: name to number; ratios are named `<ours>_vs_<theirs>`, above 1 meaning ours is better.
        environment: of `environment()`.
        title: headline of the page.
        notes: what was measured on what, in Markdown.
        table: further tables, in Markdown.
        by_machine: the figures are of the machine; false for accuracies, which any machine may find.
    """
    result = {"benchmark": name, "figures": dict(figures), "environment": dict(environment)}
    rows = "\n".join(f"| {figure} | {value:.4g} |" for figure, value in figures.items())
    facts = "\n".join(f"- {key}: {value}" for key, value in environment.items())
    parts = [f"# {title}", notes, f"| Figure | Value |\n|---|---|\n{rows}", table, f"Measured with:\n\n{facts}"]
    folder = RESULTS / "gpu" if by_machine and torch.cuda.is_available() else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
