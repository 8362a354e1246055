"""Evaluators on a finished run, or on an encoder from elsewhere."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.numpy import save_file

from engine.environment import git_commit
from engine.errors import InputError
from engine.files import atomic_write, write_json
from engine.launch import build_accelerator
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.registry import pick
from pretrain.evaluators.sources import check_needs
from pretrain.evaluators.subjects import open_subject
from pretrain.probe_config import ProbeConfig


def probe_run(config: ProbeConfig) -> None:
    """Run the chosen evaluators.

    Metrics go to `summary.json`, predicted maps to `probe/<evaluator>.safetensors`, tables to `probe/<evaluator>.json`,
    pictures to `probe/<evaluator>-<name>.png`.

    Raises:
        InputError: unknown evaluator, unfinished run, shards that do not fit.
    """
    chosen = pick(config.evaluators)
    accelerator = build_accelerator(seed=config.seed)
    ranks = Ranks()
    subject = open_subject(config, ranks=ranks, device=accelerator.device)
    for evaluator in chosen:
        check_needs(evaluator, config)
    run = output_folder(config, subject)
    if config.keep_cache:
        subject = replace(subject, cache=config.cache or run.path / "probe" / "cache")
    for evaluator in chosen:
        started = time.monotonic()
        subject.report(f"{evaluator.name}: {subject.name}")
        result = evaluator.run(subject, config)
        if ranks.is_main:
            write_result(run, evaluator, result, subject)
        subject.report(describe(evaluator, result) + f" [{time.monotonic() - started:.0f} s]")
    ranks.barrier()


def check_probe(config: ProbeConfig) -> list[str]:
    """Validate evaluators, encoder and shards without evaluating."""
    chosen = pick(config.evaluators)
    subject = open_subject(config, ranks=Ranks(), device=torch.device("cpu"))
    lines = [f"encoder: {subject.name}, hash {subject.hash[:12]}, {subject.image_size} px"]
    lines += [line for evaluator in chosen for line in check_needs(evaluator, config)]
    return list(dict.fromkeys(lines))


def output_folder(config: ProbeConfig, subject: Subject) -> RunFolder:
    """Where the results go: the run itself, or a folder named for the encoder."""
    if config.output is not None:
        return RunFolder(config.output)
    if config.encoder is None:
        assert config.run is not None
        return RunFolder(config.run)
    return RunFolder(Path("runs") / f"probe-{subject.name}-{subject.hash[:8]}")


def describe(evaluator: Evaluator, result: Result) -> str:
    """One line: the evaluator, the options that belong to its numbers, the numbers."""
    shown = list(result.metrics.items())
    text = ", ".join(f"{name} {value:.4g}" for name, value in shown[:8])
    more = f", ... ({len(shown)} in all)" if len(shown) > 8 else ""
    return f"{evaluator.name}{f' ({result.note})' if result.note else ''}: {text}{more}"


def write_result(run: RunFolder, evaluator: Evaluator, result: Result, subject: Subject) -> None:
    """Merge a result into the run's summary and write its maps, tables and pictures.

    Raises:
        InputError: a metric that is not finite, which JSON cannot hold.
    """
    broken = [name for name, value in result.metrics.items() if not np.isfinite(value)]
    if broken:
        raise InputError(f"evaluator '{evaluator.name}' gave {broken[0]} = {result.metrics[broken[0]]}: repair it")
    folder = run.path / "probe"
    folder.mkdir(parents=True, exist_ok=True)
    if result.maps:
        maps = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in result.maps.items()}
        save_file(maps, folder / f"{evaluator.name}.safetensors")
    if result.tables:
        write_json(folder / f"{evaluator.name}.json", result.tables)
    for name, picture in result.pictures.items():
        _, data = cv2.imencode(".png", picture[..., ::-1])
        atomic_write(folder / f"{evaluator.name}-{name}.png", data.tobytes())
    with _locked(folder):
        protocols = run.read_summary().get("protocols", {})
        protocols[evaluator.name] = {"encoder": subject.hash, "commit": git_commit(), **result.protocol}
        metrics = {f"{evaluator.label}/{name}": float(value) for name, value in result.metrics.items()}
        _drop_stale(run, f"{evaluator.label}/", keep=metrics)
        run.write_summary(metrics, step=subject.step, protocols=protocols)


def _drop_stale(run: RunFolder, prefix: str, *, keep: dict[str, float]) -> None:
    """Remove what an earlier evaluation said and this one does not: a partial mean, a row that was left out."""
    summary = run.read_summary()
    stale = [name for name in summary.get("metrics", {}) if name.startswith(prefix) and name not in keep]
    if stale:
        for name in stale:
            del summary["metrics"][name]
        write_json(run.summary_file, summary)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Jobs of an array write into one summary: one at a time."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        yield
