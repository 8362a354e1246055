"""One step of a run once more, on one process: its samples, its losses, its gradient."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import list_checkpoints, load_checkpoint, step_of
from engine.errors import InputError
from engine.files import read_lines
from engine.launch import build_accelerator
from engine.passes import Backward
from engine.progress import report
from engine.runs import RunFolder
from pretrain.assemble import assemble_student
from pretrain.config import Config
from pretrain.cotrain import CoTrainBatch, CoTraining, gaze_dataset, looked_at, open_gaze
from pretrain.data import Batch, Position, ViewDataset
from pretrain.evaluators.subjects import read_run_config
from pretrain.model import Student, input_statistics
from pretrain.objective import Objective, attention_objective
from pretrain.replay_config import ReplayConfig
from pretrain.trainer import make_dataset, open_data
from shards.order import SampleOrder
from shards.reader import ShardSet


@dataclass
class _Part:
    """The samples of the step out of one set.

    Attributes:
        name: what the set's samples are called, in the singular.
        dataset: reads them.
        positions: of the samples of all ranks.
    """

    name: str
    dataset: ViewDataset
    positions: list[Position]


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
    parts = step_parts(config, shards, run, step=options.step)
    counts = " and ".join(f"{len(part.positions)} {part.name}s" for part in parts)
    report(f"step {options.step} of {run.path}: {counts}, weights of step {start}")
    batches = [part.dataset.__getitems__(part.positions) for part in parts]
    module = accelerator.prepare(student.train())
    objective = Objective(module, config, input_statistics(student.backbone), accelerator.device)
    for part, batch in zip(parts, batches, strict=True):
        for key, what in _suspects(module, objective, batch, part).items():
            report(f"not finite: {part.name} {key}: {what}")
    backward = Backward(accelerator, module)
    if config.co_trains:
        scalars = CoTraining(objective)(CoTrainBatch(*batches), step=options.step - 1, backward=backward)
    else:
        scalars = objective(batches[0], step=options.step - 1, backward=backward)
    scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]) / scale
    for name, value in (scalars | {"gradient norm": norm}).items():
        report(f"{name}: {float(value):.6g}" + ("" if math.isfinite(float(value)) else "  <- not finite"))


def step_parts(config: Config, shards: ShardSet, run: RunFolder, *, step: int) -> list[_Part]:
    """The samples of a step, counted from 1, over all ranks: images, then in arm co-train gaze images.

    As the line about the step in the run's `bad_batches.jsonl` names them; without one, as their order says.

    Raises:
        InputError: the sets hold other samples than those that are named.
    """
    note = next((line for line in read_lines(run.bad_batches_file) if line["step"] == step), {})
    report(
        f"step {step} is {'named' if note else 'not'} in {run.bad_batches_file}" + ("" if note else ": by its order")
    )
    data = config.data
    found = [_part("sample", make_dataset(config, shards), note, config, size=data.batch_size, step=step)]
    if config.co_trains:
        dataset = gaze_dataset(open_gaze(config, world_size=1), config)
        gaze = {name.removeprefix("gaze_"): values for name, values in note.items() if name.startswith("gaze_")}
        found.append(_part("gaze sample", dataset, gaze, config, size=data.gaze_batch_size, step=step))
    return found


def _part(name: str, dataset: ViewDataset, note: dict[str, Any], config: Config, *, size: int, step: int) -> _Part:
    """One set's samples, checked against the keys in `note` where it has them."""
    sizes = dataset.shards.shard_sizes
    order = SampleOrder(sizes, seed=dataset.seed, window=config.data.window)
    named = note.get("positions") or order.slice((step - 1) * size, step * size).tolist()
    positions: list[Position] = [(epoch, shard, row) for epoch, shard, row in named]
    for position, key in zip(positions, note.get("keys", []), strict=False):
        _, shard, row = position
        there = dataset.key_of(position) if shard < len(sizes) and row < sizes[shard] else None
        if key is not None and key != there:
            raise InputError(
                f"step {step} had {name} {key!r} at row {row} of shard {shard}, where {dataset.shards.root} now has "
                f"{there!r}: put back the set that the run was trained on"
            )
    return _Part(name, dataset, positions)


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
def _suspects(module: torch.nn.Module, objective: Objective, batch: Batch, part: _Part) -> dict[str, str]:
    """By key, what is wrong with samples one by one: unreadable, or with an output or loss that is not finite.

    The module is in evaluation mode, in which one sample cannot spoil another through batch statistics.
    """
    module.eval()
    found: dict[str, str] = {}
    for i, position in enumerate(part.positions):
        one = _one(batch, i).to(objective.device)
        output = module(objective.prepare(one))
        outputs = {"features": output.features, "embedding": output.embeddings, "class logits": output.class_logits}
        outputs |= {f"attention map {n}": head for n, head in enumerate(output.attention)}
        if one.maps is not None:
            config = objective.config.attention
            used = one if objective.config.attends else looked_at(one)
            loss, _ = attention_objective(output.attention, used, config)
            outputs |= {"label map": one.maps, "attention loss": config.weight * loss}
        bad = [name for name, value in outputs.items() if value is not None and not bool(torch.isfinite(value).all())]
        bad += [] if bool(batch.valid[i]) else ["the file: unreadable"]
        if bad:
            _, shard, row = position
            found[f"{part.dataset.key_of(position)} (shard {shard}, row {row})"] = ", ".join(bad)
    module.train()
    return found


def _one(batch: Batch, index: int) -> Batch:
    """A batch of one sample."""
    views = {name: getattr(batch, name)[:, index : index + 1] for name in ("images", "boxes", "flips", "colours")}
    rows: dict[str, Tensor] = {name: getattr(batch, name)[index : index + 1] for name in ("labels", "valid")}
    maps, sizes = (None if x is None else x[index : index + 1] for x in (batch.maps, batch.sizes))
    return replace(batch, **views, **rows, maps=maps, bad=[], sizes=sizes)
