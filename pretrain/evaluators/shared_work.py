"""Evaluations shared out among the tasks of an array, which add up in the runs' folders.

A piece of work is an evaluator on a run; of `imagenet_c`, one corruption. What is finished leaves a mark, so that a
repeated task does only what is missing: `imagenet_c` has a file for each error it measured, of the others there is
`probe/finished/<evaluator>.json`.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch

from engine.array_task import array_task
from engine.errors import InputError
from engine.files import sha256_of, write_json
from engine.program import config_to_dict
from engine.progress import report
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.evaluators.base import Result, Subject
from pretrain.evaluators.cache import key_digest
from pretrain.evaluators.corruptions import COMMON, SEVERITIES, choose_corruptions, summarise
from pretrain.evaluators.errors_kept import KeptErrors
from pretrain.evaluators.imagenet_c import CorruptedSets
from pretrain.evaluators.imagenet_c import evaluator as imagenet_c
from pretrain.evaluators.offline import output_folder, probe_run, write_result
from pretrain.evaluators.registry import OWN, pick
from pretrain.evaluators.sources import labelled_pair
from pretrain.evaluators.subjects import open_subject
from pretrain.probe_array_config import ProbeArrayConfig
from pretrain.probe_config import ProbeConfig

# What changes nothing in a result, or where it is written.
FREE = ("run", "output", "evaluators", "batch_size", "num_workers", "cache", "keep_cache")


@dataclass(frozen=True)
class Piece:
    """An evaluator on a run; `corruption` is empty but for `imagenet_c`."""

    run: Path
    evaluator: str
    corruption: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (str(self.run), self.evaluator, self.corruption) if part)


class SharedRun:
    """One run of an array: what is finished of it, and how the rest is done.

    Raises:
        InputError: a run that is not finished, or whose encoder cannot be read.
    """

    def __init__(self, config: ProbeArrayConfig, run: Path) -> None:
        options = {field.name: getattr(config, field.name) for field in fields(ProbeConfig)}
        self.probe = replace(ProbeConfig(**options), run=run)
        self.folder = RunFolder(run)
        self.subject: Subject = open_subject(self.probe, ranks=Ranks(), device=torch.device("cpu"))

    @cached_property
    def corrupted(self) -> tuple[CorruptedSets, KeptErrors]:
        """The corrupted sets of `imagenet_c`, and the errors that are known."""
        train, val = labelled_pair(self.probe)
        sets = CorruptedSets(self.subject, self.probe, val)
        cache = self.probe.cache or output_folder(self.probe, self.subject).path / "probe" / "cache"
        return sets, KeptErrors(cache, sets.key(self.subject, train))

    def finished(self, piece: Piece) -> bool:
        """Whether nothing is left to do of a piece."""
        protocol = self.folder.read_summary().get("protocols", {}).get(piece.evaluator, {})
        if protocol.get("encoder") != self.subject.hash:
            return False
        if piece.corruption:
            sets, kept = self.corrupted
            return all(kept.has(condition) for condition in sets.conditions() if condition[0] == piece.corruption)
        try:
            return json.loads(self._mark(piece.evaluator).read_bytes()) == self._key(piece.evaluator)
        except (OSError, ValueError):
            return False

    def do(self, pieces: list[Piece]) -> None:
        """Evaluate; `imagenet_c` trains its probe once for all its corruptions."""
        names = [piece.corruption for piece in pieces if piece.corruption]
        for piece in pieces:
            if not piece.corruption:
                probe_run(replace(self.probe, evaluators=piece.evaluator))
                self._mark(piece.evaluator).parent.mkdir(parents=True, exist_ok=True)
                write_json(self._mark(piece.evaluator), self._key(piece.evaluator))
        if names:
            chosen = replace(self.probe.corruptions, names=names)
            probe_run(replace(self.probe, evaluators=imagenet_c.name, corruptions=chosen))

    def merge(self) -> None:
        """Bring the summary up to the errors that any task has kept; the last of several tasks sees them all."""
        sets, kept = self.corrupted
        with self._merging():
            summary = self.folder.read_summary()
            protocol = dict(summary.get("protocols", {}).get(imagenet_c.name, {}))
            if protocol.get("encoder") != self.subject.hash:
                return
            clean = 1 - summary["metrics"][f"{imagenet_c.label}/clean_top1"] / 100
            errors = kept.all()
            metrics, state = summarise(errors, clean=clean, alexnet=sets.layout != "array")
            whole = [s for s in SEVERITIES if all(s in errors.get(name, {}) for name in COMMON)]
            means = [100 * (1 - sum(errors[name][s] for name in COMMON) / len(COMMON)) for s in whole]
            tables = {"by_severity": {"severity": [float(s) for s in whole], "top1": means}} if whole else {}
            result = Result(metrics, protocol | state, tables=tables)
            write_result(self.folder, imagenet_c, result, self.subject)
        missing = sum(len(severities) for severities in state["missing"].values())
        report(f"{self.folder.path}: imagenet_c {'complete' if not missing else f'PARTIAL, {missing} of 75 missing'}")

    @contextmanager
    def _merging(self) -> Iterator[None]:
        with open(self.folder.path / "probe" / ".merging", "w") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            yield

    def _mark(self, evaluator: str) -> Path:
        return self.folder.path / "probe" / "finished" / f"{evaluator}.json"

    def _key(self, evaluator: str) -> dict[str, str]:
        options = {name: value for name, value in config_to_dict(self.probe).items() if name not in FREE}
        if evaluator in OWN and evaluator != "robust_gaze":
            del options["corruptions"]
        needs = pick(evaluator)[0].needs
        sets = {need: sha256_of(getattr(self.probe, need) / "manifest.json") for need in needs}
        return {"encoder": self.subject.hash, "options": key_digest([options, sets])}


def pieces_of(config: ProbeArrayConfig) -> list[Piece]:
    """All pieces of work of the whole array, in an order that depends on the options alone."""
    names = choose_corruptions(config.corruptions.names)
    runs = config.runs or ([config.run] if config.run is not None else [])
    chosen = [evaluator.name for evaluator in pick(config.evaluators)]
    return [
        Piece(run, evaluator, corruption)
        for run in runs
        for evaluator in chosen
        for corruption in (names if evaluator == imagenet_c.name else ("",))
    ]


def run_share(config: ProbeArrayConfig) -> None:
    """Do what is missing of this task's pieces, run by run.

    Raises:
        InputError: options that an array cannot have; at the end, runs that could not be evaluated.
    """
    errors = []
    for path, pieces in _share(config).items():
        try:
            shared = SharedRun(config, path)
            missing = [piece for piece in pieces if not shared.finished(piece)]
            report(f"{path}: {len(missing)} of this task's {len(pieces)} pieces are to be done")
            shared.do(missing)
            if any(piece.corruption for piece in pieces):
                shared.merge()
        except InputError as error:
            report(f"{path} is left out: {error}")
            errors.append(str(error))
    if errors:
        raise InputError("; ".join(errors))


def describe_share(config: ProbeArrayConfig) -> list[str]:
    """This task's pieces and their state, without evaluating."""
    lines = [f"{len(pieces_of(config))} pieces in all; this task's:"]
    for path, pieces in _share(config).items():
        shared = SharedRun(config, path)
        lines += [f"{piece}: {'finished' if shared.finished(piece) else 'to be done'}" for piece in pieces]
    return lines


def _share(config: ProbeArrayConfig) -> dict[Path, list[Piece]]:
    if config.encoder is not None or config.output is not None:
        raise InputError("encoder and output are for a single probe: give --runs, each gets its own results")
    if not config.keep_cache:
        raise InputError("keep_cache false: the tasks of an array share the kept features and errors; leave it true")
    task, count = array_task(config.task, config.num_tasks)
    mine: dict[Path, list[Piece]] = {}
    for piece in pieces_of(config)[task::count]:
        mine.setdefault(piece.run, []).append(piece)
    return mine
