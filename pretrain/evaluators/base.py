"""What an evaluator is, and the registry of those that exist."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.errors import InputError
from engine.ranks import Ranks
from pretrain.config import Config
from pretrain.probe_config import ProbeConfig


@dataclass
class Subject:
    """The frozen encoder under test and where it came from.

    Attributes:
        backbone: timm model in evaluation mode, without gradients, on `device`.
        encoder: its folder; None for a randomly initialised one.
        step: training steps behind it.
    """

    config: Config
    backbone: Any
    encoder: Path | None
    step: int
    device: torch.device
    ranks: Ranks
    report: Callable[[str], None]


@dataclass
class Result:
    """What an evaluator found.

    Attributes:
        metrics: flat name to value, without the evaluator's name in front.
        protocol: what the numbers were measured on and how: split, size, seed, rates, hashes.
        maps: image key to predicted attention density `(height, width)`, for galleries.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    maps: dict[str, np.ndarray] = field(default_factory=dict)


class Evaluator(Protocol):
    """Runs on a frozen encoder. Every rank calls it; the result is the same on all."""

    def __call__(self, subject: Subject, probe: ProbeConfig) -> Result: ...


def evaluators() -> dict[str, Evaluator]:
    """Evaluators by name."""
    from pretrain.evaluators.alignment import alignment
    from pretrain.evaluators.linear_probe import linear_probe

    return {"linear_probe": linear_probe, "alignment": alignment}


def pick(names: str) -> dict[str, Evaluator]:
    """Evaluators named in a comma-separated list.

    Raises:
        InputError: an unknown name, with the known ones.
    """
    known = evaluators()
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise InputError(f"evaluators '{names}': {unknown or 'none'} not known; take from {', '.join(sorted(known))}")
    return {name: known[name] for name in chosen}
