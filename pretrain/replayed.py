"""One step of a run once more, on one process: its samples, its losses, its gradient."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from engine.checkpoint import list_checkpoints, load_checkpoint, step_of
from engine.errors import InputError
from engine.launch import build_accelerator
from engine.passes import Backward
from engine.progress import report
from engine.runs import RunFolder
from pretrain.assemble import assemble_student
from pretrain.config import Config
from pretrain.data import Batch, Position
from pretrain.evaluators.subjects import read_run_config
from pretrain.model import Student, input_statistics
from pretrain.objective import Objective
from pretrain.replay_config import ReplayConfig
from pretrain.trainer import make_dataset, open_data
from shards.order import SampleOrder
from shards.reader import ShardSet


def replay(options: ReplayConfig) -> None:
    """Report on every sample of the step, then on its loss and gradient.

    Raises:
        InputError: no such run, or data that is not the run's.
    """
    run = RunFolder(options.run)
    config = read_run_config(run)
    config = replace(config, optim=replace(config.optim, micro_batch=options.micro_batch), compile=False)
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    shards = open_data(config)
    student = assemble_student(config, num_classes=len(shards.classes), accelerator=accelerator)
    start = _load(run, student, before=options.step)
    positions = step_positions(config, shards, step=options.step)
    report(f"step {options.step} of {run.path}: {len(positions)} samples, weights of step {start}")
    batch = make_dataset(config, shards).__getitems__(positions)
    module = accelerator.prepare(student.train())
    objective = Objective(module, config, input_statistics(student.backbone), accelerator.device)
    for name, key in _suspects(module, objective, batch, shards, positions).items():
        report(f"not finite: {name}: {key}")
    scalars = objective(batch, step=options.step - 1, backward=Backward(accelerator, module))
    scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]) / scale
    for name, value in (scalars | {"gradient norm": norm}).items():
        report(f"{name}: {float(value):.6g}" + ("" if math.isfinite(float(value)) else "  <- not finite"))


def step_positions(config: Config, shards: ShardSet, *, step: int) -> list[Position]:
    """Epoch, shard and row of every sample of a step, counted from 1, over all ranks."""
    order = SampleOrder(shards.shard_sizes, seed=config.seed, window=config.data.window)
    size = config.data.batch_size
    return [(e, s, r) for e, s, r in order.slice((step - 1) * size, step * size).tolist()]


def _load(run: RunFolder, student: Student, *, before: int) -> int:
    """Put the weights of the newest checkpoint before step `before` into the student; returns its step, 0 for none."""
    found = [path for path in list_checkpoints(run.checkpoints) if step_of(path) < before]
    if not found:
        return 0
    step, tensors, _ = load_checkpoint(found[-1])
    try:
        student.load_state_dict(tensors["model"])
    except RuntimeError as error:
        raise InputError(f"{found[-1]} does not fit the run's config: {str(error).splitlines()[0]}") from error
    return step


@torch.no_grad()
def _suspects(
    module: torch.nn.Module, objective: Objective, batch: Batch, shards: ShardSet, positions: list[Position]
) -> dict[str, str]:
    """By key, what is wrong with samples one by one: unreadable, or with an output that is not finite.

    The module is in evaluation mode, in which one sample cannot spoil another through batch statistics.
    """
    module.eval()
    found: dict[str, str] = {}
    for i, (_, shard, row) in enumerate(positions):
        one = _one(batch, i).to(objective.device)
        output = module(objective.prepare(one))
        parts = {"features": output.features, "embedding": output.embeddings, "class logits": output.class_logits}
        parts |= {f"attention map {n}": head for n, head in enumerate(output.attention)}
        bad = [name for name, value in parts.items() if value is not None and not bool(torch.isfinite(value).all())]
        bad += ["label map"] if one.maps is not None and not bool(torch.isfinite(one.maps).all()) else []
        bad += [] if bool(batch.valid[i]) else ["the file: unreadable"]
        if bad:
            found[f"{shards.keys(shard)[row]} (shard {shard}, row {row})"] = ", ".join(bad)
    module.train()
    return found


def _one(batch: Batch, index: int) -> Batch:
    """A batch of one sample."""
    views = {name: getattr(batch, name)[:, index : index + 1] for name in ("images", "boxes", "flips", "colours")}
    rows: dict[str, Tensor] = {name: getattr(batch, name)[index : index + 1] for name in ("labels", "valid")}
    maps = batch.maps[index : index + 1] if batch.maps is not None else None
    return replace(batch, **views, **rows, maps=maps, bad=[])
