"""Puts a teacher's training together from its config, and checks it without training."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from attention.losses import weighted_loss
from engine.average import check_average
from engine.errors import InputError
from engine.launch import build_accelerator, uses_deepspeed
from engine.loading import counted
from engine.loop import Training, fit, start_training
from engine.passes import Backward
from engine.plan import Plan, plan_steps
from engine.program import config_to_dict
from engine.ranks import Ranks
from engine.runs import RunFolder, check_run_name
from shards.gaze import METRICS, load_targets
from shards.reader import ShardSet
from teacher.average import Teacher
from teacher.comparison import compare
from teacher.config import Config
from teacher.data import GazeBatch, GazeDataset, training_batches
from teacher.model import SaliencyModel
from teacher.pretrained import load_pretrained
from teacher.report import table_lines, write_maps, write_page
from teacher.saved import load_teacher
from teacher.sources import GazeSet, GazeSets, open_sources
from teacher.validation import EarlyStop, Validation

LOSSES = ("kld", "nss", "cc", "mse")


@dataclass
class GazeObjective:
    """Computes the loss of a batch; called by the training loop once per step."""

    module: nn.Module
    config: Config
    device: torch.device

    def __call__(self, batch: GazeBatch, *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Gradients and named terms of this rank's `batch`; an image without fixations counts 0."""
        batch = batch.to(self.device)
        weights = {name: getattr(self.config.loss, name) for name in LOSSES}
        counts = batch.counts if self.config.loss.nss_on == "fixations" else None
        loss, terms = weighted_loss(
            self.module(batch.images), batch.maps, weights=weights, nss_map=counts, mask=batch.valid
        )
        # the mean over the images kept, times their share: ranks need not exchange counts
        loss = loss * batch.valid.float().mean()
        backward(loss)
        return {"loss": loss, **terms}


def make_plan(config: Config, *, sources: GazeSets, world_size: int) -> Plan:
    """Steps of the run and the batch of one rank; raises InputError where they do not fit."""
    return plan_steps(
        batch_size=config.data.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        num_samples=sources.num_samples,
        world_size=world_size,
        data=Path(" + ".join(str(one.shards.root) for one in sources.sets)),
    )


def validation_interval(config: Config, plan: Plan) -> int:
    """Steps between two validations, rounded up: the last is not done again right after an epoch's end."""
    return math.ceil(config.validate_every * plan.steps_per_epoch)


def open_data(config: Config) -> tuple[GazeSets, ShardSet]:
    """Training sets and validation set.

    Raises:
        InputError: see `open_sources`; or settings that learn nothing.
    """
    if not any(getattr(config.loss, name) for name in LOSSES):
        raise InputError(f"loss: {', '.join(LOSSES)} are all 0, so there is nothing to learn: set one above 0")
    return open_sources(config.data)


def build_teacher(config: Config, *, accelerator: Accelerator) -> Teacher:
    """The model from random or given weights, in channels-last order, as images come.

    Raises:
        InputError: weights that cannot be had, or see `check_average`.
    """
    check_average(config.ema, accelerator=accelerator)
    model = SaliencyModel(config.model, image_size=config.data.image_size)
    if config.model.pretrained is not None:
        load_pretrained(model, config.model)
    teacher = Teacher(model, decay=config.ema)
    if uses_deepspeed(accelerator):
        return teacher  # DeepSpeed views weights as bytes, which it cannot in that order
    return teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check(config: Config) -> list[str]:
    """Validate a run without training it: config, shards, gaze, model, launcher."""
    check_run_name(config.run)
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    sources, val = open_data(config)
    plan = make_plan(config, sources=sources, world_size=accelerator.num_processes)
    teacher = build_teacher(config, accelerator=accelerator)
    (height, width), grid = config.data.image_size, teacher.model.grid
    return [
        f"launcher: {accelerator.num_processes} rank(s), {accelerator.distributed_type.value}, on {accelerator.device}",
        *(_line(one, share=share) for one, share in sources.shares()),
        f"val: {config.data.val}, {val.num_samples} images, {sum(t.num_inside for t in load_targets(val))} fixations",
        f"run: {plan.total_steps} steps of {config.data.batch_size} images ({plan.local_batch} a rank), a validation "
        f"every {validation_interval(config, plan)}",
        f"model: {config.model.backbone}, {sum(p.numel() for p in teacher.model.parameters()) / 1e6:.1f} M parameters, "
        f"{height}x{width} images to {grid[0]}x{grid[1]} maps",
    ]


def _line(one: GazeSet, *, share: float) -> str:
    """What `check` says about a training set."""
    fixations = sum(target.num_inside for target in load_targets(one.shards, limits=one.sizes))
    mixed = f"; {share:.1%} of the images trained on" if share < 1 else ""
    return (
        f"train: {one.shards.root}, {one.num_samples} images, {fixations} fixations, gaze {one.edition}, sigma "
        f"{one.sigma:g} pixels{mixed}"
    )


def train(config: Config) -> RunFolder:
    """Train, or go on with, the run that `config` names; keep its best teacher and write its summary.

    Raises:
        InputError: anything wrong with config, data, launcher or run folder, before a step is made.
        Requeue: stopped on request with a checkpoint.
    """
    check_run_name(config.run)
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    ranks = Ranks()
    sources, val_set = open_data(config)
    plan = make_plan(config, sources=sources, world_size=ranks.world_size)
    teacher = build_teacher(config, accelerator=accelerator)
    training = start_training(
        teacher,
        accelerator=accelerator,
        ranks=ranks,
        run=RunFolder(config.runs / config.run),
        config=config,
        resolved=config_to_dict(config),
        batch_size=config.data.batch_size,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        identity={"train": sources.digest, "val": val_set.digest},
    )
    with training:
        start = training.resume()
        validation = Validation(training, config, val_set, sources=sources)
        if "stopped_after" not in training.extra:
            _fit(training, config, teacher, plan=plan, start=start, sources=sources, validation=validation)
        _finish(training, validation)
    return training.run


def _fit(
    training: Training,
    config: Config,
    teacher: Teacher,
    *,
    plan: Plan,
    start: int,
    sources: GazeSets,
    validation: Validation,
) -> None:
    dataset = GazeDataset(
        sources,
        size=config.data.image_size,
        grid=teacher.model.grid,
        augment=config.augment,
        seed=config.seed,
    )
    batches = training_batches(
        dataset,
        batch_size=config.data.batch_size,
        window=config.data.window,
        rank=training.ranks.rank,
        world_size=training.ranks.world_size,
        start_step=start,
        stop_step=plan.total_steps,
        num_workers=config.loop.num_workers,
    )
    objective = GazeObjective(training.module, config, training.accelerator.device)
    averaging = [(1, teacher.update_average)] if teacher.average is not None else []
    checked = counted(batches, training, start=start, max_fraction=config.data.max_bad_fraction)
    try:
        fit(
            training,
            checked,
            objective,
            start_step=start,
            hooks=[*averaging, (validation_interval(config, plan), validation)],
        )
    except EarlyStop:
        training.report(f"stopped early: {config.patience} validations without a better {config.best_by}")


def _finish(training: Training, validation: Validation) -> None:
    """Summary and table, from the teacher that is on disk."""
    if not training.ranks.is_main:
        return
    run = training.run
    if training.extra["best"] is None:
        name = validation.config.best_by
        raise FloatingPointError(f"no validation of {run.path} gave a {name}, so there is no teacher: lower optim.lr")
    teacher = load_teacher(run.path)
    predictions = validation.predict_all(teacher.model)
    rows = compare([t for t, _ in predictions], [d for _, d in predictions], stride=validation.config.data.stride)
    # the five metrics of all validation images, as they chose the teacher, are put over those of the comparison
    rows["attention"] |= {name: teacher.facts["metrics"][name] for name in (*METRICS, "num_images", "num_skipped")}
    metrics = {f"{row}/{name}": value for row, scores in rows.items() for name, value in scores.items()}
    last = {k: v for line in run.metrics() for k, v in line.items() if k.startswith("train/")}
    step = training.extra.get("stopped_after", training.total_steps)
    about = {name: teacher.facts[name] for name in ("hash", "step", "image_size", "sources")}
    more = last | {"data/num_bad": training.extra.get("num_bad", 0)}
    run.write_summary(metrics | more, step=step, teacher=about, data=training.identity)
    write_maps(run.path / "maps.safetensors", predictions)
    page = write_page(run, validation.shards, predictions, rows)
    for line in table_lines(rows):
        training.report(line)
    training.report(f"report: {page}")
    training.report(f"done: {step} steps, teacher {teacher.hash[:16]} of step {about['step']} in {run.path}")
