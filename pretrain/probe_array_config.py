"""Options of one task of an array of evaluations. Light to import."""

from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from pretrain.probe_config import ProbeConfig


@dataclass
class ProbeArrayConfig(ProbeConfig):
    """Evaluate many runs, shared out among tasks: every evaluator of every run, by corruption where it has some."""

    runs: list[Path] = field(default_factory=list)
    """Run folders to evaluate; empty takes `run` alone."""
    task: NonNegativeInt | None = None
    """Number of this task, from 0: it takes every num_tasks-th piece of work. null takes Slurm's array task."""
    num_tasks: PositiveInt | None = None
    """Number of tasks; null takes Slurm's array size, or 1 without Slurm."""
