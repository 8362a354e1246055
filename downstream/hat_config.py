"""Options of the comparison with human attention. Light to import."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveInt


@dataclass
class HatConfig:
    """Compare a run's attention with human attention (VQA-HAT)."""

    run: Path = Path("runs/vqa-adversarial-seed0")
    """Run folder of a finished stage of task vqa."""
    maps: Path = Path("data/vqa_hat/val")
    """Folder of human maps, <question>_<n>.png, of any size."""
    grid: PositiveInt = 14
    """Side of the grid on which both maps are compared."""
    batch_size: PositiveInt = 64
    """Questions per forward."""
