"""The two steps of Patro et al. (WACV 2021): train, mine surrogates, go on with and without them; seeds and arms."""

from dataclasses import replace

import numpy as np
import torch

from attention.supervision import SUPERVISION
from downstream.config import DownstreamConfig
from downstream.miner import Surrogates, mine
from downstream.objective import ADVERSARIAL
from downstream.protocol import AttentionModel, Task
from downstream.stage import FIRST_STEP, Stage, best_weights, stage_folder, train_stage
from downstream.surrogates import PART, SurrogateStore, num_parts
from downstream.table import write_table
from downstream.tasks.registry import open_task
from engine.errors import InputError
from engine.launch import build_accelerator
from engine.progress import ProgressBar
from engine.ranks import Ranks
from engine.runs import check_run_name

MINING_BATCH = 64


def arms_of(config: DownstreamConfig) -> list[str]:
    """The arms that `config.arm` names.

    Raises:
        InputError: an arm that does not exist, with those that do.
    """
    chosen = config.arms if config.arm == "all" else [name.strip() for name in config.arm.split(",")]
    known = ("baseline", ADVERSARIAL, *sorted(SUPERVISION))
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise InputError(f"arm '{config.arm}': {unknown or 'none'} not known; take from all, {', '.join(known)}")
    return chosen


def modalities_of(config: DownstreamConfig, task: Task) -> list[str]:
    """Modalities to supervise, in the task's order.

    Raises:
        InputError: one that the task does not have.
    """
    asked = config.supervision.modalities or list(task.modalities)
    unknown = [name for name in asked if name not in task.modalities]
    if unknown:
        raise InputError(
            f"supervision.modalities {unknown}: task '{config.task}' has attention over {', '.join(task.modalities)}"
        )
    return [name for name in task.modalities if name in asked]


def run_pipeline(config: DownstreamConfig) -> dict[tuple[str, int], dict[str, float]]:
    """Run every arm and seed of `config` and write their table; what is complete on disk is taken from there.

    Returns:
        Metrics by (arm, seed).
    """
    check_run_name(config.run)
    arms = arms_of(config)
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    ranks = Ranks()
    task = open_task(config)
    modalities = modalities_of(config, task)
    results: dict[tuple[str, int], dict[str, float]] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        first = train_stage(task, config, Stage(FIRST_STEP, seed, config.epochs), ranks=ranks)
        results[FIRST_STEP, seed] = first.read_summary()["metrics"]
        found: dict[str, Surrogates] = {}
        if arms != ["baseline"]:
            found = {
                m: mine_all(task, config, m, seed=seed, ranks=ranks, device=accelerator.device) for m in modalities
            }
        for arm in arms:
            stage = Stage(arm, seed, config.retrain_epochs, start=best_weights(first))
            if arm != "baseline":
                use = {m: s.best > 0 if config.supervision.only_better else s.best >= 0 for m, s in found.items()}
                stage = replace(stage, maps={m: s.maps for m, s in found.items()}, use=use)
            results[arm, seed] = train_stage(task, config, stage, ranks=ranks).read_summary()["metrics"]
    ranks.on_main(lambda: write_table(config, task, results))
    return results


def mine_all(
    task: Task, config: DownstreamConfig, modality: str, *, seed: int, ranks: Ranks, device: torch.device
) -> Surrogates:
    """Surrogates of every training example from the first step's best weights; mined where they are missing.

    Parts are shared out among the ranks; the result does not depend on their number.
    """
    first = stage_folder(config, arm=FIRST_STEP, seed=seed)
    store = SurrogateStore(first.path / "surrogates" / modality)
    examples = task.train
    if not ranks.broadcast(store.complete):
        model = task.build_model()
        model.load_state_dict(best_weights(first))
        model.to(device).eval()
        parts = range(ranks.rank, num_parts(len(examples)), ranks.world_size)
        with ProgressBar(len(parts), f"mining {modality} surrogates, seed {seed}") as bar:
            for number in parts:
                if not store.has_part(number):
                    store.write_part(number, _mine_part(task, config, model, modality, number, device=device))
                bar.update(1)
        ranks.barrier()
        if ranks.is_main:
            facts = {"modality": modality, "model": first.name, "examples": len(examples), "data": task.facts}
            store.seal(examples.keys, facts)
        ranks.barrier()
    return store.load(examples.keys)


def _mine_part(
    task: Task, config: DownstreamConfig, model: AttentionModel, modality: str, number: int, *, device: torch.device
) -> Surrogates:
    examples = task.train
    stop = min((number + 1) * PART, len(examples))
    found = []
    for begin in range(number * PART, stop, MINING_BATCH):
        rows = np.arange(begin, min(begin + MINING_BATCH, stop))
        inputs = {name: value.to(device) for name, value in examples.inputs(rows).items()}
        found.append(
            mine(
                model,
                inputs,
                examples.targets[torch.from_numpy(rows)].to(device),
                modality=modality,
                masks=lambda row: task.masks(modality, row),
                max_rows=config.supervision.probes,
            )
        )
    return Surrogates(
        maps=torch.cat([f.maps for f in found]),
        best=torch.cat([f.best for f in found]),
        scores=torch.cat([f.scores for f in found]),
        unmasked=torch.cat([f.unmasked for f in found]),
    )
