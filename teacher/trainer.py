"""Puts a teacher's training together from its config, and checks it without training."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from attention.losses import weighted_loss
from engine.errors import InputError
from engine.launch import build_accelerator, uses_deepspeed
from engine.loading import counted
from engine.loop import Training, fit, start_training
from engine.passes import Backward
from engine.plan import Plan, plan_steps
from engine.program import config_to_dict
from engine.ranks import Ranks
from engine.runs import RunFolder, check_run_name
from shards.gaze import METRICS, check_gaze, gaze_sigma, load_targets
from shards.reader import ShardSet
from teacher.average import Teacher
from teacher.comparison import compare
from teacher.config import Config
from teacher.data import GazeBatch, GazeDataset, training_batches
from teacher.model import SaliencyModel
from teacher.pretrained import load_pretrained
from teacher.report import table_lines, write_maps, write_page
from teacher.saved import load_teacher
from teacher.validation import EarlyStop, Validation


@dataclass
class GazeObjective:
    """Computes the loss of a batch; called by the training loop once per step."""

    module: nn.Module
    config: Config
    device: torch.device

    def __call__(self, batch: GazeBatch, *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Gradients and named terms of this rank's `batch`; an image without fixations counts 0."""
        batch = batch.to(self.device)
        weights = {name: getattr(self.config.loss, name) for name in ("kld", "nss", "cc")}
        counts = batch.counts if self.config.loss.nss_on == "fixations" else None
        loss, terms = weighted_loss(
            self.module(batch.images), batch.maps, weights=weights, nss_map=counts, mask=batch.valid
        )
        # the mean over the images kept, times their share: ranks need not exchange counts
        loss = loss * batch.valid.float().mean()
        backward(loss)
        return {"loss": loss, **terms}


def make_plan(config: Config, *, num_samples: int, world_size: int) -> Plan:
    """Steps of the run and the batch of one rank; raises InputError where they do not fit."""
    return plan_steps(
        batch_size=config.data.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        num_samples=num_samples,
        world_size=world_size,
        data=config.data.train,
    )


def validation_interval(config: Config, plan: Plan) -> int:
    """Steps between two validations, rounded up: the last is not done again right after an epoch's end."""
    return math.ceil(config.validate_every * plan.steps_per_epoch)


def open_data(config: Config) -> tuple[ShardSet, ShardSet]:
    """Training and validation sets.

    Raises:
        InputError: missing or empty shards, no gaze in them, the two of different editions, or settings that
            learn nothing.
    """
    if not (config.loss.kld or config.loss.nss or config.loss.cc):
        raise InputError("loss: kld, nss and cc are all 0, so there is nothing to learn: set one above 0")
    if config.ema == 1:
        raise InputError("ema 1.0 would keep the first random weights for ever: take e.g. 0.999, or 0 for no average")
    train, val = ShardSet(config.data.train), ShardSet(config.data.val)
    for shards in (train, val):
        check_gaze(shards)
    editions = [shards.manifest.extra["gaze"].get("edition") for shards in (train, val)]
    if editions[0] != editions[1]:
        raise InputError(
            f"{val.root} holds gaze of edition {editions[1]!r}, {train.root} of {editions[0]!r}: validate on the "
            f"edition that is trained on"
        )
    return train, val


def build_teacher(config: Config, *, accelerator: Accelerator) -> Teacher:
    """The model from random or given weights, in channels-last order, as images come."""
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
    train, val = open_data(config)
    plan = make_plan(config, num_samples=train.num_samples, world_size=accelerator.num_processes)
    teacher = build_teacher(config, accelerator=accelerator)
    counts = [sum(t.num_inside for t in load_targets(shards)) for shards in (train, val)]
    (height, width), grid = config.data.image_size, teacher.model.grid
    return [
        f"launcher: {accelerator.num_processes} rank(s), {accelerator.distributed_type.value}, on {accelerator.device}",
        f"train: {config.data.train}, {train.num_samples} images, {counts[0]} fixations",
        f"val: {config.data.val}, {val.num_samples} images, {counts[1]} fixations",
        f"run: {plan.total_steps} steps of {config.data.batch_size} images ({plan.local_batch} a rank), a validation "
        f"every {validation_interval(config, plan)}",
        f"model: {config.model.backbone}, {sum(p.numel() for p in teacher.model.parameters()) / 1e6:.1f} M parameters, "
        f"{height}x{width} images to {grid[0]}x{grid[1]} maps",
    ]


def train(config: Config) -> RunFolder:
    """Train, or go on with, the run that `config` names; keep its best teacher and write its summary.

    Raises:
        InputError: anything wrong with config, data, launcher or run folder, before a step is made.
        Requeue: stopped on request with a checkpoint.
    """
    check_run_name(config.run)
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    ranks = Ranks()
    train_set, val_set = open_data(config)
    plan = make_plan(config, num_samples=train_set.num_samples, world_size=ranks.world_size)
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
        identity={"train": train_set.digest, "val": val_set.digest},
    )
    with training:
        start = training.resume()
        validation = Validation(training, config, val_set, train_digest=train_set.digest)
        if "stopped_after" not in training.extra:
            _fit(training, config, teacher, plan=plan, start=start, shards=train_set, validation=validation)
        _finish(training, validation)
    return training.run


def _fit(
    training: Training,
    config: Config,
    teacher: Teacher,
    *,
    plan: Plan,
    start: int,
    shards: ShardSet,
    validation: Validation,
) -> None:
    dataset = GazeDataset(
        shards,
        size=config.data.image_size,
        grid=teacher.model.grid,
        sigma=config.data.sigma or gaze_sigma(shards),
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
        training.report(f"stopped early: {config.patience} validations without a better KLD")


def _finish(training: Training, validation: Validation) -> None:
    """Summary and table, from the teacher that is on disk."""
    if not training.ranks.is_main:
        return
    run = training.run
    if training.extra["best_kld"] is None:
        raise FloatingPointError(f"no validation of {run.path} gave a KLD, so there is no teacher: lower optim.lr")
    teacher = load_teacher(run.path)
    predictions = validation.predict_all(teacher.model)
    rows = compare([t for t, _ in predictions], [d for _, d in predictions], stride=validation.config.data.stride)
    # the five metrics of all validation images, as they chose the teacher, are put over those of the comparison
    rows["attention"] |= {name: teacher.facts["metrics"][name] for name in (*METRICS, "num_images", "num_skipped")}
    metrics = {f"{row}/{name}": value for row, scores in rows.items() for name, value in scores.items()}
    last = {k: v for line in run.metrics() for k, v in line.items() if k.startswith("train/")}
    step = training.extra.get("stopped_after", training.total_steps)
    about = {name: teacher.facts[name] for name in ("hash", "step", "image_size")}
    more = last | {"data/num_bad": training.extra.get("num_bad", 0)}
    run.write_summary(metrics | more, step=step, teacher=about, data=training.identity)
    write_maps(run.path / "maps.safetensors", predictions)
    page = write_page(run, validation.shards, predictions, rows)
    for line in table_lines(rows):
        training.report(line)
    training.report(f"report: {page}")
    training.report(f"done: {step} steps, teacher {teacher.hash[:16]} of step {about['step']} in {run.path}")
