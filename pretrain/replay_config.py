"""Options of pretrain/replay.py."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt


@dataclass
class ReplayConfig:
    """Which step of which run."""

    run: Path = Path("runs/demo-attention")
    """Folder of the run."""
    step: PositiveInt = 1
    """Number of the step, as in metrics.jsonl and bad_batches.jsonl."""
    micro_batch: NonNegativeInt = 64
    """Images at a time; the batch of all ranks passes through one process here. 0 takes it whole."""
