"""Weights written by other libraries, brought to timm's names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import InputError

# Where libraries keep the state in their files: Lightning and MoCo, timm and DINO, VISSL.
_PLACES = (
    ("classy_state_dict", "base_model", "model", "trunk"),
    ("state_dict",),
    ("model",),
    ("model_state_dict",),
    ("teacher",),
    ("student",),
)
# What they put in front of the encoder's names; several may stand one behind another.
_PREFIXES = (
    "module.",
    "model.",
    "backbone.",
    "encoder.",
    "encoder_q.",
    "base_encoder.",
    "online_encoder.",
    "student.",
    "trunk.",
    "base_model.",
    "_feature_blocks.",
    "net.",
)
# torch.nn.Sequential(*list(resnet.children())[:-1]), as lightly's examples cut torchvision's ResNets.
_SEQUENTIAL_RESNET = {"0.": "conv1.", "1.": "bn1.", "4.": "layer1.", "5.": "layer2.", "6.": "layer3.", "7.": "layer4."}
_NUM_SHOWN = 5


def read_state(file: Path, *, key_map: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name; nothing in the file is run.

    Args:
        file: safetensors, an encoder/ folder, or what torch.save wrote.
        key_map: beginnings of names to what replaces them, before anything else is done with the names.

    Raises:
        InputError: no such file, one that is not of these kinds, or without tensors.
    """
    path = file / "model.safetensors" if file.is_dir() else file
    if not path.is_file():
        raise InputError(f"{file}: no such weights; give a checkpoint file or an encoder/ folder")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    except Exception as error:  # bytes that are no checkpoint make the unpickler stumble in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"{path}: cannot be read without running code from it ({reason}): save the plain state dict"
        ) from error
    state = _find_state(loaded)
    if not state:
        raise InputError(f"{path}: no tensors found in it: save the model's state dict")
    for old, new in key_map.items():
        if not any(name.startswith(old) for name in state):
            raise InputError(f"load.key_map: no name in {path} begins with '{old}'; they begin with {_first(state)}")
        state = {new + name.removeprefix(old) if name.startswith(old) else name: v for name, v in state.items()}
    return state


def fit_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> list[str]:
    """Load `state` into `model`, finding its names under the usual prefixes; classifiers and heads are left out.

    Returns:
        Lines that list the names that were not used.

    Raises:
        InputError: a tensor of the model that the file does not have, or has in another shape.
    """
    wanted = model.state_dict()
    names = max(_namings(state), key=lambda named: len(named.keys() & wanted.keys()))
    best = {name: state[original] for name, original in names.items()}
    # counters of batch norm are missing from old files and decide nothing in a frozen encoder
    absent = [name for name in wanted if name not in best and not name.endswith("num_batches_tracked")]
    misfit = [name for name in wanted if name in best and best[name].shape != wanted[name].shape]
    if absent or misfit:
        first = (absent + misfit)[0]
        what = "absent" if absent else f"of shape {tuple(best[first].shape)}, not {tuple(wanted[first].shape)}"
        raise InputError(
            f"{where}: {len(absent) + len(misfit)} of {len(wanted)} tensors do not fit, the first is {first} ({what}); "
            f"the file's names begin with {_first(state)}: give the right architecture, or a --load.key_map"
        )
    model.load_state_dict({name: best.get(name, value) for name, value in wanted.items()})
    unused = sorted(state.keys() - {names[name] for name in wanted if name in names})
    if not unused:
        return []
    shown = ", ".join(unused[:_NUM_SHOWN]) + (", ..." if len(unused) > _NUM_SHOWN else "")
    return [f"{where}: {len(unused)} tensors not used by the encoder: {shown}"]


def _torch_load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _find_state(loaded: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors inside what a file held."""
    for place in ((), *_PLACES):
        value = loaded
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            tensors = {str(name): v for name, v in value.items() if isinstance(v, Tensor)}
            if tensors:
                return tensors
    return {}


def _namings(state: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """Every naming that stripping prefixes can give, new name to the file's; the model's own names choose one."""
    seen: list[dict[str, str]] = []
    waiting = [{name: name for name in state}]
    while waiting:
        names = waiting.pop()
        if any(names.keys() == other.keys() for other in seen):
            continue
        seen.append(names)
        for prefix in _PREFIXES:
            cut = {new.removeprefix(prefix): old for new, old in names.items() if new.startswith(prefix)}
            if cut:
                waiting.append(cut)
        numbered = {new: old for new, old in names.items() if new.startswith(tuple(_SEQUENTIAL_RESNET))}
        if numbered:
            seen.append({_SEQUENTIAL_RESNET[new[:2]] + new[2:]: old for new, old in numbered.items()})
    return seen


def _first(state: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({name.split(".")[0] + "." for name in state})[:_NUM_SHOWN])
