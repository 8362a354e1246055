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
    fused: bool = False
    """One kernel for all weights of a step (torch's fused SGD and AdamW; LARS has none)."""


@dataclass
class LoopConfig:
    """How a training is run, not what it learns: all of it may change between two parts of one run."""

    log_every: PositiveInt = 10
    """Steps between two lines of metrics."""
    checkpoint_every: PositiveInt = 200
    """Steps between two checkpoints; one more is written at the end and on request."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints kept."""
    keep_every: NonNegativeInt = 0
    """Also keep, for ever, the checkpoints whose step is a multiple of this; 0 keeps none."""
    keep_best: str = ""
    """Also keep the checkpoint with the best value so far of a metric in metrics.jsonl: max:NAME or min:NAME."""
    stop_after: NonNegativeInt = 0
    """Stop with a checkpoint (exit code 75) after this step, as if asked to; 0 never does."""
    max_skipped: PositiveInt = 5
    """Stop after this many steps in a row whose loss or gradient was not finite; each is skipped on all ranks."""
    rank_timeout: NonNegativeFloat = 600.0
    """Seconds that ranks wait, in a step or an evaluation, for one that makes no progress before all stop; a twentieth
    of it (3 to 30 s) for one that gives no sign of life, none for one whose process ended; 0 waits for ever."""
    deterministic: bool = False
    """On a GPU, take kernels that give the same bits every time, as a CPU's do, so that a run that was stopped and went
    on ends in the same weights as one that was not. Somewhat slower."""
    ignore_failures: bool = False
    """Start although the last three attempts died at the same step."""
    record_order: bool = False
    """Write the positions (epoch, shard, row) of every step's samples into order/rank-*.jsonl of the run folder."""
    num_workers: NonNegativeInt = 2
    """Data-loader processes per rank; 0 reads in the training process."""
    tracker: TrackerName = "wandb"
    """wandb (offline unless logged in), or none; metrics.jsonl is written in any case."""
    project: str = "saccade"
    """W&B project."""
