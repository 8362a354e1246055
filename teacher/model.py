"""The saliency model: a readout of every level of a timm backbone, added up to one log-density (EML-NET's kind)."""

import math
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional

from attention.maps import log_density
from engine.errors import InputError
from teacher.config import ModelConfig

# Standard deviations that the smoothing kernel reaches out to, of the largest sigma it can learn.
REACH, MAX_GROWTH = 3.0, 2.0


class Tap(nn.Module):
    """Conv3x3 -> norm -> ReLU: what one level of the backbone says about where people look."""

    def __init__(self, in_channels: int, *, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        """`(batch, in_channels, rows, columns)` to `(batch, channels, rows, columns)`."""
        return torch.relu(self.norm(self.conv(features)))


class Smoothing(nn.Module):
    """Gaussian over the logits with a learnt sigma, as in DeepGaze; the border repeats its outermost cells."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.initial = sigma
        self.log_growth = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        """`(batch, 1, rows, columns)` to the same."""
        growth = torch.exp(math.log(MAX_GROWTH) * torch.tanh(self.log_growth))
        radius = math.ceil(REACH * MAX_GROWTH * self.initial)
        offsets = torch.arange(-radius, radius + 1, device=logits.device, dtype=logits.dtype)
        weights = torch.exp(-0.5 * (offsets / (self.initial * growth)).square())
        weights = weights / weights.sum()
        padded = functional.pad(logits, (radius, radius, radius, radius), mode="replicate")
        return functional.conv2d(functional.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))


class CentrePrior(nn.Module):
    """Logarithm of a Gaussian over the image with learnt centre and widths, as shares of the sides."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.full((2,), 0.5))
        # OSIE's fixations spread 0.20 of the height and 0.21 of the width
        self.log_width = nn.Parameter(torch.full((2,), math.log(0.2)))

    def forward(self, logits: Tensor) -> Tensor:
        """Add the prior to `(batch, 1, rows, columns)`."""
        rows, columns = (
            -0.5 * (((torch.arange(n, device=logits.device) + 0.5) / n - centre) * torch.exp(-width)).square()
            for n, centre, width in zip(logits.shape[2:], self.centre, self.log_width, strict=True)
        )
        return logits + rows[:, None] + columns


class SaliencyModel(nn.Module):
    """Backbone, taps and readout.

    Args:
        image_size: height and width in pixels; fixed for backbones with position embeddings.

    Raises:
        InputError: unknown backbone, one without feature maps, a tap that it does not have, too small images, or a
            stride beyond them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        if config.stride is not None and config.stride > min(image_size):
            raise InputError(
                f"model.stride {config.stride} is more than the smaller side of data.image_size {list(image_size)}: "
                f"lower it"
            )
        self.image_size = image_size
        self.backbone, statistics = build_backbone(config.backbone, taps=config.taps, image_size=image_size)
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(statistics[name]).view(1, 3, 1, 1))
        self.taps = nn.ModuleList(Tap(n, channels=config.channels) for n in _feature_info(self.backbone).channels())
        height, width = image_size
        stride = config.stride
        self.size = None if stride is None else (math.ceil(height / stride), math.ceil(width / stride))
        self.readout = nn.Conv2d(len(self.taps) * config.channels, 1, 3, padding=1)
        self.smoothing = Smoothing(config.smoothing) if config.smoothing > 0 else nn.Identity()
        self.prior = CentrePrior() if config.centre_prior else nn.Identity()
        with torch.no_grad():
            training = self.training
            blank = torch.zeros(1, *image_size, 3, dtype=torch.uint8)
            self.grid: tuple[int, int] = tuple(self.eval()(blank).shape[1:])
            self.train(training)

    def forward(self, images: Tensor) -> Tensor:
        """Log-density of where people look.

        Args:
            images: uint8 `(batch, height, width, 3)`, RGB, of `image_size`.

        Returns:
            float32 `(batch, rows, columns)`; the exponentials sum to 1 over each image.
        """
        pixels = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        levels = [tap(features) for tap, features in zip(self.taps, self.backbone(pixels), strict=True)]
        size = self.size or tuple(levels[0].shape[2:])
        # fp16 and bf16 are too coarse for logits that a softmax over thousands of cells follows
        with torch.autocast(images.device.type, enabled=False):
            resized = [_resize(level.float(), size) for level in levels]
            logits = self.prior(self.smoothing(self.readout(torch.cat(resized, dim=1))))
            return log_density(logits.squeeze(1))


def _resize(level: Tensor, size: tuple[int, ...]) -> Tensor:
    """`(batch, channels, rows, columns)` on another grid, bilinear, without aliasing where it shrinks."""
    shrinks = level.shape[2] > size[0] or level.shape[3] > size[1]
    return functional.interpolate(level, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


def build_backbone(
    name: str, *, taps: list[int], image_size: tuple[int, int]
) -> tuple[nn.Module, dict[str, tuple[float, ...]]]:
    """A timm model that returns its feature maps, finest first, from random weights; and its input's mean and std.

    Raises:
        InputError: see `SaliencyModel`.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f"nearest: {', '.join(near)}" if near else "see timm.list_models()"
        raise InputError(f"model.backbone '{name}' is no timm model; {hint}")
    options: dict[str, Any] = {"img_size": image_size} if _has_fixed_size(name) else {}
    try:
        with torch.device("meta"):
            count = len(_feature_info(timm.create_model(name, features_only=True, **options)))
        indices = resolve_taps(taps, count=count)
        backbone = timm.create_model(name, features_only=True, pretrained=False, out_indices=indices, **options)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        height, width = image_size
        raise InputError(
            f"model.backbone '{name}' cannot give feature maps of {height}x{width} images ({error}): "
            f"take another data.image_size or e.g. resnet18"
        ) from error
    known = timm.get_pretrained_cfg(name)
    mean, std = (known.mean, known.std) if known else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return backbone, {"mean": tuple(mean), "std": tuple(std)}


def resolve_taps(taps: list[int], *, count: int) -> list[int]:
    """Levels counted from 0 in ascending order, all for an empty list.

    Raises:
        InputError: a level that the backbone does not have, or one named twice.
    """
    if any(not -count <= tap < count for tap in taps):
        raise InputError(f"model.taps {taps}: the backbone has levels 0 to {count - 1} (or -1 to -{count})")
    resolved = sorted({tap % count for tap in taps}) if taps else list(range(count))
    if taps and len(resolved) != len(taps):
        raise InputError(f"model.taps {taps} names a level twice")
    return resolved


def _has_fixed_size(name: str) -> bool:
    """Whether a timm architecture is built for one input size (position embeddings)."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    return getattr(getattr(model, "patch_embed", None), "img_size", None) is not None


def _feature_info(backbone: nn.Module) -> Any:
    """timm's description of the feature maps that a features_only model returns."""
    return backbone.feature_info
