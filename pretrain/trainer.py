"""Puts a pretraining run together from its config, and checks it without training."""

from collections.abc import Iterator
from typing import Any

from engine.errors import InputError
from engine.launch import build_accelerator, uses_deepspeed
from engine.loading import counted
from engine.loop import Training, fit, start_training
from engine.plan import Plan, plan_steps
from engine.program import config_to_dict
from engine.ranks import Ranks
from engine.runs import RunFolder, check_run_name
from pretrain.config import Config
from pretrain.data import Batch, ViewDataset, find_label_set, view_batches
from pretrain.encoder import write_encoder
from pretrain.model import Student, input_statistics
from pretrain.objective import Objective, memory_format
from pretrain.prepare import prepare_sample
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
        labels = find_label_set(config.data.labels)
    shards = ShardSet(config.data.shards, labels=labels, teacher_hash=config.data.teacher)
    if not config.contrastive and not shards.classes:
        raise InputError(f"{config.data.shards}: arm '{config.arm}' needs classes, and these shards have none")
    return shards


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
    """Validate a run without training it: config, shards, labels, model, memory of one step's tensors, launcher."""
    check_run_name(config.run)
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    shards = open_data(config)
    plan = make_plan(config, num_samples=shards.num_samples, world_size=accelerator.num_processes)
    student = Student(config, num_classes=len(shards.classes))
    weights = sum(p.numel() for p in student.parameters())
    views = plan.local_batch * config.num_views
    sample = shards.read(0, 0)
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
        lines.append(f"labels: teacher {shards.label_manifest.extra['teacher']['hash'][:16]}")
    return lines


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
    student = Student(config, num_classes=len(shards.classes))
    if not uses_deepspeed(accelerator):  # it flattens the weights, and fails on those that are channels-last
        student = student.to(memory_format=memory_format(config))
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
        identity=_identity(shards),
    )
    with training:
        start = training.resume()
        objective = Objective(training.module, config, input_statistics(student.backbone), accelerator.device)
        batches = counted(
            _batches(config, shards, ranks=ranks, start=start, plan=plan),
            training,
            start=start,
            max_fraction=config.data.max_bad_fraction,
        )
        fit(training, batches, objective, start_step=start)
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


def _identity(shards: ShardSet) -> dict[str, str]:
    labels = shards.label_manifest
    return {"shards": shards.digest} | ({"labels": labels.digest} if labels is not None else {})


def _finish(training: Training, student: Student, *, config: Config, shards: ShardSet) -> None:
    run, step = training.run, training.total_steps
    state = training.weights()
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
