"""Image classifiers with spatial attention over a feature map."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from downstream.protocol import Attended, AttentionModel, Inputs

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# Energies are this much larger than the layers' usual start makes them. Without it a map trained on CIFAR-10 is within
# 6 % of the uniform one, whatever the image is masked with, and there is nothing to supervise.
SHARPNESS = 10.0


class SpatialAttention(nn.Module):
    """Conv1x1 -> tanh -> Conv1x1, times `SHARPNESS` -> softmax over positions: one map per image (our choice).

    Features come and go positions first: `(batch, height, width, channels)`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(channels, channels), nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Densities `(batch, height, width)`."""
        return self.of_keys(self.inner(features))

    def of_keys(self, keys: Tensor) -> Tensor:
        """Densities of what `inner` gives."""
        energies = SHARPNESS * self.outer(torch.tanh(keys)).squeeze(-1)
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

    def settle(self, features: Tensor) -> dict[str, Tensor]:
        """What masks leave of the work: the two linear maps of each position's features, before any mask.

        Returns:
            "image" `(batch, height, width, channels + 1)`: attention's keys without their bias, and a 1 that tells how
            much a mask leaves of a position; "parts" `(batch, positions, hidden)`: each position's own contribution to
            the hidden layer.
        """
        hidden = self._hidden
        keys = functional.linear(features, self.attention.inner.weight)
        weights = hidden.weight.view(len(hidden.weight), -1, features.shape[3])
        parts = torch.einsum("bpc,hpc->bph", features.flatten(1, 2), weights)
        return {"image": torch.cat([keys, torch.ones_like(keys[..., :1])], dim=3), "parts": parts}

    def attend_settled(self, features: dict[str, Tensor]) -> Attended:
        """Logits and map, as `forward` in evaluation mode gives them, of masked features that were settled."""
        keys, kept = features["image"][..., :-1], features["image"][..., -1]
        density = self.attention.of_keys(keys + self.attention.inner.bias)
        weights = (density * kept * density[0].numel()).flatten(1)
        hidden = (weights.unsqueeze(1) @ features["parts"]).squeeze(1) + self._hidden.bias
        return Attended(self.classify[3:](hidden), {"image": density})

    @property
    def _hidden(self) -> nn.Linear:
        layer = self.classify[2]
        assert isinstance(layer, nn.Linear)
        return layer


class AttendedNetwork(AttentionModel):
    """An image network whose end, behind the feature map, is an `AttendedClassifier` called `head`."""

    head: AttendedClassifier

    def settle(self, features: dict[str, Tensor], inputs: Inputs, *, modality: str) -> tuple[dict[str, Tensor], Inputs]:
        """Both linear maps of the features are worked out once for all masks; images are not needed any more."""
        return self.head.settle(features["image"]), {}

    def attend(self, features: dict[str, Tensor], inputs: Inputs) -> Attended:
        """Attention over the (masked) feature map and class logits."""
        return self.head.attend_settled(features) if "parts" in features else self.head(features["image"])


class SmallAttentionNetwork(AttendedNetwork):
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


class EncoderAttentionNetwork(AttendedNetwork):
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

    def _maps(self, images: Tensor) -> Tensor:
        options = {"indices": [-1], "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
        return self.backbone.forward_intermediates(images, **options)[0]


def normalised(images: Tensor) -> Tensor:
    """uint8 `(batch, height, width, 3)` as float32 `(batch, 3, height, width)` with ImageNet's mean and deviation."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    mean, std = _statistics(images.device)
    return (pixels - mean) / std


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    # made once: a copy to a GPU waits for all that it has to do; ordinary tensors even if first asked for by inference
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
        return mean, std
