"""The attention branch network, and the masked pass of the attention mining branch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attention.maps import as_float
from downstream.branch.backbone import Backbone, build_backbone, without_stride
from downstream.branch.config import BranchConfig
from engine.errors import InputError


@dataclass
class BranchOutput:
    """What one forward gives.

    Attributes:
        attention_logits: of the attention branch, `(batch, classes)`.
        logits: of the perception branch, `(batch, classes)`; the network's answer.
        maps: `(batch, height, width)` in (0, 1).
        masked_logits: of the perception branch without what the map shows, `(batch, classes)`; None without mining.
    """

    attention_logits: Tensor
    logits: Tensor
    maps: Tensor
    masked_logits: Tensor | None


class AttentionBranch(nn.Module):
    """Last stage at stride 1 -> BN -> Conv1x1 to K -> BN -> ReLU = h; map `sigmoid(BN(Conv3x3(h)))`; class scores
    `GAP(Conv1x1(h))` (Fukui et al., CVPR 2019; layers as in their code).

    Args:
        last: the branch's own copy of the backbone's last stage.
    """

    def __init__(self, last: nn.Sequential, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.last = without_stride(last)
        self.norm = nn.BatchNorm2d(channels)
        self.reduce = nn.Conv2d(channels, num_classes, 1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(num_classes)
        self.to_map = nn.Conv2d(num_classes, 1, 3, padding=1, bias=False)
        self.map_norm = nn.BatchNorm2d(1)
        self.classify = nn.Conv2d(num_classes, num_classes, 1, bias=False)
        for layer in (self.reduce, self.to_map, self.classify):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(batch, channels, height, width)` to class logits and maps `(batch, 1, height, width)`."""
        hidden = torch.relu(self.reduce_norm(self.reduce(self.norm(self.last(features)))))
        with torch.autocast(features.device.type, enabled=False):  # in bf16, many positions of a map would tie
            maps = torch.sigmoid(self.map_norm(self.to_map(as_float(hidden))))
        return self.classify(hidden).mean(dim=(2, 3)), maps


class PerceptionBranch(nn.Module):
    """The backbone's last stage, average pooling, and a linear classifier."""

    def __init__(self, last: nn.Sequential, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.last, self.classify = last, nn.Linear(channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features `(batch, channels, height, width)` to class logits."""
        return self.classify(self.last(features).mean(dim=(2, 3)))


class AttentionBranchNetwork(nn.Module):
    """Shared features F, attention branch with map M, perception branch on `(1 + M) * F`.

    With `mining`, training forwards also send `F* = F - T(M) * F`, `T(M) = 1 / (1 + exp(-steepness (M - sigma)))`,
    through the same perception branch (Iwayoshi et al.). That pass is normalised by the running statistics and leaves
    them alone [our choice]: images without their object neither enter the statistics nor each other's scores.

    Raises:
        InputError: see `build_backbone`; or images too small for a map.
    """

    def __init__(self, config: BranchConfig, *, num_classes: int, mining: bool = False) -> None:
        super().__init__()
        backbone = build_backbone(config.backbone, weights=config.weights)
        # built a second time: from scratch its own random weights, else its own copy of the given ones
        attention = build_backbone(config.backbone, weights=config.weights).last
        self.shared = backbone.shared
        sizes = {"channels": backbone.num_last, "num_classes": num_classes}
        self.attention = AttentionBranch(attention, **sizes)
        self.perception = PerceptionBranch(backbone.last, **sizes)
        self.mining, self.sigma, self.steepness = mining, config.sigma, config.steepness
        for name, values in (("mean", backbone.mean), ("std", backbone.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.grid = _grid(backbone, config)

    def forward(self, images: Tensor) -> BranchOutput:
        """Images `(batch, 3, height, width)` in [0, 1]."""
        assert isinstance(self.mean, Tensor) and isinstance(self.std, Tensor)
        features = self.shared((images - self.mean) / self.std)
        attention_logits, maps = self.attention(features)
        logits = self.perception(features + maps.to(features) * features)
        masked = None
        if self.mining and self.training:
            hidden = torch.sigmoid(self.steepness * (maps - self.sigma)).to(features)
            with running_statistics(self.perception):
                masked = self.perception(features - hidden * features)
        return BranchOutput(attention_logits, logits, maps.squeeze(1), masked)


@contextmanager
def running_statistics(module: nn.Module) -> Iterator[None]:
    """Within the context, batch norms normalise with their running statistics and leave them as they are."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    try:
        for norm in norms:
            norm.training = False
        yield
    finally:
        for norm in norms:
            norm.training = True


@torch.no_grad()
def _grid(backbone: Backbone, config: BranchConfig) -> tuple[int, int]:
    """Rows and columns of the map."""
    backbone.shared.eval()
    found = backbone.shared(torch.zeros(1, 3, config.size, config.size)).shape[2:]
    backbone.shared.train()
    if min(found) < 2:
        raise InputError(
            f"branch.size {config.size}: {config.backbone} makes a {found[0]}x{found[1]} map of it; give larger images"
        )
    return int(found[0]), int(found[1])
