"""Image classifiers with spatial attention over a feature map."""

from typing import Any

import torch
from torch import Tensor, nn

from downstream.protocol import Attended, AttentionModel, Inputs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SpatialAttention(nn.Module):
    """Conv1x1 -> tanh -> Conv1x1 -> softmax over positions: one map per image (our choice).

    Features come and go positions first: `(batch, height, width, channels)`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(channels, channels), nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Densities `(batch, height, width)`."""
        energies = self.outer(torch.tanh(self.inner(features))).squeeze(-1)
        return energies.flatten(1).softmax(1).view_as(energies)


class AttendedClassifier(nn.Module):
    """Attention, and a classifier of the features it weighs: position by position, then pooled by a hidden layer."""

    def __init__(self, channels: int, *, grid: tuple[int, int], num_classes: int, dropout: float, hidden: int = 128):
        super().__init__()
        self.attention = SpatialAttention(channels)
        self.classify = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(channels * grid[0] * grid[1], hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, features: Tensor) -> Attended:
        """Features `(batch, height, width, channels)` to logits and the map."""
        density = self.attention(features)
        # times the number of positions: a uniform map leaves the features as they are
        weighed = features * (density * density[0].numel()).unsqueeze(-1)
        return Attended(self.classify(weighed), {"image": density})


class SmallAttentionNetwork(AttentionModel):
    """Three convolutions to a feature map of a quarter of the image's side, then attention (Patro et al.: 32x8x8).

    Args:
        image_size: height and width of the images, a multiple of 4.
    """

    def __init__(self, *, num_classes: int, image_size: int = 32, channels: int = 32, dropout: float = 0.25) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )
        side = image_size // 4
        self.head = AttendedClassifier(channels, grid=(side, side), num_classes=num_classes, dropout=dropout)

    def encode(self, inputs: Inputs) -> dict[str, Tensor]:
        """Feature map `(batch, height, width, channels)` of uint8 `inputs["images"]`, `(batch, size, size, 3)`."""
        return {"image": self.trunk(normalised(inputs["images"])).permute(0, 2, 3, 1)}

    def attend(self, features: dict[str, Tensor], inputs: Inputs) -> Attended:
        """Attention over the (masked) feature map and class logits."""
        return self.head(features["image"])


class EncoderAttentionNetwork(AttentionModel):
    """Attention on the last feature map of a pretrained encoder, frozen or tuned.

    Args:
        backbone: timm model, as `pretrain.encoder.load_encoder` gives it.
        channels: the map is reduced to these before attention.
        frozen: leave the encoder's weights and its batch statistics alone.
    """

    def __init__(
        self, backbone: Any, *, num_classes: int, image_size: int, channels: int, frozen: bool, dropout: float
    ) -> None:
        super().__init__()
        self.backbone, self.frozen = backbone.requires_grad_(not frozen), frozen
        with torch.no_grad():
            width, rows, columns = self._maps(torch.zeros(1, 3, image_size, image_size)).shape[1:]
        self.grid = (rows, columns)
        self.reduce = nn.Conv2d(width, channels, 1)
        self.head = AttendedClassifier(channels, grid=self.grid, num_classes=num_classes, dropout=dropout)

    def train(self, mode: bool = True) -> "EncoderAttentionNetwork":
        """Training mode, which a frozen encoder does not follow."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def encode(self, inputs: Inputs) -> dict[str, Tensor]:
        """Reduced feature map `(batch, height, width, channels)` of uint8 `inputs["images"]`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self._maps(normalised(inputs["images"]))
        return {"image": torch.relu(self.reduce(maps)).permute(0, 2, 3, 1)}

    def attend(self, features: dict[str, Tensor], inputs: Inputs) -> Attended:
        """Attention over the (masked) feature map and class logits."""
        return self.head(features["image"])

    def _maps(self, images: Tensor) -> Tensor:
        options = {"indices": [-1], "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
        return self.backbone.forward_intermediates(images, **options)[0]


def normalised(images: Tensor) -> Tensor:
    """uint8 `(batch, height, width, 3)` as float32 `(batch, 3, height, width)` with ImageNet's mean and deviation."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std
