"""Puts a pretraining run together from its config, and checks it without training."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from engine.average import Average
from engine.checkpoint import Retention
from engine.errors import InputError
from engine.launch import build_accelerator
from engine.loading import counted
from engine.loop import Hook, StepFunction, Training, fit, start_training
from engine.optim import build_optimizer
from engine.passes import Backward
from engine.plan import Plan, plan_steps
from engine.program import config_to_dict
from engine.ranks import Ranks
from engine.runs import RunFolder, check_run_name
from pretrain.assemble import assemble_student
from pretrain.config import Config
from pretrain.cotrain import CoTraining, open_gaze, with_gaze
from pretrain.data import Batch, ViewDataset, find_label_set, view_batches
from pretrain.encoder import write_encoder
from pretrain.model import Student, input_statistics
from pretrain.objective import Objective
from pretrain.prepare import prepare_sample
from shards.location import is_remote
from shards.reader import BadSample, ShardSet


def open_data(config: Config) -> ShardSet:
    """The image shards, joined with their labels in attention arms.

    Raises:
        InputError: missing or empty shards, labels of another image set or teacher, no classes for a supervised arm.
    """
    labels = None
    if config.attends:
        if config.data.labels is None:
            raise InputError(
                f"data.labels is needed by arm '{config.arm}': give the folder that teacher/label.py wrote"
            )
        labels = find_label_set(choose_control(config.data.labels, config.data.control))
    data = config.data
    shards = ShardSet(data.shards, labels=labels, teacher_hash=data.teacher, remote=data.remote)
    if not config.contrastive and not shards.classes:
        raise InputError(f"{config.data.shards}: arm '{config.arm}' needs classes, and these shards have none")
    return shards


def choose_control(folder: Path, control: str) -> Path:
    """The set in `folder` that is the wanted control (or the teacher's own, for "none"); else `folder` itself.

    Raises:
        InputError: a control is wanted that is not there.
    """
    manifests = [] if is_remote(folder) else sorted(folder.glob("*/manifest.json"))
    wanted = [path.parent for path in manifests if _control_of(path) == control]
    if len(wanted) == 1:
        return wanted[0]
    if not wanted and control != "none":
        raise InputError(
            f"data.control '{control}': {folder} holds no such label set: write it with teacher/label.py --controls "
            f"{control}, and give the folder that holds the teacher's set too"
        )
    return folder


def _control_of(manifest: Path) -> str:
    try:
        return str(json.loads(manifest.read_text())["teacher"].get("control", "none"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "unreadable"


def make_plan(config: Config, *, num_samples: int, world_size: int) -> Plan:
    """Steps of the run and the batch of one rank.

    Raises:
        InputError: see `plan_steps`, or a contrastive arm without negatives.
    """
    if config.contrastive and config.data.batch_size < 2:
        raise InputError("data.batch_size 1 leaves a contrastive arm without negatives: take at least 2")
    return plan_steps(
        batch_size=config.data.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        num_samples=num_samples,
        world_size=world_size,
        data=config.data.shards,
    )


def check(config: Config) -> list[str]:
    """Validate a run without training it: config, shards, labels, model, memory of one step's tensors, launcher.

    A machine without a GPU checks a run that needs one, but for what only a GPU has; a line says so.

    Raises:
        InputError: whatever would stop the training before its first step.
    """
    check_run_name(config.run)
    config, left_out = _without_gpu(config)
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    shards = open_data(config)
    gaze = open_gaze(config, world_size=accelerator.num_processes) if config.co_trains else None
    plan = make_plan(config, num_samples=shards.num_samples, world_size=accelerator.num_processes)
    student = assemble_student(config, num_classes=len(shards.classes), accelerator=accelerator)
    _check_options(config, student, accelerator)
    weights = sum(p.numel() for p in student.parameters() if p.requires_grad)
    views = plan.local_batch * config.num_views
    sample = _first_readable(shards)
    lines = [
        f"launcher: {accelerator.num_processes} rank(s), {accelerator.distributed_type.value}, on {accelerator.device}",
        f"shards: {config.data.shards}, {shards.num_samples} samples in {len(shards.shard_sizes)} shards; "
        f"first key {sample.key!r} reads",
        f"run: {plan.total_steps} steps of {config.data.batch_size} images ({plan.local_batch} a rank)",
        f"model: {config.model.backbone}, {weights / 1e6:.1f} M parameters, "
        f"{weights * 16 / 2**20:.0f} MiB for weights, gradients and two optimiser slots in fp32",
        f"views: {views} of {config.data.image_size} px a rank and step, "
        f"{views * 12 * config.data.image_size**2 / 2**20:.0f} MiB as fp32 input",
    ]
    if shards.label_manifest is not None:
        teacher = shards.label_manifest.extra["teacher"]
        lines.append(f"labels: teacher {teacher['hash'][:16]}, control {teacher.get('control', 'none')}")
    if gaze is not None:
        lines.append(f"gaze: {gaze.root}, {gaze.num_samples} images, {config.data.gaze_batch_size} a step")
    return lines + left_out


def _check_options(config: Config, student: Student, accelerator: Accelerator) -> None:
    """Refuse what a training would refuse when it puts optimiser, checkpoints and evaluators together."""
    build_optimizer(student, config.optim, accelerator=accelerator)
    loop = config.loop
    Retention.parse(last=loop.keep_checkpoints, every=loop.keep_every, best=loop.keep_best)
    no_training: Any = None
    _online(no_training, config, student)  # makes the hooks, which nobody calls


def _without_gpu(config: Config) -> tuple[Config, list[str]]:
    """On a machine without a GPU, the config without what only a GPU has, and a line that names it; else as it is."""
    needs = {"sync_batch_norm": config.sync_batch_norm, "precision fp16": config.precision == "fp16"}
    found = [name for name, needed in needs.items() if needed]
    if not found or torch.cuda.is_available():
        return config, []
    rest = replace(config, sync_batch_norm=False, precision="no" if config.precision == "fp16" else config.precision)
    return rest, [f"no GPU here: {' and '.join(found)} left out of this check; training stops without one"]


def train(config: Config) -> RunFolder:
    """Pretrain, or go on with, the run that `config` names; write its encoder and summary.

    Raises:
        InputError: anything wrong with config, data, launcher or run folder, before a step is made.
        Requeue: stopped on request with a checkpoint.
    """
    check_run_name(config.run)
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    ranks = Ranks()
    ranks.on_main(lambda: prepare_sample(config))
    shards = open_data(config)
    plan = make_plan(config, num_samples=shards.num_samples, world_size=ranks.world_size)
    gaze = open_gaze(config, world_size=ranks.world_size) if config.co_trains else None
    student = assemble_student(config, num_classes=len(shards.classes), accelerator=accelerator)
    training = start_training(
        student,
        accelerator=accelerator,
        ranks=ranks,
        run=RunFolder(config.runs / config.run),
        config=config,
        resolved=config_to_dict(config),
        batch_size=config.data.batch_size,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        identity=_identity(shards, gaze),
    )
    with training:
        start = training.resume()
        objective = Objective(training.module, config, input_statistics(student.backbone), accelerator.device)
        batches: Iterator[Any] = _batches(config, shards, ranks=ranks, start=start, plan=plan)
        step_function: StepFunction = objective
        if gaze is not None:
            step_function = CoTraining(objective)
            batches = with_gaze(batches, gaze, config, ranks=ranks, start_step=start, stop_step=plan.total_steps)
        hooks = _online(training, config, student)
        if student.average is not None:
            step_function = averaging = _Averaging(step_function, student, student.average)
            hooks = [(interval, averaging.evaluated(hook)) for interval, hook in hooks]
        checked = counted(batches, training, start=start, max_fraction=config.data.max_bad_fraction)
        fit(training, checked, step_function, start_step=start, hooks=hooks)
        _finish(training, student, config=config, shards=shards)
    return training.run


def make_dataset(config: Config, shards: ShardSet) -> ViewDataset:
    """The data set of the config's views; maps come along in attention arms."""
    size = 0
    if config.attends:
        sample = _first_readable(shards)
        assert sample.map is not None
        size = sample.map.shape[0]
    return ViewDataset(
        shards,
        views=config.views,
        num_views=config.num_views,
        image_size=config.data.image_size,
        seed=config.seed,
        map_size=size,
    )


def _batches(config: Config, shards: ShardSet, *, ranks: Ranks, start: int, plan: Plan) -> Iterator[Batch]:
    return view_batches(
        make_dataset(config, shards),
        data=config.data,
        loop=config.loop,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start,
        stop_step=plan.total_steps,
        seed=config.seed,
    )


def _identity(shards: ShardSet, gaze: ShardSet | None) -> dict[str, str]:
    labels = shards.label_manifest
    found = {"shards": shards.digest} | ({"labels": labels.digest} if labels is not None else {})
    return found | ({"gaze": gaze.digest} if gaze is not None else {})


@dataclass
class _Averaging:
    """A step function that first lets the average take in the step before.

    Not after the step: the optimiser may still be at work on the device, and the host need not wait for it.
    """

    step_function: StepFunction
    student: Student
    average: Average

    def __call__(self, batch: Any, *, step: int, backward: Backward) -> dict[str, Tensor]:
        self.average.update(self.student, step=step)
        return self.step_function(batch, step=step, backward=backward)

    def evaluated(self, hook: Hook) -> Hook:
        """The hook, with the averaged weights in the student while it runs."""

        def call(step: int) -> None:
            self.average.update(self.student, step=step)
            with self.average.applied(self.student):
                hook(step)

        return call


def _online(training: Training, config: Config, student: Student) -> list[tuple[int, Hook]]:
    if not config.online.evaluators.strip():
        return []
    from pretrain.evaluators.online import online_hooks  # evaluators train read-outs with what is in this module

    return online_hooks(training, config, student)


def _finish(training: Training, student: Student, *, config: Config, shards: ShardSet) -> None:
    run, step = training.run, training.total_steps
    state = training.weights()
    if student.average is not None:
        student.average.update(student, step=step)
        state = student.average.averaged(student, state)
    if not training.ranks.is_main:
        return
    write_encoder(run.path / "encoder", student.backbone, config=config, student=state)
    last: dict[str, Any] = {}
    for line in run.metrics():
        last.update(line)
    teacher = shards.label_manifest.extra.get("teacher") if shards.label_manifest is not None else None
    run.write_summary(
        {k: v for k, v in last.items() if k != "step"} | {"data/num_bad": training.extra.get("num_bad", 0)},
        step=step,
        data={"shards": shards.digest, "num_samples": shards.num_samples, "teacher": teacher},
    )
    training.report(f"done: {step} steps, encoder in {run.path / 'encoder'}")


def _first_readable(shards: ShardSet) -> Any:
    for shard, size in enumerate(shards.shard_sizes.tolist()):
        for row in range(min(size, 8)):
            try:
                return shards.read(shard, row)
            except BadSample:
                continue
    raise InputError(f"{shards.root}: no sample of the first rows of any shard can be read; run shards/verify.py on it")
