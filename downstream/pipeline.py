"""The two steps of Patro et al. (WACV 2021): train, mine surrogates, go on with and without them; seeds and arms."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from attention.supervision import SUPERVISION
from downstream.arms import named_arms
from downstream.config import DownstreamConfig, SupervisionConfig
from downstream.data import place
from downstream.miner import Surrogates, mine
from downstream.objective import ADVERSARIAL
from downstream.protocol import AttentionModel, Examples, Task
from downstream.stage import FIRST_STEP, Stage, best_weights, stage_folder, train_stage
from downstream.surrogates import PART, SurrogateStore, num_parts
from downstream.table import write_table
from downstream.tasks.registry import open_task
from engine.errors import InputError
from engine.launch import build_accelerator, refuse_zero3
from engine.progress import ProgressBar
from engine.ranks import Ranks
from engine.runs import RunFolder, check_run_name

# examples whose feature maps are kept at once, to draw masked copies from
MINING_BATCH = {"cpu": 64, "cuda": 256}


def arms_of(config: DownstreamConfig) -> list[str]:
    """The arms that `config.arm` names.

    Raises:
        InputError: an arm that does not exist, with those that do.
    """
    return named_arms(config, ("baseline", ADVERSARIAL, *sorted(SUPERVISION)))


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
    pipeline = Pipeline.open(config)
    results: dict[tuple[str, int], dict[str, float]] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        results[FIRST_STEP, seed] = pipeline.first_step(config, seed).read_summary()["metrics"]
        for arm in arms:
            results[arm, seed] = pipeline.second_step(config, arm, seed).read_summary()["metrics"]
    pipeline.ranks.on_main(lambda: write_table(config, pipeline.task, results))
    return results


def check_pipeline(config: DownstreamConfig) -> list[str]:
    """What `--check` prints: arms, modalities, examples and launcher; features of an encoder are not computed.

    Raises:
        InputError: see `arms_of` and `Pipeline.open`.
    """
    check_run_name(config.run)
    arms = f"run: {config.seeds} seed(s) of {FIRST_STEP} and {', '.join(arms_of(config))}"
    if config.task == "vqa":
        if not config.data.path.is_dir():
            raise InputError(f"data.path {config.data.path} is no folder: give that of VQA's JSON files and images")
        return [arms, f"data: {config.data.path}, read when it runs, as an encoder's features may take hours"]
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    refuse_zero3(accelerator, what=f"task {config.task}")
    task = open_task(config)
    sizes = {"train": len(task.train), "held out": len(task.held_out), "test": len(task.test)}
    return [
        f"launcher: {accelerator.num_processes} rank(s), {accelerator.distributed_type.value}, on {accelerator.device}",
        f"data: {', '.join(f'{count} {part}' for part, count in sizes.items())} examples; attention over "
        f"{', '.join(modalities_of(config, task))} is supervised",
        arms,
    ]


@dataclass
class Pipeline:
    """A task with its data read, on which the steps of any table of it are run.

    Each method takes the config anew: weights, epochs or names may differ from table to table, the data may not.
    """

    task: Task
    modalities: list[str]
    ranks: Ranks
    device: torch.device

    @classmethod
    def open(cls, config: DownstreamConfig) -> "Pipeline":
        """Join the launcher and read the data; onto the GPU where they fit.

        Raises:
            InputError: missing or damaged data, a modality that the task does not have, or DeepSpeed ZeRO 3.
        """
        accelerator = build_accelerator(precision=config.precision, seed=config.seed)
        refuse_zero3(accelerator, what=f"task {config.task}")
        ranks = Ranks()
        task = open_task(config)
        place(task, accelerator.device, loop=config.loop)
        return cls(task, modalities_of(config, task), ranks, accelerator.device)

    def first_step(self, config: DownstreamConfig, seed: int) -> RunFolder:
        """Train the model whose surrogates are mined; as all steps, only where it is missing."""
        return train_stage(self.task, config, Stage(FIRST_STEP, seed, config.epochs), ranks=self.ranks)

    def surrogates(self, config: DownstreamConfig, seed: int) -> dict[str, Surrogates]:
        """Surrogates of the first step, by modality."""
        return {
            name: mine_all(self.task, config, name, seed=seed, ranks=self.ranks, device=self.device)
            for name in self.modalities
        }

    def second_step(self, config: DownstreamConfig, arm: str, seed: int) -> RunFolder:
        """Train one arm; its first step and surrogates must be there or are made."""
        run = stage_folder(config, arm=arm, seed=seed)
        if self.ranks.broadcast(bool(run.read_summary())):  # which needs no surrogates
            return train_stage(self.task, config, Stage(arm, seed, config.retrain_epochs), ranks=self.ranks)
        first = self.first_step(config, seed)
        stage = Stage(arm, seed, config.retrain_epochs, start=None if config.restart else best_weights(first))
        if arm != "baseline":
            found = self.surrogates(config, seed)
            use = {name: supervised(given, config.supervision) for name, given in found.items()}
            stage = replace(stage, maps={name: given.maps for name, given in found.items()}, use=use)
        return train_stage(self.task, config, stage, ranks=self.ranks)


def supervised(found: Surrogates, config: SupervisionConfig) -> Tensor:
    """Which examples are supervised, bool `(examples,)`."""
    if not config.only_better:
        return torch.ones_like(found.best, dtype=torch.bool)
    return (found.best > 0) & (found.scores - found.unmasked >= config.margin)


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
                    rows = np.arange(number * PART, min((number + 1) * PART, len(examples)))
                    options = {"modality": modality, "device": device, "probes": config.supervision.probes}
                    store.write_part(number, mine_rows(task, model, examples, rows, **options))
                bar.update(1)
        ranks.barrier()
        if ranks.is_main:
            facts = {"modality": modality, "model": first.name, "examples": len(examples), "data": task.facts}
            store.seal(examples.keys, facts)
        ranks.barrier()
    return store.load(examples.keys)


def mine_rows(
    task: Task,
    model: AttentionModel,
    examples: Examples,
    rows: np.ndarray,
    *,
    modality: str,
    device: torch.device,
    probes: int = 0,
) -> Surrogates:
    """Surrogates of some rows of `examples`, in their order; `model` in evaluation mode on `device`."""
    found = []
    size = MINING_BATCH.get(device.type, MINING_BATCH["cpu"])
    for part in np.split(rows, range(size, len(rows), size)):
        inputs = {name: value.to(device) for name, value in examples.inputs(part).items()}
        found.append(
            mine(
                model,
                inputs,
                examples.targets[torch.from_numpy(part)].to(device),
                modality=modality,
                masks=lambda row: task.masks(modality, row),
                max_rows=probes,
            )
        )
    columns = {field.name: torch.cat([getattr(part, field.name) for part in found]) for field in fields(Surrogates)}
    return Surrogates(**columns)
