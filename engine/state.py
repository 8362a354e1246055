"""Model and optimiser state in one form, whatever distributes them: `{parameter name: {slot: tensor}}`.

DDP keeps whole tensors on every rank; DeepSpeed ZeRO 1 and 2 keep flat pieces of fp32 weights and optimiser slots,
ZeRO 3 pieces of the weights themselves too. All are turned into whole CPU tensors by name, so a checkpoint written
under one loads under the others and on any number of ranks.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from engine.launch import uses_deepspeed

OptimizerState = dict[str, dict[str, Tensor]]


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP, DeepSpeed's engine or torch.compile.

    accelerate's own function imports DeepSpeed to find out, which costs seconds where it is not in use.
    """
    while isinstance(inner := getattr(module, "module", getattr(module, "_orig_mod", None)), nn.Module):
        module = inner
    return module


def model_state(accelerator: Accelerator, module: nn.Module, *, wanted: bool = True) -> dict[str, Tensor]:
    """Full-precision weights and buffers of the prepared `module`, on CPU. Every rank must call it.

    Args:
        wanted: whether this rank wants the result, or only helps the others to theirs.
    """
    plain = unwrap(module)
    if not uses_deepspeed(accelerator):
        return _to_cpu(plain.state_dict()) if wanted else {}
    from deepspeed.utils import safe_get_full_fp32_param

    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    with _whole([p for p in plain.parameters() if not p.requires_grad]):
        state = {name: value for name, value in plain.state_dict().items() if name not in trained}
        state = _to_cpu(state) if wanted else {}
    for name, parameter in trained.items():
        whole = safe_get_full_fp32_param(parameter)
        if wanted:
            state[name] = whole.detach().reshape(_shape(parameter)).to("cpu", copy=True)
    return state


def load_model_state(accelerator: Accelerator, module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put weights and buffers into the prepared `module`, and into DeepSpeed's full-precision copies."""
    plain = unwrap(module)
    with _whole(list(plain.parameters())):
        plain.load_state_dict(state)
    if uses_deepspeed(accelerator):
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                _set_full(parameter, state[name], key=None)


def optimizer_state(
    accelerator: Accelerator, module: nn.Module, optimizer: Any, *, wanted: bool = True
) -> OptimizerState:
    """Whole optimiser slots by parameter name, on CPU. Every rank must call it. Empty before the first step.

    Args:
        wanted: whether this rank wants the result, or only helps the others to theirs.
    """
    plain = unwrap(module)
    parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    if not uses_deepspeed(accelerator):
        slots = optimizer.optimizer.state if wanted else {}
        return {
            name: {k: torch.as_tensor(v).detach().to("cpu", copy=True) for k, v in slots[p].items() if v is not None}
            for name, p in parameters.items()
            if p in slots
        }
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = optimizer.optimizer
    flat_slots = [slots for slots in zero.optimizer.state.values() if slots]
    if not flat_slots:
        return {}
    _link_slots(zero)
    per_element = [k for k, v in flat_slots[0].items() if torch.is_tensor(v) and v.numel() > 1]
    shared = {k: torch.as_tensor(v).detach().to("cpu", copy=True) for k, v in flat_slots[0].items() if _is_scalar(v)}
    state: OptimizerState = {}
    for name, p in parameters.items():
        whole = {key: safe_get_full_optimizer_state(p, key) for key in per_element}
        if wanted:
            state[name] = {k: v.reshape(_shape(p)).to("cpu", copy=True) for k, v in whole.items()} | shared
    return state


def load_optimizer_state(accelerator: Accelerator, module: nn.Module, optimizer: Any, state: OptimizerState) -> None:
    """Put slots written by `optimizer_state` into the prepared optimiser."""
    if not state:
        return
    plain = unwrap(module)
    parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    if not uses_deepspeed(accelerator):
        for name, slots in state.items():
            p = parameters[name]
            place = _place_of_scalars(optimizer.optimizer, p)
            optimizer.optimizer.state[p] = {
                k: v.to(place, copy=True) if v.dim() == 0 else v.to(p.device) for k, v in slots.items()
            }
        return
    zero = optimizer.optimizer
    example = next(iter(state.values()))
    per_element = [k for k, v in example.items() if v.dim() > 0]
    for flat in _flat_weights(zero):
        # ZeRO makes its slots in the first step; make them now, so that they can be filled before it
        zero.optimizer.state[flat] = {k: torch.zeros_like(flat.data) for k in per_element} | {
            k: v.to(_place_of_scalars(zero.optimizer, flat), copy=True) for k, v in example.items() if v.dim() == 0
        }
    _link_slots(zero)
    for name, p in parameters.items():
        for key in per_element:
            _set_full(p, state[name][key], key=key)


def _place_of_scalars(optimizer: Any, weight: Tensor) -> torch.device:
    """Where scalars such as Adam's step count live: on the CPU, but for fused optimisers beside the weights."""
    return weight.device if optimizer.defaults.get("fused") else torch.device("cpu")


def _to_cpu(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter; under ZeRO 3 the parameter itself is empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Context in which `parameters` are whole on every rank, and what is written into them stays; for ZeRO 3."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0)


def _set_full(parameter: nn.Parameter, value: Tensor, *, key: str | None) -> None:
    """Put a whole tensor into this rank's piece of the fp32 weights (`key` None) or of an optimiser slot."""
    value = value.to(parameter.device, torch.float32)
    if not hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed's own function fails where the ranks' number does not divide the weights, which it pads
    zero = parameter._z3_optimizer  # type: ignore[attr-defined]
    piece, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    start = piece.numel() * zero._get_param_partition_rank(parameter)
    mine = value.flatten()[start : start + piece.numel()]
    piece.data.zero_()
    piece.data[: mine.numel()].copy_(mine)


def _flat_weights(zero: Any) -> list[Tensor]:
    """The fp32 tensors that ZeRO's optimiser sees: one per parameter group, or per sub-group under ZeRO 3."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _link_slots(zero: Any) -> None:
    """Connect every parameter with its piece of the slots.

    DeepSpeed 0.19 does it once, after the first parameter group's first step, when the other groups have no slots yet;
    so it is made to do it again.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return  # ZeRO 3 looks them up
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) or (torch.is_tensor(value) and value.numel() == 1)
