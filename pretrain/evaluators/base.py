"""What an evaluator is: the frozen encoder it is given, the result it returns, and its name and needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.ranks import Ranks
from pretrain.config import Config
from pretrain.probe_config import ProbeConfig

Need = Literal["train", "val", "gaze"]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass
class Subject:
    """The frozen encoder under test and where it came from.

    Attributes:
        config: the run's; for an encoder from elsewhere the defaults, with its architecture and input size.
        backbone: timm model in evaluation mode, without gradients, on `device`.
        heads: state of the student's own attention heads; empty where there are none.
        hash: of the weights, hexadecimal; numbers and caches carry it.
        name: what it is called in reports.
        step: training steps behind it, 0 where unknown.
        statistics: mean and standard deviation per channel of its input.
        cache: folder of cached features; None keeps none.
        shared: features that one evaluator has computed and the next may take, see `pooled_features`; None keeps none.
    """

    config: Config
    backbone: Any
    heads: dict[str, Tensor]
    hash: str
    name: str
    step: int
    statistics: Statistics
    device: torch.device
    ranks: Ranks
    report: Callable[[str], None]
    cache: Path | None = None
    shared: dict[tuple[object, ...], tuple[Tensor, Tensor]] | None = None

    @property
    def image_size(self) -> int:
        """Side of the square input, pixels."""
        return self.config.data.image_size


@dataclass
class Result:
    """What an evaluator found.

    Attributes:
        metrics: flat name to value, without the evaluator's name in front.
        protocol: what the numbers were measured on and how: split, size, seed, rates, hashes.
        maps: image key to predicted attention density `(height, width)`, for galleries.
        tables: name to columns of numbers, all of one length: curves and per-item values for the report.
        pictures: name to uint8 `(height, width, 3)`.
        note: the options that belong to the number when it is printed, e.g. "k 200, T 0.1".
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    tables: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    note: str = ""


class Run(Protocol):
    """Evaluates a frozen encoder. Every rank calls it; the result is the same on all."""

    def __call__(self, subject: Subject, probe: ProbeConfig) -> Result: ...


@dataclass(frozen=True)
class Evaluator:
    """One way to judge an encoder. Other packages add theirs under the entry-point group `saccade.evaluators`.

    Attributes:
        name: what it is called on the command line; its metrics are logged as `<name>/<metric>`.
        needs: the data sets of the probe's config that it reads; they are opened and checked before anything runs.
        run: see `Run`.
        prefix: in front of its metrics instead of `name`.
    """

    name: str
    needs: tuple[Need, ...]
    run: Run
    prefix: str = ""

    @property
    def label(self) -> str:
        """What stands in front of its metrics."""
        return self.prefix or self.name
