"""One stage of the two-step protocol as a run of its own: train from given weights, test the last ones."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from downstream.branch.data import FineGrained
from downstream.branch.evaluate import evaluate, summarise, write_evaluation
from downstream.branch.model import AttentionBranchNetwork
from downstream.branch.objective import BranchObjective
from downstream.branch.pictures import training_batches
from downstream.config import DownstreamConfig
from downstream.stage import FIRST_STEP, stage_folder
from engine.environment import environment
from engine.errors import InputError
from engine.files import atomic_write
from engine.launch import build_accelerator, uses_deepspeed
from engine.loop import FREE_KEYS, Training, fit, start_training
from engine.plan import Plan, plan_steps
from engine.program import config_to_dict
from engine.ranks import Ranks
from engine.runs import RunFolder
from engine.state import unwrap

WEIGHTS = "weights.safetensors"
MINING, MAPS = "mining", "maps"
ARMS = ("baseline", MINING, MAPS, f"{MINING}+{MAPS}")
ORDER_OFFSET = 1_000_003
KEPT = ("run", "runs", "task", "arm", "seed", "precision", "data", "branch", "optim", "loop")
PART_KEYS = {MINING: {"alpha", "sigma", "steepness"}, MAPS: {"labels", "map_loss", "gamma"}}


@dataclass(frozen=True)
class Stage:
    """What one stage trains: `arm` is `FIRST_STEP` or one of `ARMS`; `start` the weights to begin with."""

    arm: str
    seed: int
    epochs: float
    start: dict[str, Tensor] | None = None

    def has(self, part: str) -> bool:
        """Whether the arm is made of `part` (`MINING`, `MAPS`)."""
        return part in self.arm.split("+")


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


def stage_weights(run: RunFolder) -> dict[str, Tensor]:
    """Last weights of a finished stage."""
    return load_file(run.path / WEIGHTS)


def train_stage(data: FineGrained, config: DownstreamConfig, stage: Stage, *, ranks: Ranks) -> RunFolder:
    """Train and test one stage, or go on with it; a finished one is left as it is.

    Raises:
        InputError: see `start_training`; Requeue: stopped on request with a checkpoint.
    """
    run = stage_folder(config, arm=stage.arm, seed=stage.seed)
    if ranks.broadcast(bool(run.read_summary())):
        ranks.on_main(lambda: _check_finished(run, data, config, stage))
        return run
    accelerator = build_accelerator(precision=config.precision, seed=stage.seed)
    network = build_network(data, config, stage)
    if not uses_deepspeed(accelerator):  # which views weights as bytes, and cannot in that order
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = stage_plan(config, epochs=stage.epochs, num_samples=len(data.train), world_size=ranks.world_size)
    training = start_training(
        network,
        accelerator=accelerator,
        ranks=ranks,
        run=run,
        config=config,
        resolved=_resolved(config, stage),
        batch_size=config.data.batch_size,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        identity={name: str(digest) for name, digest in data.facts["sha256"].items()},
    )
    with training:
        _learn(training, network, data, config, stage)
        _finish(training, network, data, config, stage)
    return run


def _check_finished(run: RunFolder, data: FineGrained, config: DownstreamConfig, stage: Stage) -> None:
    """Refuse a finished stage of another config or of other images."""
    run.claim(_resolved(config, stage), free=FREE_KEYS)
    if run.read_summary()["data"]["sha256"] != data.facts["sha256"]:
        raise InputError(
            f"{run.path} was trained or tested on other images: choose another --run, or remove that folder"
        )


def build_network(data: FineGrained, config: DownstreamConfig, stage: Stage) -> AttentionBranchNetwork:
    """The stage's network with its first weights."""
    branch = config.branch if stage.start is None else replace(config.branch, weights=None)
    network = AttentionBranchNetwork(branch, num_classes=len(data.classes), mining=stage.has(MINING))
    if stage.start is not None:
        network.load_state_dict(stage.start)
    return network


def _learn(
    training: Training, network: AttentionBranchNetwork, data: FineGrained, config: DownstreamConfig, stage: Stage
) -> None:
    start, ranks = training.resume(), training.ranks
    if start == training.total_steps:
        return
    objective = BranchObjective(
        module=training.module,
        pictures=data.train.on(training.accelerator.device),
        config=config.branch,
        batch_size=training.batch_size,
        grid=network.grid,
        use_maps=stage.has(MAPS),
    )
    batches = training_batches(
        data.train,
        min_area=config.branch.min_area,
        batch_size=training.batch_size,
        # another order than the first step's, the same for every arm
        seed=stage.seed if stage.arm == FIRST_STEP else stage.seed + ORDER_OFFSET,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start,
        stop_step=training.total_steps,
    )
    fit(training, batches, objective, start_step=start)


def _finish(
    training: Training, network: AttentionBranchNetwork, data: FineGrained, config: DownstreamConfig, stage: Stage
) -> None:
    """Keep the last weights, test them, and write the summary; the first step plays no games."""
    run, ranks = training.run, training.ranks
    weights = training.weights()
    plain = unwrap(training.module)
    assert isinstance(plain, AttentionBranchNetwork)
    found = evaluate(
        plain,
        data.test.on(training.accelerator.device),
        config.branch,
        curves=[] if stage.arm == FIRST_STEP else config.branch.curves,
        ranks=ranks,
        autocast=training.accelerator.autocast,
        label=f"testing {run.name}",
    )
    if training.ranks.is_main:
        atomic_write(run.path / WEIGHTS, save({name: value.contiguous() for name, value in weights.items()}))
        write_evaluation(run.path, found)
        metrics = summarise(found)
        assert training.tracker is not None
        training.tracker.log(metrics, step=training.total_steps)
        run.write_summary(
            metrics,
            step=training.total_steps,
            data=data.facts,
            protocol={"arm": stage.arm, "seed": stage.seed, "epochs": stage.epochs, "commit": environment()["commit"]},
        )
        training.report(f"{run.name}: top-1 {metrics['test/top1']:.2f} %, top-5 {metrics['test/top5']:.2f} %")
    ranks.barrier()


def _resolved(config: DownstreamConfig, stage: Stage) -> dict[str, Any]:
    """The config of one stage: what the table adds around it, and other tasks' options, are left out."""
    if stage.arm == FIRST_STEP:
        config = replace(config, run=config.first or config.run)
    values = config_to_dict(replace(config, arm=stage.arm, seed=stage.seed))
    resolved = {key: values[key] for key in KEPT} | {"epochs": stage.epochs}
    # what does not bear on this stage may differ between tables that share it
    dropped = {"test_batch", "paper"}
    for part, keys in PART_KEYS.items():
        dropped |= set() if stage.has(part) else keys
    if stage.arm == FIRST_STEP:
        dropped |= {"curves", "insertion_steps"}
    else:
        resolved |= {key: values[key] for key in ("first", "restart")}
    resolved["branch"] = {key: value for key, value in values["branch"].items() if key not in dropped}
    return resolved
