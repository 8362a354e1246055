"""A timm backbone cut where the attention branch begins, before its last stage, and where its weights come from."""

import json
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from engine.errors import InputError
from engine.package_weights import PYPI, PYPI_BACKBONE, package_weights
from pretrain.encoder import load_encoder

CIFAR = re.compile(r"cifar_resnet(\d+)")
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR_WIDTHS = (16, 32, 64)
BOTTLENECK_DEPTH = 44


@dataclass
class Backbone:
    """A backbone in two parts.

    Attributes:
        shared: images `(batch, 3, height, width)` to the features F that both branches see.
        last: F to the features that are pooled and classified; it halves the resolution.
        num_shared, num_last: channels of the two.
        mean, std: per channel, of images in [0, 1].
    """

    shared: nn.Sequential
    last: nn.Sequential
    num_shared: int
    num_last: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_backbone(name: str, *, weights: str | None) -> Backbone:
    """The named backbone, with random weights or those that `weights` names.

    Raises:
        InputError: no such backbone, one of another family, or weights that cannot be read or do not fit.
    """
    if match := CIFAR.fullmatch(name):
        if weights is not None:
            raise InputError(f"branch.weights {weights}: {name} is trained from scratch; set it to null")
        return _cifar_resnet(int(match[1]))
    model = _with_weights(name, weights) if weights is not None else _create(name)
    stages = list(model.feature_info)
    # by name: strides alone do not tell where timm counts a stage to end
    cut = next(place for place, (part, _) in enumerate(_parts(model)) if part == stages[-2]["module"]) + 1
    data = resolve_model_data_config(model)
    shared, last = _parts(model)[:cut], _parts(model)[cut:]
    return Backbone(
        nn.Sequential(OrderedDict((part.replace(".", "_"), module) for part, module in shared)),
        nn.Sequential(OrderedDict((part.replace(".", "_"), module) for part, module in last)),
        int(stages[-2]["num_chs"]),
        int(model.num_features),
        tuple(data["mean"]),
        tuple(data["std"]),
    )


def without_stride(last: nn.Sequential) -> nn.Sequential:
    """Make a last stage keep the resolution of its input, as the attention branch's does; changes `last` itself."""
    for module in last.modules():
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1):
            module.stride = (1, 1)
        elif isinstance(module, nn.AvgPool2d):
            module.kernel_size = module.stride = 1
    return last


def _create(name: str) -> Any:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f"nearest: {', '.join(near)}" if near else "take e.g. resnet18, resnet50, cifar_resnet20"
        raise InputError(f"branch.backbone '{name}' is no timm model; {hint}")
    return _checked(timm.create_model(name, pretrained=False, num_classes=0), name)


def _checked(model: Any, name: str) -> Any:
    if not isinstance(model, ResNet | EfficientNet):
        raise InputError(f"branch.backbone '{name}' is neither ResNet nor EfficientNet of timm: take e.g. resnet18")
    return model


def _parts(model: Any) -> list[tuple[str, nn.Module]]:
    """Modules between image and pooled features, in the order in which the model calls them."""
    parts: list[tuple[str, nn.Module]] = []
    for name, module in model.named_children():
        if name in ("global_pool", "fc", "classifier"):
            continue
        inner = module.named_children() if name == "blocks" else None
        parts += [(f"{name}.{part}", stage) for part, stage in inner] if inner is not None else [(name, module)]
    return parts


def _with_weights(name: str, weights: str) -> Any:
    folder = Path(weights)
    if folder.is_dir():
        model = load_encoder(folder).requires_grad_(True).train()
        found = json.loads((folder / "config.json").read_text())["architecture"]
        if found != name:
            raise InputError(f"branch.weights {weights} holds a {found}: set branch.backbone to it")
        return _checked(model, name)
    model = _create(name)
    if weights == PYPI and name != PYPI_BACKBONE:
        raise InputError(f"branch.weights {PYPI} fits {PYPI_BACKBONE} only, not {name}: set branch.backbone to it")
    state = package_weights("branch.weights") if weights == PYPI else _from_file(folder)
    wanted = model.state_dict()
    misfits = [part for part, value in wanted.items() if part not in state or state[part].shape != value.shape]
    if misfits:
        raise InputError(
            f"branch.weights {weights} does not fit {name}: {len(misfits)} of {len(wanted)} tensors are absent or of "
            f"another shape, the first is {misfits[0]}; give weights of that backbone under timm's names"
        )
    model.load_state_dict({part: state[part] for part in wanted})
    return model


def _from_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(
            f"branch.weights {file}: no such weights; give a file with timm's names, an encoder/ folder, {PYPI} or null"
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        raise InputError(f"branch.weights {file} holds no weights ({' '.join(str(error).split())[:120]})") from error


def _cifar_resnet(depth: int) -> Backbone:
    """ResNet for 32x32 images (He et al., 2016, section 4.2): 3x3 stem, three stages of n blocks, depth 6n + 2.

    From depth 44 on its blocks are bottlenecks, four times as wide, as in the attention branch network's own code.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise InputError(f"branch.backbone 'cifar_resnet{depth}': the depth must be 6n + 2, e.g. 20, 32, 56, 110")
    block: Any = Bottleneck if depth >= BOTTLENECK_DEPTH else BasicBlock
    width = CIFAR_WIDTHS[0]
    stem = [("conv1", nn.Conv2d(3, width, 3, padding=1, bias=False)), ("bn1", nn.BatchNorm2d(width))]
    stages: list[tuple[str, nn.Module]] = [*stem, ("act1", nn.ReLU(inplace=True))]
    for number, planes in enumerate(CIFAR_WIDTHS):
        layers = []
        for index in range(blocks):
            stride = 2 if number > 0 and index == 0 else 1
            layers.append(block(width, planes, stride, _shortcut(width, planes * block.expansion, stride)))
            width = planes * block.expansion
        stages.append((f"layer{number + 1}", nn.Sequential(*layers)))
    backbone = Backbone(
        nn.Sequential(OrderedDict(stages[:-1])),
        nn.Sequential(OrderedDict(stages[-1:])),
        CIFAR_WIDTHS[1] * block.expansion,
        width,
        CIFAR_MEAN,
        CIFAR_STD,
    )
    for part in (backbone.shared, backbone.last):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )
