"""Options of a pretraining run. The docstring under a field is its `--help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)

from engine.program import REPOSITORY
from engine.settings import LoopConfig, OptimConfig, Precision
from pretrain.probe_config import OnlineConfig
from shards.fetch import RemoteOptions

DEFAULT_CONFIG = REPOSITORY / "configs" / "pretrain" / "demo.yaml"

Arm = Literal["contrastive", "contrastive+attention", "co-train", "supervised", "supervised+attention"]


@dataclass
class DataConfig:
    """What is read."""

    shards: Path = Path("data/demo/shards/train")
    """Image shards to train on, as shards/pack.py writes them."""
    labels: Path | None = Path("data/demo/labels")
    """Label shards of a teacher for these images, or a folder that holds exactly one such set; attention arms only."""
    teacher: str | None = None
    """Checkpoint hash that the labels must have come from (its first characters are enough); null accepts any."""
    control: Literal["none", "shuffled", "centre_bias"] = "none"
    """Which label set to take where `labels` holds a teacher's set and its controls: the teacher's, or a control."""
    gaze: Path | None = None
    """Image shards with human gaze, as shards/pack.py writes them; arm co-train only."""
    gaze_batch_size: PositiveInt = 32
    """Gaze images per step over all ranks; the ranks' number must divide it; arm co-train only."""
    batch_size: PositiveInt = 256
    """Images per step over all ranks; the ranks' number must divide it."""
    image_size: PositiveInt = 224
    """Height and width of a view, pixels."""
    window: PositiveInt = 16
    """Shards whose samples are shuffled together, 64 at most."""
    max_bad_fraction: ClosedUnitInterval = 1e-3
    """Stop when more than this share of the samples read is unreadable and more than one is; 0 stops at the first."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    """How shards, labels and gaze on s3://, gs:// and https:// are read; may change when a run goes on."""


@dataclass
class ViewsConfig:
    """SimCLR's augmentations; the defaults are its ImageNet values."""

    min_area: OpenUnitInterval = 0.08
    """Smallest share of the image that a crop covers; the largest is 1."""
    jitter: NonNegativeFloat = 1.0
    """Strength s of the colour jitter (0.8 s, 0.8 s, 0.8 s, 0.2 s), applied with probability 0.8 in random order."""
    grey: ClosedUnitInterval = 0.2
    """Probability of a grey view."""
    blur: ClosedUnitInterval = 0.5
    """Probability of Gaussian blur, sigma 0.1 to 2.0 pixels, kernel a tenth of the view."""
    solarize: ClosedUnitInterval = 0.0
    """Probability of solarising above one half (SimCLR has none; BYOL uses 0.2 on one view)."""


@dataclass
class ModelConfig:
    """Backbone and heads."""

    backbone: str = "resnet50"
    """Any timm model with intermediate features: resnet18, resnet50, vit_small_patch16_224, ..."""
    backbone_options: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm.create_model, e.g. {output_stride: 8} for a finer grid in the last stages of a ResNet."""
    cifar_stem: bool = False
    """Small images: a ResNet's stem becomes one 3x3 convolution of stride 1 without pooling (SimCLR, appendix B.9)."""
    gradient_checkpointing: bool = False
    """Keep no activations inside blocks and compute them again in the backward: less memory, about a third slower."""
    projector_hidden: PositiveInt = 2048
    """Width of the projection head's hidden layer."""
    projector_out: PositiveInt = 128
    """Width of the embedding that is contrasted."""
    head_norm: Literal["batch", "none"] = "batch"
    """Normalisation in projection and attention heads. "none" makes a ViT free of batch statistics."""


@dataclass
class AttentionConfig:
    """The attention head: L_attn = A * KLD - B * NSS (Yao et al. 2023); A, B and lambda are our choice."""

    weight: NonNegativeFloat = 1.0
    """lambda, the weight of L_attn."""
    kld: NonNegativeFloat = 1.0
    """A, the weight of the KL divergence."""
    nss: NonNegativeFloat = 0.1
    """B, the weight of the normalised scanpath saliency."""
    nss_target: Literal["soft", "sampled", "top"] = "soft"
    """NSS target without fixations: the map as soft weights, 50 sampled points, or its top 5 %."""
    stages: list[int] = field(default_factory=lambda: [-1])
    """Backbone stages with a head of their own, -1 being the last; the loss is the sum over them."""
    channels: PositiveInt = 256
    """Hidden channels of the head."""
    min_mass: ClosedUnitInterval = 0.05
    """A view whose crop holds less than this share of its map is left out of L_attn."""


@dataclass
class Config:
    """Pretrain a student."""

    run: str = "demo-attention"
    """Name of the run; the same name goes on where it stopped."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    arm: Arm = "contrastive+attention"
    """What the student learns from."""
    epochs: PositiveFloat = 100.0
    """Passes over the image shards; fractions are fine."""
    max_steps: PositiveInt | None = None
    """Train for this many steps instead of `epochs`."""
    temperature: PositiveFloat = 0.1
    """NT-Xent temperature."""
    seed: int = 0
    """Seed of weights, order and augmentations."""
    precision: Precision = "no"
    """Mixed precision: no (fp32), bf16, fp16. The losses are computed in fp32 in any case."""
    channels_last: bool = False
    """Keep images and convolution weights in channels-last memory order."""
    compile: bool = False
    """Compile the student with torch.compile: the first steps take minutes, the others less."""
    sync_batch_norm: bool = False
    """Batch norm over the batch of all ranks instead of each rank's own; needs GPUs."""
    ema: ClosedUnitInterval = 0.0
    """Decay per step of a moving average of the weights, kept in fp32; above 0 `encoder/` holds the average."""
    diagnostics_every: NonNegativeInt = 50
    """Steps between two looks at alignment, uniformity, rank and the losses' gradients; 0 for none."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Augmentations."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Backbone and heads."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention head and its loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """How the training is run; may change when a run goes on."""
    online: OnlineConfig = field(default_factory=OnlineConfig)
    """Evaluators that run during training."""

    @property
    def contrastive(self) -> bool:
        """Whether the arm contrasts two views (else it classifies one)."""
        return not self.arm.startswith("supervised")

    @property
    def attends(self) -> bool:
        """Whether the arm learns a teacher's maps of the images."""
        return self.arm.endswith("+attention")

    @property
    def co_trains(self) -> bool:
        """Whether the arm learns human maps of gaze images, beside the images."""
        return self.arm == "co-train"

    @property
    def has_heads(self) -> bool:
        """Whether the student has attention heads."""
        return self.attends or self.co_trains

    @property
    def num_views(self) -> int:
        """Views per image."""
        return 2 if self.contrastive else 1
