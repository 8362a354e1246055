"""Evaluators during training: on a copy of the encoder, generators put back, so that training never notices."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint import rng_state, set_rng_state
from engine.environment import git_commit
from engine.errors import InputError
from engine.files import append_lines, atomic_write, read_lines
from engine.loop import Hook, Training
from pretrain.config import Config
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.offline import measured_on, train_limits
from pretrain.evaluators.registry import pick
from pretrain.evaluators.sources import check_needs, limit_notes
from pretrain.evaluators.subjects import state_hash
from pretrain.model import build_backbone, input_statistics
from pretrain.probe_config import GazeConfig, OnlineConfig, ProbeConfig
from shards.reader import ShardSet


def online_hooks(training: Training, config: Config, student: Any) -> list[tuple[int, Hook]]:
    """Hooks for `engine.loop.fit`: one that runs the evaluators of `config.online`, or none.

    Args:
        student: the module that is trained, bare; its `backbone` and `attention_heads` are copied when a hook runs.

    Raises:
        InputError: an unknown evaluator or option, or data that does not fit, before the first step.
    """
    online = config.online
    if not online.evaluators.strip():
        return []
    evaluators = pick(online.evaluators)
    probe = online_probe(config)
    for evaluator in evaluators:
        for need in evaluator.needs:
            if need != "train" and getattr(online, need) is None:
                raise InputError(f"online.{need} is needed by evaluator '{evaluator.name}': give shards")
        check_needs(evaluator, probe)
    if training is not None:  # a check has none
        for line in limit_notes(evaluators, probe):
            training.report(line)
    interval = online.every_steps or max(1, round(online.every_epochs * _steps_per_epoch(config)))
    return [(interval, OnlineEvaluation(training, config, student, evaluators=evaluators, probe=probe))]


class OnlineEvaluation:
    """Hook that evaluates a copy of the encoder; every rank calls it.

    Logs `online/<evaluator>/<metric>`, and writes what they were measured on into `probe/online.jsonl`.
    """

    def __init__(
        self, training: Training, config: Config, student: Any, *, evaluators: list[Evaluator], probe: ProbeConfig
    ) -> None:
        self.training, self.config, self.student = training, config, student
        self.evaluators, self.probe = evaluators, probe
        self.records: Records | None = None
        if training is not None and training.ranks.is_main:
            file = training.run.path / "probe" / "online.jsonl"
            self.records = Records(file, after=training.step, report=training.report)
            self.limits = {evaluator.name: train_limits(evaluator, probe) for evaluator in evaluators}

    def __call__(self, step: int) -> None:
        """Evaluate after `step` steps."""
        generators = rng_state()
        try:
            subject = self._snapshot(step)
            for evaluator in self.evaluators:
                self._evaluate(evaluator, subject, step)
        finally:
            set_rng_state(generators)

    def _snapshot(self, step: int) -> Subject:
        """A frozen copy of the encoder, the same on every rank.

        Built anew from the gathered weights: under ZeRO 3 a rank holds parts of them only, and batch norm's statistics
        are each rank's own; those of rank 0 are the ones that the encoder file gets. Where the student has a moving
        average, it is the average that is evaluated, as it is the average that the file gets.
        """
        training, student = self.training, self.student
        state = training.weights()
        if student.average is not None:
            # also while the student has the averaged weights: DeepSpeed gathers its own copies in full precision
            state = student.average.averaged(student, state)
        own = {name: state[name] for name, _ in student.named_buffers() if name in state}
        state |= training.ranks.broadcast(own)
        backbone = build_backbone(self.config)
        backbone.load_state_dict(_part(state, "backbone."))
        backbone.eval().requires_grad_(False).to(training.accelerator.device)
        return Subject(
            config=self.config,
            backbone=backbone,
            heads=_part(state, "attention_heads."),
            hash=state_hash(backbone),
            name=f"{training.run.name} after step {step}",
            step=step,
            statistics=input_statistics(backbone),
            device=training.accelerator.device,
            ranks=training.ranks,
            report=training.report,
            shared={},  # as long as the copy itself
        )

    def _evaluate(self, evaluator: Evaluator, subject: Subject, step: int) -> None:
        started = time.monotonic()
        self.training.at(f"evaluator {evaluator.name}")
        result = evaluator.run(subject, self.probe)
        if self.training.tracker is not None:
            self.training.tracker.log(
                {f"online/{evaluator.label}/{name}": value for name, value in result.metrics.items()}, step=step
            )
        if self.records is not None:
            protocol = measured_on(result, subject, self.limits[evaluator.name])
            self.records.add(step, evaluator, result, encoder=subject.hash, protocol=protocol)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in list(result.metrics.items())[:6])
        seconds = time.monotonic() - started
        note = f" ({result.note})" if result.note else ""
        subject.report(f"online {evaluator.name}{note} after step {step}: {shown} ({seconds:.1f} s)")


class Records:
    """`probe/online.jsonl`: a line for each evaluator and step, with what its numbers were measured on.

    Lines that cannot be written now (disk full, file system gone) wait for the next one.

    Args:
        after: steps done; what an earlier attempt wrote of later ones is dropped, as they are made again.
    """

    def __init__(self, file: Path, *, after: int, report: Callable[[str], None]) -> None:
        self.file, self.after, self.report = file, after, report
        self.commit = git_commit()
        self._begun = False
        self._unwritten: list[str] = []

    def add(self, step: int, evaluator: Evaluator, result: Result, *, encoder: str, protocol: dict[str, Any]) -> None:
        """Write one line; what is not finite is written as text, to stay JSON."""
        metrics = {name: value if math.isfinite(value) else str(value) for name, value in result.metrics.items()}
        names = {"step": step, "evaluator": evaluator.name, "encoder": encoder, "commit": self.commit}
        line = names | {"protocol": protocol, "metrics": metrics}
        self._unwritten.append(json.dumps(line, default=str, skipkeys=True))
        try:
            self._begin()
            append_lines(self.file, *self._unwritten)
        except OSError as error:
            self.report(f"{self.file} cannot be written, its lines wait in memory ({error.strerror or error})")
            return
        self._unwritten.clear()

    def _begin(self) -> None:
        if self._begun:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(self.file) if line["step"] <= self.after]
        atomic_write(self.file, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._begun = True


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def online_probe(config: Config) -> ProbeConfig:
    """The probe's config that `config.online` describes.

    Raises:
        InputError: an option that a probe does not have.
    """
    online: OnlineConfig = config.online
    probe = ProbeConfig(
        run=None,
        evaluators=online.evaluators,
        train=online.train or config.data.shards,
        labels=config.data.labels,
        remote=config.data.remote,
        max_train=online.max_train,
        max_val=online.max_val,
        max_gaze=online.max_gaze,
        num_workers=config.loop.num_workers,
        seed=config.seed,
        keep_cache=False,
        gaze_options=GazeConfig(rows=[]),  # what needs no student would be computed again and again
    )
    probe = replace(probe, **{need: value for need in ("val", "gaze") if (value := getattr(online, need)) is not None})
    for key, value in online.options.items():
        probe = _set(probe, key.split("."), value, key=key)
    return probe


def _set(section: Any, path: list[str], value: Any, *, key: str) -> Any:
    known = [field.name for field in fields(section)] if is_dataclass(section) else []
    if path[0] not in known:
        raise InputError(f"online.options: the probe has no option '{key}'; see pretrain/probe.py --help")
    old = getattr(section, path[0])
    if len(path) > 1:
        return replace(section, **{path[0]: _set(old, path[1:], value, key=key)})
    same_kind = type(value) is type(old) or (isinstance(old, float) and type(value) is int) or old is None
    if not same_kind:
        raise InputError(f"online.options.{key}: {value!r} is no {type(old).__name__}, which that option is")
    return replace(section, **{path[0]: type(old)(value) if isinstance(old, float) else value})


def _steps_per_epoch(config: Config) -> float:
    return ShardSet(config.data.shards, remote=config.data.remote).num_samples / config.data.batch_size
