"""Options that every training program shares. Light to import: `--help` must not wait for torch."""

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Precision = Literal["no", "bf16", "fp16"]
TrackerName = Literal["wandb", "none"]


@dataclass
class OptimConfig:
    """Optimiser and schedule."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """LARS (trust coefficient 1e-3), SGD with momentum, or AdamW. Norms and biases get no weight decay (nor LARS)."""
    lr: PositiveFloat = 0.3
    """Learning rate before scaling."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """linear: lr * batch / 256; sqrt: lr * sqrt(batch); none: lr as it is."""
    momentum: ClosedUnitInterval = 0.9
    """Momentum of LARS and SGD; beta1 of AdamW."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of the weights."""
    warmup_epochs: NonNegativeFloat = 10.0
    """Epochs of linear warm-up from zero."""
    schedule: Literal["cosine", "half", "constant"] = "cosine"
    """After warm-up: cosine to zero; x0.1 at half of all steps; or constant."""
    clip_norm: NonNegativeFloat = 0.0
    """Clip the gradient's global L2 norm to this; 0 leaves it alone."""
    micro_batch: NonNegativeInt = 0
    """Images a rank passes through the encoder at a time; 0 takes the whole local batch. The losses still see all."""


@dataclass
class LoopConfig:
    """How a training is run, not what it learns: all of it may change between two parts of one run."""

    log_every: PositiveInt = 10
    """Steps between two lines of metrics."""
    checkpoint_every: PositiveInt = 200
    """Steps between two checkpoints; one more is written at the end and on request."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints kept."""
    stop_after: NonNegativeInt = 0
    """Stop with a checkpoint (exit code 75) after this step, as if asked to; 0 never does."""
    num_workers: NonNegativeInt = 2
    """Data-loader processes per rank; 0 reads in the training process."""
    tracker: TrackerName = "wandb"
    """wandb (offline unless logged in), or none; metrics.jsonl is written in any case."""
    project: str = "saccade"
    """W&B project."""
