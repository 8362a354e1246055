"""One stage of a fine-tune as a run of its own: train, choose the epoch on the held-out part, test."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from downstream.config import DownstreamConfig
from downstream.data import ExampleDataset, rows_of_rank, training_batches
from downstream.objective import Learner, SupervisedObjective, classification_score
from downstream.protocol import AttentionModel, Examples, Task
from engine.environment import environment
from engine.errors import InputError
from engine.files import atomic_write
from engine.launch import build_accelerator
from engine.loop import FREE_KEYS, Training, fit, start_training
from engine.plan import Plan, plan_steps
from engine.program import config_from_dict, config_to_dict
from engine.ranks import Ranks
from engine.runs import RunFolder
from engine.state import unwrap

FIRST_STEP = "step1"
BEST = "best.safetensors"
ORDER_OFFSET = 1_000_003  # of the second step's seed
EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Stage:
    """What one stage trains.

    Attributes:
        arm: `FIRST_STEP`, "baseline", or an attention loss.
        start: weights to begin with; None for random ones.
        maps, use: surrogates of the training examples by modality, as in `ExampleDataset`.
    """

    arm: str
    seed: int
    epochs: float
    start: dict[str, Tensor] | None = None
    maps: Mapping[str, Tensor] | None = None
    use: Mapping[str, Tensor] | None = None


def stage_folder(config: DownstreamConfig, *, arm: str, seed: int) -> RunFolder:
    """Run folder of one stage of a table; the first step may be that of another table (`config.first`)."""
    table = config.first if arm == FIRST_STEP and config.first else config.run
    return RunFolder(config.runs / f"{table}-{arm}-seed{seed}")


def stage_plan(config: DownstreamConfig, *, epochs: float, num_samples: int, world_size: int) -> Plan:
    """Steps of one stage."""
    return plan_steps(
        batch_size=config.data.batch_size,
        epochs=epochs,
        max_steps=None,
        num_samples=num_samples,
        world_size=world_size,
        data=config.data.path,
    )


def check_finished(
    run: RunFolder,
    resolved: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    names: Sequence[str] = ("sha256",),
    free: frozenset[str] = frozenset(),
) -> None:
    """Refuse to take a finished stage of another config or of other data for this one.

    Args:
        resolved: as `start_training` got it.
        facts: of the data.
        names: of the facts that must be the same.
        free: dotted keys of the config that may differ, besides those that may change in any run.

    Raises:
        InputError: it is another one.
    """
    run.claim(resolved, free=FREE_KEYS | free)
    before = run.read_summary()["data"]
    if any(before.get(name) != facts.get(name) for name in names):
        raise InputError(f"{run.path} was trained or tested on other data: choose another --run, or remove that folder")


def best_weights(run: RunFolder) -> dict[str, Tensor]:
    """Weights of a finished stage's best epoch."""
    return load_file(run.path / BEST)


def read_stage_config(run: RunFolder) -> DownstreamConfig:
    """The config of a finished stage of a fine-tune.

    Raises:
        InputError: no run there, or one of another program.
    """
    return config_from_dict(DownstreamConfig, run.read_config(), source=run.config_file, what="fine-tune's config")


def train_stage(task: Task, config: DownstreamConfig, stage: Stage, *, ranks: Ranks) -> RunFolder:
    """Train one stage, or go on with it; a finished one is left as it is.

    Raises:
        InputError: see `start_training` and `check_finished`; Requeue: stopped on request with a checkpoint.
    """
    run = stage_folder(config, arm=stage.arm, seed=stage.seed)
    if ranks.broadcast(bool(run.read_summary())):
        ranks.on_main(lambda: check_finished(run, _resolved(config, stage), task.facts, free=_free(config, stage)))
        return run
    accelerator = build_accelerator(precision=config.precision, seed=stage.seed)
    model = task.build_model()
    if stage.start is not None:
        model.load_state_dict(stage.start)
    supervised = {name: task.modalities[name] for name in stage.maps or {}}
    learner = Learner(model, arm=stage.arm, modalities=supervised)
    plan = stage_plan(config, epochs=stage.epochs, num_samples=len(task.train), world_size=ranks.world_size)
    training = start_training(
        learner,
        accelerator=accelerator,
        ranks=ranks,
        run=run,
        config=config,
        resolved=_resolved(config, stage),
        batch_size=config.data.batch_size,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        identity={"data": str(sorted(task.facts.get("sha256", {}).items()))},
    )
    with training:
        _learn(training, learner, task, config, stage, every=math.ceil(plan.steps_per_epoch))
        _finish(training, task, stage)
    return run


def _free(config: DownstreamConfig, stage: Stage) -> frozenset[str]:
    """Keys in which a finished stage may differ: what does not bear on it, or what another table's name asks for."""
    if stage.arm == FIRST_STEP and config.first:
        return frozenset({"optim", "epochs", "precision"})
    return frozenset({"supervision"} if stage.arm == "baseline" else ())


def _learn(
    training: Training, learner: Learner, task: Task, config: DownstreamConfig, stage: Stage, *, every: int
) -> None:
    """Train to the last step; the epoch, `every` steps, ends with a choice and begins the balance of the losses."""
    start, ranks = training.resume(), training.ranks
    modalities = list(stage.maps or {})
    objective = SupervisedObjective(
        module=training.module,
        learner=learner,
        arm=stage.arm if modalities else "baseline",
        modalities=modalities,
        config=config.supervision,
        balance_steps=every,
        state=training.extra,
        ranks=ranks,
        device=training.accelerator.device,
    )
    batches = training_batches(
        ExampleDataset(task.train, maps=_beside(task.train, stage.maps or {}), use=dict(stage.use or {})),
        count=len(task.train),
        batch_size=config.data.batch_size,
        # another order than the first step's, the same for every arm
        seed=stage.seed if stage.arm == FIRST_STEP else stage.seed + ORDER_OFFSET,
        num_workers=config.loop.num_workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start,
        stop_step=training.total_steps,
    )
    fit(training, batches, objective, start_step=start, hooks=[(every, Choice(training, task))])


def _beside(examples: Examples, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The surrogates where the examples are: on their device if they were put on one."""
    home = getattr(examples, "device", None)
    return {name: value if home is None else value.to(home) for name, value in maps.items()}


class Choice:
    """After every epoch: accuracy on the held-out part; the first epoch of the best is kept."""

    def __init__(self, training: Training, task: Task) -> None:
        self.training, self.task = training, task

    def __call__(self, step: int) -> None:
        """Score, log, and keep the weights if they are the best so far."""
        training = self.training
        model = unwrap(training.module).model
        assert isinstance(model, AttentionModel)
        device = training.accelerator.device
        score = accuracy(model, self.task.held_out, ranks=training.ranks, device=device)["accuracy"]
        best = training.extra.get("best")
        if training.ranks.is_main:
            assert training.tracker is not None
            training.tracker.log({"held_out/accuracy": score}, step=step)
            training.report(f"after step {step}: held-out accuracy {score:.2f}")
        if best is None or score > best["score"]:
            training.extra["best"] = {"score": score, "step": step}
            weights = {name: value for name, value in training.weights().items() if name.startswith("model.")}
            if training.ranks.is_main:
                plain = {name.removeprefix("model."): value.contiguous() for name, value in weights.items()}
                atomic_write(training.run.path / BEST, save(plain))


@torch.inference_mode()
def accuracy(model: AttentionModel, examples: Examples, *, ranks: Ranks, device: Any) -> dict[str, float]:
    """Mean score in percent, each example once over all ranks. Every rank must call it.

    Returns:
        "accuracy", and where the examples are of several kinds (`kinds`, as answer types in VQA) also
        "accuracy_<kind>" for each, over the examples of that kind.
    """
    parts = rows_of_rank(len(examples), rank=ranks.rank, world_size=ranks.world_size, size=EVALUATION_BATCH)
    scores = []
    for rows in parts:
        inputs = {name: value.to(device) for name, value in examples.inputs(rows).items()}
        targets = examples.targets[torch.from_numpy(rows)].to(device)
        scores.append(classification_score(model(inputs).logits, targets))
    every = ranks.gather(torch.cat(scores).tolist() if scores else [])
    values = np.array([score for part in every for score in part])
    found = {"accuracy": 100 * float(values.mean())}
    kinds = getattr(examples, "kinds", ())
    if len(set(kinds)) > 1:
        named = np.array(kinds)
        for kind in sorted(set(kinds)):
            found[f"accuracy_{kind.replace('/', '_')}"] = 100 * float(values[named == kind].mean())
    return found


def _finish(training: Training, task: Task, stage: Stage) -> None:
    """Test the best epoch's weights and write the summary."""
    training.ranks.barrier()
    model = unwrap(training.module).model
    assert isinstance(model, AttentionModel)
    model.load_state_dict(best_weights(training.run))
    model.eval()
    scores = accuracy(model, task.test, ranks=training.ranks, device=training.accelerator.device)
    if training.ranks.is_main:
        best = training.extra["best"]
        metrics = {f"test/{name}": score for name, score in scores.items()}
        metrics |= {"held_out/accuracy": best["score"], "best_step": best["step"]}
        weights = {k: v["weight"] for k, v in training.extra.items() if k.startswith("balance_")}
        training.run.write_summary(
            metrics | {f"weight/{name.removeprefix('balance_')}": w for name, w in weights.items() if w is not None},
            step=training.total_steps,
            data=task.facts,
            protocol={"arm": stage.arm, "seed": stage.seed, "epochs": stage.epochs, "commit": environment()["commit"]},
        )
        training.report(
            f"{training.run.name}: test accuracy {scores['accuracy']:.2f} (best epoch ends at step {best['step']})"
        )
    training.ranks.barrier()


def _resolved(config: DownstreamConfig, stage: Stage) -> dict[str, Any]:
    """The config of one stage: what the table adds around it is left out."""
    dropped = ["arms", "seeds"]
    if stage.arm == FIRST_STEP:
        config = replace(config, run=config.first or config.run)
        dropped += ["first", "retrain_epochs", "restart", "supervision"]
    values = config_to_dict(replace(config, arm=stage.arm, seed=stage.seed))
    return {key: value for key, value in values.items() if key not in dropped}
