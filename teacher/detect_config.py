"""Options of `teacher/detect.py`. The docstring under a field is its `--help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, OpenUnitInterval, PositiveInt

from engine.settings import Precision
from shards.fetch import RemoteOptions


@dataclass
class DetectConfig:
    """Write the objects of an image set as labels."""

    shards: Path = Path("data/demo/shards/train")
    """Image shards, as shards/pack.py writes them."""
    output: Path = Path("data/demo/objects")
    """Folder for label sets; this one's own folder in it is named for the hash of the detector's weights or results."""
    threshold: OpenUnitInterval = 0.5
    """Score below which objects are left out, between 0 and 1."""
    results: Path | None = None
    """Results of any detector, written instead of running one: a JSON file in COCO's layout (images, categories,
    annotations), or COCO's bare list of results. Objects without score, such as COCO's own, count as 1."""
    annotations: Path | None = None
    """For a bare list of results: the JSON file in COCO's layout that names its images and categories."""
    max_bad_fraction: ClosedUnitInterval = 0.01
    """With results: share of this task's images that the file may lack, or have unusable masks for; above it the
    program stops. Fewer are left without a label and named."""
    model: Literal["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"] = "maskrcnn_resnet50_fpn"
    """torchvision's detector."""
    weights: Path | None = None
    """File of its weights (.pth or .safetensors); null takes torchvision's own, trained on COCO, from torch's cache, or
    fetches them."""
    categories: Path | None = None
    """Text file with the names of the detector's classes, one a line in their order, without the background; null takes
    COCO's."""
    min_size: PositiveInt = 800
    """Length that the detector scales an image's shorter side to, pixels."""
    max_size: PositiveInt = 1333
    """Bound of the longer side after that, pixels."""
    max_objects: PositiveInt = 100
    """Most objects of one image."""
    first_shard: NonNegativeInt = 0
    """Number of the first image shard to label."""
    num_shards: PositiveInt | None = None
    """Number of shards from there on; null takes all."""
    task: NonNegativeInt | None = None
    """Number of this task, from 0: it takes the task-th of num_tasks equal parts of those shards. null takes SLURM's
    array task."""
    num_tasks: PositiveInt | None = None
    """Number of tasks; null takes SLURM's array size, or 1 without SLURM."""
    batch_size: PositiveInt = 2
    """Images per forward; a batch never holds images of two shards."""
    num_workers: NonNegativeInt = 2
    """Reading processes per rank; 0 reads in the labelling process."""
    precision: Precision = "no"
    """Precision of the forward: no (fp32), bf16, fp16."""
    controls: str = ""
    """Control label set to write beside a finished set: shuffled (each image gets another image's objects)."""
    control_seed: int = 0
    """Seed of the shuffled control."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    """How image shards on s3://, gs:// and https:// are read."""
