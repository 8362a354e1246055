"""Options of a report."""

from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import NonNegativeInt

from engine.program import REPOSITORY
from engine.settings import TrackerName

DEFAULT_CONFIG = REPOSITORY / "configs" / "report" / "demo.yaml"


@dataclass
class ReportConfig:
    """Report on one pretrained run, or compare many."""

    name: str = "demo"
    """Name of the report; it is written to a folder of this name among the runs. The name of one of the students puts
    it into that run's own folder."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    students: list[str] = field(default_factory=lambda: ["demo-contrastive", "demo-attention"])
    """Names of the runs to compare, the baseline first. Runs that differ in nothing but their seed become one row, with
    mean and deviation."""
    teacher: str | None = "demo-teacher"
    """Name of the teacher's run, or null."""
    gaze: Path | None = Path("data/demo/shards/gaze_val")
    """Shards with human gaze for the gallery; those that the probes used. Null leaves the gallery out."""
    num_pictures: NonNegativeInt = 12
    """Rows of the gallery: a quarter of them the worst cases, a quarter the best, the rest spread over the set."""
    tracker: TrackerName = "none"
    """none, or wandb: the tables are sent to W&B too."""
    project: str = "saccade"
    """W&B project."""
