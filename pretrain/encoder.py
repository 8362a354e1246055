"""The encoder file: a backbone that plain timm loads, and the run's student put together again for the probes."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from engine.errors import InputError
from engine.files import atomic_directory, sha256_of
from pretrain.config import Config

WEIGHTS, CONFIG, HEADS = "model.safetensors", "config.json", "heads.safetensors"


def write_encoder(directory: Path, backbone: nn.Module, *, config: Config, student: dict[str, Tensor]) -> None:
    """Write `encoder/`: backbone weights, timm's `config.json`, and beside them the attention heads.

    Loads without Saccade: `timm.create_model("<architecture>", num_classes=0, checkpoint_path="model.safetensors")`, or
    `timm.create_model("local-dir:<directory>", pretrained=True)`. A backbone with CIFAR stem is no model of timm's:
    `load_encoder`, or the three lines of `use_cifar_stem`, make the one that the weights fit.

    Args:
        student: the whole student's state, names as in `Student`.
    """
    data = resolve_model_data_config(backbone)
    size = config.data.image_size
    settings = {
        "architecture": config.model.backbone,
        "num_classes": 0,
        "num_features": feature_width(backbone),
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": data["interpolation"],
            "crop_pct": 1.0,
            "mean": list(data["mean"]),
            "std": list(data["std"]),
            "num_classes": 0,
        },
    }
    if arguments := backbone_arguments(config):
        settings["model_args"] = arguments
    if config.model.cifar_stem:
        settings["cifar_stem"] = True
    with atomic_directory(directory) as temporary:
        save_file(_part(student, "backbone."), temporary / WEIGHTS, metadata={"format": "pt"})
        save_file(_part(student, "attention_heads."), temporary / HEADS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def load_encoder(directory: Path) -> nn.Module:
    """Frozen backbone from an `encoder/` folder, in evaluation mode.

    Raises:
        InputError: no encoder there, or weights of another architecture.
    """
    if not (directory / WEIGHTS).is_file() or not (directory / CONFIG).is_file():
        raise InputError(f"no encoder in {directory}: finish the pretraining first, or give a run that has encoder/")
    settings = json.loads((directory / CONFIG).read_text())
    arguments = settings.get("model_args", {})
    backbone = timm.create_model(settings["architecture"], pretrained=False, num_classes=0, **arguments)
    if settings.get("cifar_stem", False):
        use_cifar_stem(backbone)
    try:
        backbone.load_state_dict(load_file(directory / WEIGHTS))
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{directory / WEIGHTS} does not fit {settings['architecture']}: {first}") from error
    return backbone.eval().requires_grad_(False)


def load_heads(directory: Path) -> dict[str, Tensor]:
    """State of the attention heads beside an encoder; empty for an arm without attention."""
    return load_file(directory / HEADS) if (directory / HEADS).is_file() else {}


def encoder_hash(directory: Path) -> str:
    """SHA-256 of the encoder's weights: what a probe's numbers were measured on."""
    return sha256_of(directory / WEIGHTS)


def feature_width(backbone: Any) -> int:
    """Width of a timm model's pooled features, `forward_head(..., pre_logits=True)`.

    `num_features` is the width before the head; MobileNetV3, VGG and others have a layer of another width in it.
    """
    return int(backbone.head_hidden_size)


def backbone_arguments(config: Config) -> dict[str, Any]:
    """Arguments of timm.create_model: the config's own, and `img_size` where the architecture is built for one size."""
    with torch.device("meta"):
        model = timm.create_model(config.model.backbone, num_classes=0)
    sized = getattr(getattr(model, "patch_embed", None), "img_size", None) is not None
    return ({"img_size": config.data.image_size} if sized else {}) | config.model.backbone_options


def use_cifar_stem(backbone: Any) -> None:
    """Give a timm ResNet the stem that SimCLR has for CIFAR-10: one 3x3 convolution of stride 1, no pooling.

    Source: SimCLR, Chen et al. 2020, appendix B.9.

    Raises:
        InputError: the backbone is no ResNet with a plain 7x7 stem.
    """
    stem = getattr(backbone, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or stem.kernel_size != (7, 7) or not hasattr(backbone, "maxpool"):
        raise InputError("model.cifar_stem replaces a ResNet's 7x7 stem: set it to false, or take e.g. resnet18")
    backbone.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm does
    backbone.maxpool = nn.Identity()
    shrink = {info["module"]: 4 for info in backbone.feature_info} | {backbone.feature_info[0]["module"]: 2}
    for info in backbone.feature_info:
        info["reduction"] //= shrink[info["module"]]


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory or are strided
    return {name.removeprefix(prefix): t.contiguous().clone() for name, t in state.items() if name.startswith(prefix)}
