"""The student network: a timm backbone with projection, attention and classification heads."""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from lightly.models.modules import SimCLRProjectionHead
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from engine.average import Average
from engine.errors import InputError
from pretrain.batch_statistics import spare_statistics
from pretrain.config import Config
from pretrain.encoder import backbone_arguments, feature_width, use_cifar_stem


@dataclass
class StudentOutput:
    """What one forward gives for a batch of views.

    Attributes:
        features: pooled backbone features `(batch, feature_width)`.
        embeddings: projections `(batch, projector_out)`, or None in supervised arms.
        class_logits: `(batch, num_classes)`, or None in contrastive arms.
        attention: per stage with a head, logits over positions `(batch, height, width)`; empty without attention.
    """

    features: Tensor
    embeddings: Tensor | None
    class_logits: Tensor | None
    attention: list[Tensor]


class AttentionHead(nn.Module):
    """Conv1x1 -> norm -> ReLU -> Conv3x3 -> 1: logits of the attention map at a stage's resolution (our choice)."""

    def __init__(self, in_channels: int, *, channels: int, norm: str) -> None:
        super().__init__()
        batch_norm = norm == "batch"
        self.reduce = nn.Conv2d(in_channels, channels, 1, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.predict = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """`(batch, in_channels, height, width)` to logits `(batch, height, width)`."""
        return self.predict(torch.relu(self.norm(self.reduce(features)))).squeeze(1)


class Student(nn.Module):
    """Backbone and heads. One forward serves all losses, so that the ranks' gradients meet once.

    Args:
        num_classes: width of the classifier in supervised arms.

    Raises:
        InputError: unknown backbone, or a stage that it does not have.
    """

    def __init__(self, config: Config, *, num_classes: int) -> None:
        super().__init__()
        self.backbone = build_backbone(config)
        width = feature_width(self.backbone)
        self.projector = self.classifier = None
        if config.contrastive:
            model = config.model
            batch_norm = model.head_norm == "batch"
            self.projector = SimCLRProjectionHead(
                width, model.projector_hidden, model.projector_out, batch_norm=batch_norm
            )
        else:
            self.classifier = nn.Linear(width, num_classes)
        self.stages = resolve_stages(self.backbone, config.attention.stages) if config.has_heads else []
        channels = [info["num_chs"] for info in self.backbone.feature_info]
        self.attention_heads = nn.ModuleList(
            AttentionHead(channels[stage], channels=config.attention.channels, norm=config.model.head_norm)
            for stage in self.stages
        )
        self.average = Average(self.parameters(), decay=config.ema) if config.ema > 0 else None

    def no_weight_decay(self) -> set[str]:
        """Weights that the backbone's authors spare from weight decay: a ViT's position and class tokens."""
        spared: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in spared}

    def forward(self, images: Tensor) -> StudentOutput:
        """Normalised images `(batch, 3, height, width)` through backbone and heads."""
        if self.stages:
            final, intermediates = self.backbone.forward_intermediates(
                images, indices=self.stages, norm=False, output_fmt="NCHW"
            )
        else:
            final, intermediates = self.backbone.forward_features(images), []
        features = self.backbone.forward_head(final, pre_logits=True)
        return StudentOutput(
            features=features,
            embeddings=self.projector(features) if self.projector is not None else None,
            class_logits=self.classifier(features) if self.classifier is not None else None,
            attention=[head(x) for head, x in zip(self.attention_heads, intermediates, strict=True)],
        )


def build_backbone(config: Config) -> Any:
    """A timm model (an nn.Module) without its classifier, from random weights.

    Raises:
        InputError: timm has no such model (with its nearest names), or it has no intermediate features.
    """
    name = config.model.backbone
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f"nearest: {', '.join(near)}" if near else "see timm.list_models()"
        raise InputError(f"model.backbone '{name}' is no timm model; {hint}")
    arguments = backbone_arguments(config)
    try:
        backbone: Any = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    except (TypeError, AssertionError, ValueError, NotImplementedError) as error:
        raise InputError(f"model.backbone '{name}' cannot be built with {arguments}: {error}") from error
    if not hasattr(backbone, "forward_intermediates"):
        raise InputError(f"model.backbone '{name}' gives no intermediate features; take e.g. resnet18 or vit_small")
    if config.model.cifar_stem:
        use_cifar_stem(backbone)
    if config.model.gradient_checkpointing:
        backbone.set_grad_checkpointing(True)
        spare_statistics(backbone)
    return backbone


def resolve_stages(backbone: Any, stages: list[int]) -> list[int]:
    """Stage numbers counted from 0, in ascending order.

    Raises:
        InputError: a stage that the backbone does not have, or one named twice.
    """
    count = len(backbone.feature_info)
    if not stages or any(not -count <= stage < count for stage in stages):
        raise InputError(f"attention.stages {stages}: the backbone has stages 0 to {count - 1} (or -1 to -{count})")
    resolved = sorted({stage % count for stage in stages})
    if len(resolved) != len(stages):
        raise InputError(f"attention.stages {stages} names a stage twice")
    return resolved


def input_statistics(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that timm gives for the model."""
    config = resolve_model_data_config(backbone)
    return tuple(config["mean"]), tuple(config["std"])
