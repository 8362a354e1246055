"""Options of a comparing report."""

from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import NonNegativeInt

from engine.program import REPOSITORY

DEFAULT_CONFIG = REPOSITORY / "configs" / "report" / "demo.yaml"


@dataclass
class ReportConfig:
    """Compare pretrained runs."""

    name: str = "demo"
    """Name of the report; it is written to a folder of this name among the runs."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    students: list[str] = field(default_factory=lambda: ["demo-contrastive", "demo-attention"])
    """Names of the probed runs to compare, the baseline first."""
    teacher: str | None = "demo-teacher"
    """Name of the teacher's run, or null."""
    gaze: Path | None = Path("data/demo/shards/gaze_val")
    """Shards with human gaze for the gallery; those that the probes used. Null leaves the gallery out."""
    num_pictures: NonNegativeInt = 12
    """Rows of the gallery."""
