"""Options of a downstream fine-tune. The docstring under a field is its `--help`."""

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

from downstream.branch.config import BranchConfig
from downstream.captioning.config import CaptionConfig
from engine.program import REPOSITORY
from engine.settings import LoopConfig, OptimConfig, Precision
from shards.fetch import RemoteOptions

DEFAULT_CONFIG = REPOSITORY / "configs" / "downstream" / "trec6.yaml"

TaskName = Literal["trec6", "cifar10", "easy_vqa", "vqa", "abn", "caption"]
Balance = Literal["fixed", "balanced"]


@dataclass
class TextConfig:
    """Text classifier."""

    kind: Literal["self_attentive", "transformer"] = "self_attentive"
    """Structured self-attention over a BiLSTM (Lin et al.), or a transformer encoder."""
    embedding: PositiveInt = 300
    """Width of a word vector."""
    hidden: PositiveInt = 2000
    """Width of the layer behind the sentence matrix."""
    dropout: ClosedUnitInterval = 0.5
    """Dropout on word vectors and before the classifier."""
    min_count: PositiveInt = 2
    """Words seen fewer times in the training texts are read as unknown."""
    vectors: Path | None = None
    """GloVe text file with word vectors of width `embedding`, or null for random ones."""
    width: PositiveInt = 128
    """Width of the transformer."""
    depth: PositiveInt = 2
    """Layers of the transformer."""
    heads: PositiveInt = 4
    """Attention heads of the transformer."""


@dataclass
class ImageConfig:
    """Image classifier with spatial attention."""

    encoder: Path | None = None
    """An `encoder/` folder of a pretraining run, or timm:NAME for question answering and captioning, whose weights are
    vqa.weights or caption.weights; null for the small network from scratch."""
    frozen: bool = True
    """Keep a given encoder's weights as they are."""
    channels: PositiveInt = 32
    """Channels of the attended feature map."""
    size: PositiveInt = 32
    """Height and width of the images, pixels; others are resized."""
    num_masks: NonNegativeInt = 500
    """Random masks per image, besides the unmasked one."""
    mask_scale: PositiveInt = 2
    """Positions per cell of the coarse random grids."""
    mask_seed: int = 0
    """Seed of the random masks, the same for every image and run."""
    dropout: ClosedUnitInterval = 0.25
    """Dropout before the classifier."""


@dataclass
class VqaConfig:
    """Visual question answering; image size, channels, encoder and masks are those of `image`."""

    version: Literal["v1", "v2"] = "v2"
    """Release of the VQA data set: which question and annotation files of data.path are read."""
    images: Path | None = None
    """Folder that holds train2014/ and val2014/ with COCO's images; null takes data.path."""
    features: Path | None = None
    """Folder of ready feature maps: <subset>.npy `(images, channels, height, width)` and <subset>.ids.npy, the image
    number of each row; null computes them with `image.encoder`, or trains a small network."""
    weights: str | None = None
    """For image.encoder timm:NAME: its file of weights; null leaves them random."""
    cache: Path = Path("data/features")
    """Folder in which an encoder's feature maps are kept, float16, for every run that needs the same."""
    look: Literal["glimpses", "stacked"] = "glimpses"
    """Attention over the image: Kazemi and Elqursh (2017), or stacked (Yang et al., 2016)."""
    glimpses: PositiveInt = 2
    """Attention maps, or stacked layers."""
    embedding: PositiveInt = 300
    """Width of a word vector."""
    lstm: PositiveInt = 1024
    """Width of the LSTM's states, and of the question vector."""
    width: PositiveInt = 512
    """Width inside both attention networks."""
    hidden: PositiveInt = 1024
    """Width of the classifier."""
    dropout: ClosedUnitInterval = 0.5
    """Dropout on features, word vectors, attention and classifier."""
    num_answers: PositiveInt = 3000
    """Most frequent answers of the training set that are classes."""
    min_count: PositiveInt = 1
    """Words seen fewer times in the training questions are read as unknown."""
    max_skipped: ClosedUnitInterval = 0.01
    """Stop if a larger share of the questions has to be skipped: no image, empty text, fewer than ten answers."""


@dataclass
class DataConfig:
    """What is read."""

    path: Path = Path("data/trec6")
    """The data set: a folder with TREC.train and TREC.test; image shards; a folder of VQA or of captions."""
    val: Path | None = None
    """Image shards to test on, for tasks that read shards."""
    batch_size: PositiveInt = 32
    """Examples per step over all ranks."""
    held_out_seed: int = 0
    """Seed of the tenth of the training set that chooses the epoch; the same for all runs of a table."""
    limit: PositiveInt | None = None
    """Train on this many examples only, for trials."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    """How shards on s3://, gs:// and https:// are read; may change when a run goes on."""


@dataclass
class SupervisionConfig:
    """Attention supervision: L = L_c + gamma * L_att (Patro et al., WACV 2021)."""

    gamma: NonNegativeFloat = 1.0
    """Weight of the attention loss; with balance "balanced", the ratio gamma * L_att / L_c after the first epoch."""
    balance: Balance = "balanced"
    """fixed: gamma as it is; balanced: scaled once, so that both losses have `gamma`'s ratio after the first epoch."""
    beta: NonNegativeFloat = 1.0
    """The same for the second modality, where two are supervised (text, in VQA)."""
    max_weight: PositiveFloat = 1e4
    """Largest weight that the balance may give. A first-epoch attention loss near 0 would ask for any; 10,000 is what
    the public code of Patro et al. has for every task."""
    modalities: list[str] = field(default_factory=list)
    """Modalities to mine and supervise; empty takes all that the task has."""
    only_better: bool = True
    """Supervise only the examples whose best mask is not the unmasked input."""
    margin: ClosedUnitInterval = 0.0
    """With only_better, the true-class score by which the best mask must beat the unmasked input."""
    probes: NonNegativeInt = 0
    """Masked copies at once when surrogates are mined; 0 takes as many as a budget holds: on a CPU what stays in its
    cache, on a GPU what fills it (see downstream/miner.py)."""


@dataclass
class DownstreamConfig:
    """Fine-tune a supervised task with attention supervision."""

    run: str = "trec6"
    """Name of the table; its runs are named <run>-<arm>-seed<seed>."""
    first: str = ""
    """Name of the table whose first steps and surrogates are taken (and made, where they are missing); empty: run."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    task: TaskName = "trec6"
    """What is learnt."""
    arm: str = "mmd"
    """One arm, several with commas, or all (`arms`): baseline or an attention loss (mse, coral, mmd, adversarial, ...);
    task abn: baseline, mining, maps, mining+maps; task caption: baseline, ica, ica_middle, ica_zero, kld, ..."""
    arms: list[str] = field(default_factory=lambda: ["baseline", "coral", "mse", "mmd", "adversarial"])
    """The arms that "all" means."""
    seed: int = 0
    """First seed, of weights and order."""
    seeds: PositiveInt = 1
    """Number of seeds."""
    epochs: PositiveFloat = 10.0
    """Epochs of the first step, before mining."""
    retrain_epochs: PositiveFloat = 10.0
    """Epochs of the second step, the same for every arm; the baseline is not supervised. Captioning has one step."""
    restart: bool = False
    """Begin the second step from random weights, the baseline too, instead of the first step's."""
    precision: Precision = "no"
    """Mixed precision."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text model."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Image model."""
    vqa: VqaConfig = field(default_factory=VqaConfig)
    """Visual question answering."""
    branch: BranchConfig = field(default_factory=BranchConfig)
    """Fine-grained recognition (task abn)."""
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    """Captioning."""
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    """Attention supervision."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule, of each step."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """How the training is run."""
