"""Options of a probe."""

from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt

from engine.program import REPOSITORY

DEFAULT_CONFIG = REPOSITORY / "configs" / "probe" / "demo.yaml"


@dataclass
class LinearConfig:
    """The linear probe: Nesterov SGD on cached features, cosine schedule, no warm-up (SimCLR's protocol).

    Features are cached from the centre crop, without augmentation, and standardised: our choice, not SimCLR's.
    """

    epochs: PositiveInt = 90
    """Passes over the cached features."""
    batch_size: PositiveInt = 256
    """Features per step."""
    rates: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1, 0.3])
    """Learning rates tried side by side (times batch_size / 256); a tenth of the training set chooses among them."""
    weight_decay: float = 0.0
    """Weight decay."""
    random_init: bool = False
    """Also probe the same backbone with random weights, as a floor."""


@dataclass
class GazeConfig:
    """Alignment of the predicted attention with human gaze."""

    stride: PositiveInt = 4
    """Image pixels per cell of the maps that are compared."""
    readout_lr: PositiveFloat = 1e-3
    """AdamW learning rate of the head trained on a frozen encoder that has none of its own."""


@dataclass
class ProbeConfig:
    """Evaluate a pretrained encoder."""

    run: Path = Path("runs/demo-attention")
    """Run folder of a finished pretraining."""
    evaluators: str = "linear_probe,alignment"
    """Comma-separated names: linear_probe, alignment."""
    train: Path = Path("data/demo/shards/train")
    """Labelled image shards to train probes on."""
    val: Path = Path("data/demo/shards/val")
    """Labelled image shards to measure on."""
    gaze: Path = Path("data/demo/shards/gaze_val")
    """Shards with human gaze to measure alignment on."""
    labels: Path | None = None
    """Label shards for the read-out of an encoder without an attention head; null takes those of the run's config."""
    batch_size: PositiveInt = 256
    """Images per forward and rank."""
    crop: ClosedUnitInterval = 0.875
    """Share of the shorter side that the centre crop keeps."""
    num_workers: NonNegativeInt = 2
    """Data-loader processes per rank."""
    seed: int = 0
    """Seed of probes and read-outs."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    """The linear probe."""
    gaze_options: GazeConfig = field(default_factory=GazeConfig)
    """Alignment with gaze."""
