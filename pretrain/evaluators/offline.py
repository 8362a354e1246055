"""Evaluators on a finished run, or on an encoder from elsewhere."""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.numpy import save_file

from engine.environment import git_commit
from engine.errors import InputError
from engine.files import atomic_write, sha256_of, write_json
from engine.launch import build_accelerator
from engine.program import config_to_dict
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.cache import key_digest
from pretrain.evaluators.classes import unseen_classes
from pretrain.evaluators.registry import OWN, pick
from pretrain.evaluators.sources import check_needs, limit_notes, train_images
from pretrain.evaluators.subjects import open_subject
from pretrain.probe_config import ProbeConfig
from shards.reader import ShardSet

# What changes nothing in a result, or where it is written.
FREE = ("run", "output", "evaluators", "remote", "batch_size", "num_workers", "cache", "keep_cache")
# Of the evaluators whose numbers add up over corruptions, the sections of options that they do not read.
UNREAD = {
    "imagenet_c": ("knn", "gaze_options", "retrieval", "finetune"),
    "robust_gaze": ("knn", "retrieval", "finetune"),
}


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
    for line in limit_notes(chosen, config):
        subject.report(line)
    run = output_folder(config, subject)
    if config.keep_cache:
        subject = replace(subject, cache=config.cache or run.path / "probe" / "cache")
    for evaluator in chosen:
        started = time.monotonic()
        subject.report(f"{evaluator.name}: {subject.name}")
        result = evaluator.run(subject, config)
        if ranks.is_main:
            write_result(run, evaluator, result, subject, config)
        subject.report(describe(evaluator, result) + f" [{time.monotonic() - started:.0f} s]")
    ranks.barrier()


def check_probe(config: ProbeConfig) -> list[str]:
    """Validate evaluators, encoder and shards without evaluating."""
    chosen = pick(config.evaluators)
    subject = open_subject(config, ranks=Ranks(), device=torch.device("cpu"))
    lines = [f"encoder: {subject.name}, hash {subject.hash[:12]}, {subject.image_size} px"]
    lines += [line for evaluator in chosen for line in check_needs(evaluator, config)]
    lines += limit_notes(chosen, config)
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


def write_result(run: RunFolder, evaluator: Evaluator, result: Result, subject: Subject, config: ProbeConfig) -> None:
    """Merge a result into the run's summary and write its maps, tables and pictures.

    Raises:
        InputError: a metric that is not finite, which JSON cannot hold.
    """
    with locked(run):
        write_locked(run, evaluator, result, subject, config)


def write_locked(run: RunFolder, evaluator: Evaluator, result: Result, subject: Subject, config: ProbeConfig) -> None:
    """As `write_result`, for one who holds `locked`."""
    broken = [name for name, value in result.metrics.items() if not np.isfinite(value)]
    if broken:
        raise InputError(f"evaluator '{evaluator.name}' gave {broken[0]} = {result.metrics[broken[0]]}: repair it")
    folder = run.path / "probe"
    mark = _mark(run, evaluator)
    mark.parent.mkdir(exist_ok=True)
    mark.unlink(missing_ok=True)  # a kill between mark and numbers must not leave the one for the others
    if result.maps:
        maps = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in result.maps.items()}
        save_file(maps, folder / f"{evaluator.name}.safetensors")
    if result.tables:
        write_json(folder / f"{evaluator.name}.json", result.tables)
    for name, picture in result.pictures.items():
        _, data = cv2.imencode(".png", picture[..., ::-1])
        atomic_write(folder / f"{evaluator.name}-{name}.png", data.tobytes())
    protocols = run.read_summary().get("protocols", {})
    whole = measured_on(result, subject, train_limits(evaluator, config))
    protocols[evaluator.name] = {"encoder": subject.hash, "commit": git_commit()} | whole
    metrics = {f"{evaluator.label}/{name}": float(value) for name, value in result.metrics.items()}
    _drop_stale(run, f"{evaluator.label}/", keep=metrics)
    run.write_summary(metrics, step=subject.step, protocols=protocols)
    write_json(mark, options_key(evaluator, subject, config))


def measured_on(result: Result, subject: Subject, limits: dict[str, int]) -> dict[str, Any]:
    """A result's protocol, and what belongs into every one: input size, `train_limits`."""
    return {"image_size": subject.image_size} | result.protocol | limits


def train_limits(evaluator: Evaluator, config: ProbeConfig) -> dict[str, int]:
    """For protocols: the number of classes that max_train leaves without a training image; empty where all have one."""
    if "train" not in evaluator.needs:
        return {}
    train = train_images(config)
    unseen = unseen_classes(train.shards, train.numbers)
    return {"classes_without_training_images": len(unseen)} if unseen else {}


def options_key(evaluator: Evaluator, subject: Subject, config: ProbeConfig) -> dict[str, str]:
    """All that decides what an evaluator finds, but for which corruptions it has got to."""
    unread = (*FREE, *UNREAD.get(evaluator.name, ()))
    options = {name: value for name, value in config_to_dict(config).items() if name not in unread}
    if evaluator.name in OWN:
        folder = options.pop("corruptions")["folder"]
        options |= {"folder": folder} if evaluator.name in UNREAD else {}
    sets = {need: ShardSet(getattr(config, need), remote=config.remote).digest for need in evaluator.needs}
    lists = [sha256_of(path) for path in config.finetune.lists if path.is_file()]
    return {"encoder": subject.hash, "options": key_digest([options, sets, lists])}


def read_mark(run: RunFolder, evaluator: Evaluator) -> dict[str, str] | None:
    """`options_key` of what the summary says of an evaluator; None where that is unknown."""
    try:
        found: dict[str, str] = json.loads(_mark(run, evaluator).read_bytes())
        return found
    except (OSError, ValueError):
        return None


def _mark(run: RunFolder, evaluator: Evaluator) -> Path:
    return run.path / "probe" / "finished" / f"{evaluator.name}.json"


def _drop_stale(run: RunFolder, prefix: str, *, keep: dict[str, float]) -> None:
    """Remove what an earlier evaluation said and this one does not: a partial mean, a row that was left out."""
    summary = run.read_summary()
    stale = [name for name in summary.get("metrics", {}) if name.startswith(prefix) and name not in keep]
    if stale:
        for name in stale:
            del summary["metrics"][name]
        write_json(run.summary_file, summary)


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Jobs of an array write into one summary: one at a time."""
    folder = run.path / "probe"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        yield
