"""From a batch's inputs to a feature map: ready ones, or an encoder that learns with the captioner."""

from typing import Any

from torch import Tensor, nn

from downstream.protocol import Inputs
from pretrain.augment import normalize
from pretrain.evaluators.base import Statistics


class FeatureTrunk(nn.Module):
    """Ready feature maps, or those of `backbone`.

    Args:
        backbone: a timm model that learns along, its batch statistics kept; None where features are ready.
        statistics: mean and deviation of its input.
        channels: of the features, which are normalised over them; None leaves them as they are.
    """

    def __init__(self, channels: int | None, *, backbone: Any = None, statistics: Statistics | None = None) -> None:
        super().__init__()
        self.backbone, self.statistics = backbone, statistics
        self.norm: nn.Module = nn.Identity() if channels is None else nn.LayerNorm(channels)

    def train(self, mode: bool = True) -> "FeatureTrunk":
        """Learning, but for batch statistics: a batch of captions shows one image several times."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, inputs: Inputs) -> Tensor:
        """Features `(batch, channels, height, width)`, each place normalised over the channels.

        Encoders differ in the scale of their features by a hundred, and attention starts from it (our choice).
        """
        if self.backbone is None:
            features = inputs["features"].float()
        else:
            assert self.statistics is not None
            pixels = inputs["images"].permute(0, 3, 1, 2).float() / 255
            mean, std = self.statistics
            options = {"indices": [-1], "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
            (features,) = self.backbone.forward_intermediates(normalize(pixels, mean=mean, std=std), **options)
        return self.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
