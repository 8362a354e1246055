"""Evaluations shared out among the tasks of an array, which add up in the runs' folders.

A piece of work is an evaluator on a run; of `imagenet_c` and `robust_gaze`, one corruption. What is finished leaves a
mark, so that a repeated task does only what is missing: `probe/finished/<evaluator>.json` says under which options the
numbers in the summary were measured, and those two have a file for each condition as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from engine.array_task import array_task
from engine.errors import Fault, InputError
from engine.progress import report
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.evaluators import imagenet_c, robust_gaze
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.corruptions import COMMON, SEVERITIES, choose_corruptions
from pretrain.evaluators.imagenet_c import CorruptedSets
from pretrain.evaluators.kept import Condition, KeptNumbers
from pretrain.evaluators.offline import locked, options_key, output_folder, probe_run, read_mark, write_locked
from pretrain.evaluators.registry import pick
from pretrain.evaluators.sources import labelled_pair
from pretrain.evaluators.subjects import open_subject
from pretrain.probe_array_config import ProbeArrayConfig
from pretrain.probe_config import ProbeConfig

State = Literal["finished", "to be done", "absent"]


@dataclass(frozen=True)
class Split:
    """An evaluator whose pieces of work are corruptions.

    Attributes:
        opened: corrupted sets, and what is known of them.
        merged: result of what is known, from the protocol and metrics of what was written last.
    """

    evaluator: Evaluator
    opened: Callable[[Subject, ProbeConfig], tuple[CorruptedSets, KeptNumbers]]
    merged: Callable[[KeptNumbers, dict[str, Any], dict[str, float], CorruptedSets], Result]


def _errors(subject: Subject, probe: ProbeConfig) -> tuple[CorruptedSets, KeptNumbers]:
    train, val = labelled_pair(probe)
    sets = CorruptedSets(subject, probe, val)
    return sets, imagenet_c.kept_errors(subject, probe, sets, train)


def _moves(subject: Subject, probe: ProbeConfig) -> tuple[CorruptedSets, KeptNumbers]:
    train, val = labelled_pair(probe)
    sets = robust_gaze.twins(subject, probe, val)
    return sets, robust_gaze.kept_moves(subject, probe, sets, train)


def _merged_errors(
    kept: KeptNumbers, protocol: dict[str, Any], metrics: dict[str, float], corrupted: CorruptedSets
) -> Result:
    clean = 1 - metrics[f"{imagenet_c.evaluator.label}/clean_top1"] / 100
    return imagenet_c.summary(kept.all(), clean=clean, protocol=protocol, corrupted=corrupted)


def _merged_moves(
    kept: KeptNumbers, protocol: dict[str, Any], metrics: dict[str, float], corrupted: CorruptedSets
) -> Result:
    return robust_gaze.summary(kept.all(), protocol=protocol)


SPLIT = {
    "imagenet_c": Split(imagenet_c.evaluator, _errors, _merged_errors),
    "robust_gaze": Split(robust_gaze.evaluator, _moves, _merged_moves),
}


@dataclass(frozen=True)
class Piece:
    """An evaluator on a run; `corruption` is empty but for those of `SPLIT`."""

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
        self._corrupted: dict[str, tuple[CorruptedSets, KeptNumbers]] = {}

    def corrupted(self, evaluator: str) -> tuple[CorruptedSets, KeptNumbers]:
        """The corrupted sets of a split evaluator, and what is known of them."""
        if evaluator not in self._corrupted:
            folder = self.probe.cache or output_folder(self.probe, self.subject).path / "probe" / "cache"
            self._corrupted[evaluator] = SPLIT[evaluator].opened(replace(self.subject, cache=folder), self.probe)
        return self._corrupted[evaluator]

    def state(self, piece: Piece) -> State:
        """What is left to do of a piece.

        "finished": the summary has its numbers, and no other probe's. "absent": the released set has none of its
        images, which is a gap like others, whether or not another task has found something yet.

        Raises:
            InputError: a released set without any of the corruptions of the array.
        """
        released = piece.evaluator == "imagenet_c" and self.probe.corruptions.folder is not None
        if released and not self._conditions(piece):
            return "absent"
        with locked(self.folder):  # while another task writes, the numbers have no mark
            measured = self._is_in_summary(piece.evaluator)
        if not measured:
            return "to be done"
        if not piece.corruption:
            return "finished"
        _, kept = self.corrupted(piece.evaluator)
        return "finished" if all(map(kept.has, self._conditions(piece))) else "to be done"

    def do(self, pieces: list[Piece]) -> None:
        """Evaluate; a split evaluator trains its probe once for all its corruptions."""
        names: dict[str, list[str]] = {}
        for piece in pieces:
            if piece.corruption:
                names.setdefault(piece.evaluator, []).append(piece.corruption)
                continue
            probe_run(replace(self.probe, evaluators=piece.evaluator))
        for evaluator, chosen in names.items():
            probe_run(
                replace(self.probe, evaluators=evaluator, corruptions=replace(self.probe.corruptions, names=chosen))
            )

    def merge(self, evaluator: str) -> None:
        """Bring the summary up to what any task has kept; the last of several tasks sees it all."""
        sets, kept = self.corrupted(evaluator)
        split = SPLIT[evaluator]
        with locked(self.folder):
            if not self._is_in_summary(evaluator):
                report(f"{self.folder.path}: {evaluator} was measured in another way meanwhile: submit again")
                return
            summary = self.folder.read_summary()
            result = split.merged(kept, dict(summary["protocols"][evaluator]), summary["metrics"], sets)
            write_locked(self.folder, split.evaluator, result, self.subject, self.probe)
        found = kept.all()
        missing = sum((name, severity) not in found for name in COMMON for severity in SEVERITIES)
        report(f"{self.folder.path}: {evaluator} {'complete' if not missing else f'PARTIAL, {missing} of 75 missing'}")

    def _conditions(self, piece: Piece) -> list[Condition]:
        """Those of a corruption's conditions that are there."""
        sets, _ = self.corrupted(piece.evaluator)
        return [condition for condition in sets.conditions() if condition[0] == piece.corruption]

    def _is_in_summary(self, name: str) -> bool:
        """Whether what the summary says of an evaluator was measured with these options on these data."""
        (evaluator,) = pick(name)
        if name not in self.folder.read_summary().get("protocols", {}):
            return False
        return read_mark(self.folder, evaluator) == options_key(evaluator, self.subject, self.probe)


def pieces_of(config: ProbeArrayConfig) -> list[Piece]:
    """All pieces of work of the whole array, in an order that depends on the options alone."""
    names = choose_corruptions(config.corruptions.names)
    runs = config.runs or ([config.run] if config.run is not None else [])
    chosen = [evaluator.name for evaluator in pick(config.evaluators)]
    return [
        Piece(run, evaluator, corruption)
        for run in runs
        for evaluator in chosen
        for corruption in (names if evaluator in SPLIT else ("",))
    ]


def run_share(config: ProbeArrayConfig) -> None:
    """Do what is missing of this task's pieces, run by run.

    Raises:
        InputError: options that an array cannot have; at the end, runs that could not be evaluated.
        Fault: at the end, where a server kept one from being evaluated: the same command may do it later.
    """
    errors = list[InputError | Fault]()
    for path, pieces in _share(config).items():
        try:
            shared = SharedRun(config, path)
            states = {piece: shared.state(piece) for piece in pieces}
            missing = [piece for piece, state in states.items() if state == "to be done"]
            report(f"{path}: {len(missing)} of this task's {len(pieces)} pieces are to be done")
            shared.do(missing)
            there = [piece for piece, state in states.items() if piece.corruption and state != "absent"]
            for evaluator in dict.fromkeys(piece.evaluator for piece in there):
                shared.merge(evaluator)
        except (InputError, Fault) as error:
            report(f"{path} is left out: {error}")
            errors.append(error)
    if errors:
        kind = Fault if any(isinstance(error, Fault) for error in errors) else InputError
        raise kind("; ".join(map(str, errors)))


def describe_share(config: ProbeArrayConfig) -> list[str]:
    """This task's pieces and their state, without evaluating."""
    lines = [f"{len(pieces_of(config))} pieces in all; this task's:"]
    for path, pieces in _share(config).items():
        shared = SharedRun(config, path)
        lines += [f"{piece}: {shared.state(piece)}" for piece in pieces]
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
