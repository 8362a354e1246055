"""Options of `teacher/label.py`. The docstring under a field is its `--help`."""

from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from engine.program import REPOSITORY
from engine.settings import Precision
from shards.fetch import RemoteOptions

DEFAULT_LABELS = REPOSITORY / "configs" / "teacher" / "label_demo.yaml"


@dataclass
class LabelConfig:
    """Label an image set with a teacher."""

    run: Path = Path("runs/demo-teacher")
    """Folder of the teacher's run."""
    hash: str | None = None
    """Hash that the teacher must have (its first characters are enough); null accepts what the run holds."""
    shards: Path = Path("data/demo/shards/train")
    """Image shards, as shards/pack.py writes them."""
    first_shard: NonNegativeInt = 0
    """Number of the first image shard to label."""
    num_shards: PositiveInt | None = None
    """Number of shards from there on; null takes all."""
    output: Path = Path("data/demo/labels")
    """Folder for label sets; this one's own folder in it is named for the teacher's hash."""
    task: NonNegativeInt | None = None
    """Number of this task, from 0: it takes the task-th of num_tasks equal parts of those shards. null takes SLURM's
    array task."""
    num_tasks: PositiveInt | None = None
    """Number of tasks; null takes SLURM's array size, or 1 without SLURM."""
    map_size: tuple[PositiveInt, PositiveInt] = (56, 56)
    """Rows and columns of the stored maps; they cover the whole image whatever its shape."""
    batch_size: PositiveInt = 32
    """Images per forward; a batch never holds images of two shards."""
    num_workers: NonNegativeInt = 2
    """Reading processes per rank; 0 reads in the labelling process."""
    precision: Precision = "no"
    """Precision of the forward: no (fp32), bf16, fp16."""
    controls: str = ""
    """Control label sets to write beside a finished set, separated by commas: shuffled, centre_bias."""
    control_seed: int = 0
    """Seed of the shuffled control."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    """How image shards on s3://, gs:// and https:// are read."""
