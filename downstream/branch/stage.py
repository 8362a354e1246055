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
from downstream.branch.pictures import Cropping
from downstream.config import DownstreamConfig
from downstream.data import training_batches
from downstream.stage import FIRST_STEP, ORDER_OFFSET, check_finished, stage_folder, stage_plan
from engine.environment import environment
from engine.files import atomic_write
from engine.launch import build_accelerator, uses_deepspeed
from engine.loop import Training, fit, start_training
from engine.program import config_to_dict
from engine.ranks import Ranks
from engine.runs import RunFolder

WEIGHTS = "weights.safetensors"
MINING, MAPS = "mining", "maps"
ARMS = ("baseline", MINING, MAPS, f"{MINING}+{MAPS}")
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


def stage_weights(run: RunFolder) -> dict[str, Tensor]:
    """Last weights of a finished stage."""
    return load_file(run.path / WEIGHTS)


def train_stage(data: FineGrained, config: DownstreamConfig, stage: Stage, *, ranks: Ranks) -> RunFolder:
    """Train and test one stage, or go on with it; a finished one is left as it is.

    Raises:
        InputError: see `start_training` and `check_finished`; Requeue: stopped on request with a checkpoint.
    """
    run = stage_folder(config, arm=stage.arm, seed=stage.seed)
    if ranks.broadcast(bool(run.read_summary())):
        ranks.on_main(lambda: check_finished(run, _resolved(config, stage), data.facts))
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
        _finish(training, data, config, stage)
    return run


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
    # another order than the first step's, the same for every arm
    seed = stage.seed if stage.arm == FIRST_STEP else stage.seed + ORDER_OFFSET
    batches = training_batches(
        Cropping(data.train.sizes, min_area=config.branch.min_area, seed=seed),
        count=len(data.train),
        batch_size=training.batch_size,
        seed=seed,
        num_workers=0,  # a batch is a few numbers per image
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start,
        stop_step=training.total_steps,
    )
    fit(training, batches, objective, start_step=start)


def _finish(training: Training, data: FineGrained, config: DownstreamConfig, stage: Stage) -> None:
    """Keep the last weights, test them, and write the summary; the first step plays no games."""
    run, ranks, device = training.run, training.ranks, training.accelerator.device
    weights = training.weights()
    if ranks.is_main:
        atomic_write(run.path / WEIGHTS, save({name: value.contiguous() for name, value in weights.items()}))
    ranks.barrier()
    # a network of what was kept: while training, ranks differ in batch norm's statistics, and ZeRO 3 cuts weights up
    kept = build_network(data, config, replace(stage, start=stage_weights(run)))
    found = evaluate(
        kept.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        data.test.on(device),
        config.branch,
        curves=[] if stage.arm == FIRST_STEP else config.branch.curves,
        ranks=ranks,
        autocast=training.accelerator.autocast,
        label=f"testing {run.name}",
    )
    if ranks.is_main:
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
