"""The two-step protocol: train an attention branch network, then every arm goes on from it for equally long."""

from downstream.arms import named_arms
from downstream.branch.data import FineGrained, open_data
from downstream.branch.evaluate import check_curves
from downstream.branch.model import AttentionBranchNetwork
from downstream.branch.stage import ARMS, MAPS, Stage, stage_weights, train_stage
from downstream.branch.table import write_table
from downstream.config import DownstreamConfig
from downstream.stage import FIRST_STEP, stage_plan
from engine.errors import InputError
from engine.launch import build_accelerator
from engine.progress import report, silent
from engine.ranks import Ranks
from engine.runs import check_run_name


def arms_of(config: DownstreamConfig) -> list[str]:
    """The arms that `config.arm` names.

    Raises:
        InputError: an arm that does not exist, or one with maps where no label set is given.
    """
    chosen = named_arms(config, ARMS)
    supervised = [name for name in chosen if MAPS in name]
    if supervised and config.branch.labels is None:
        raise InputError(f"arm '{supervised[0]}' needs branch.labels: a label set of the images in {config.data.path}")
    return chosen


def run_branch(config: DownstreamConfig) -> dict[tuple[str, int], dict[str, float]]:
    """Run every arm and seed of `config` and write their table; what is complete on disk is taken from there.

    Returns:
        Metrics by (arm, seed).
    """
    check_run_name(config.run)
    arms = arms_of(config)
    check_curves(config.branch.curves)
    build_accelerator(precision=config.precision, seed=config.seed)
    ranks = Ranks()
    data = open_data(config.data, config.branch, report=report if ranks.is_main else silent)
    results: dict[tuple[str, int], dict[str, float]] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        first = train_stage(data, config, Stage(FIRST_STEP, seed, config.epochs), ranks=ranks)
        results[FIRST_STEP, seed] = first.read_summary()["metrics"]
        for arm in arms:
            start = None if config.restart else stage_weights(first)
            stage = Stage(arm, seed, config.retrain_epochs, start=start)
            results[arm, seed] = train_stage(data, config, stage, ranks=ranks).read_summary()["metrics"]
    ranks.on_main(lambda: write_table(config, data, results))
    return results


def check_branch(config: DownstreamConfig) -> list[str]:
    """Validate a table without training it: arms, images, maps, network, launcher."""
    check_run_name(config.run)
    arms = arms_of(config)
    check_curves(config.branch.curves)
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    data: FineGrained = open_data(config.data, config.branch, report=silent)
    network = AttentionBranchNetwork(config.branch, num_classes=len(data.classes))
    steps = [
        stage_plan(config, epochs=e, num_samples=len(data.train), world_size=accelerator.num_processes).total_steps
        for e in (config.epochs, config.retrain_epochs)
    ]
    size, (rows, columns) = config.branch.size, network.grid
    return [
        f"launcher: {accelerator.num_processes} rank(s), {accelerator.distributed_type.value}, on {accelerator.device}",
        f"data: {len(data.train)} training and {len(data.test)} test images of {len(data.classes)} classes, split "
        f"{data.facts['split']}, {int(data.train.has_map.sum())} training images with a map",
        f"network: {config.branch.backbone}, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, "
        f"{size}x{size} images to {rows}x{columns} maps",
        f"run: {config.seeds} seed(s) of {FIRST_STEP} ({steps[0]} steps) and {', '.join(arms)} ({steps[1]} steps each)",
    ]
