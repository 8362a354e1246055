"""Model and optimiser state in one form, whatever distributes them: `{parameter name: {slot: tensor}}`.

DDP keeps whole tensors on every rank; DeepSpeed ZeRO 1 and 2 keep flat pieces. Both are turned into whole CPU tensors
by name, so a checkpoint written under one loads under the other and on any number of ranks.
"""

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


def model_state(accelerator: Accelerator, module: nn.Module) -> dict[str, Tensor]:
    """Full-precision weights and buffers of the prepared `module`, on CPU. Every rank must call it."""
    plain = unwrap(module)
    state = {name: value.detach().to("cpu", copy=True) for name, value in plain.state_dict().items()}
    if uses_deepspeed(accelerator):
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                state[name] = safe_get_full_fp32_param(parameter).to("cpu", copy=True)
    return state


def load_model_state(accelerator: Accelerator, module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put weights and buffers into the prepared `module`, and into DeepSpeed's full-precision copies."""
    plain = unwrap(module)
    plain.load_state_dict(state)
    if uses_deepspeed(accelerator):
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, state[name].to(parameter.device, torch.float32))


def optimizer_state(accelerator: Accelerator, module: nn.Module, optimizer: Any) -> OptimizerState:
    """Whole optimiser slots by parameter name, on CPU. Every rank must call it. Empty before the first step."""
    plain = unwrap(module)
    parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    if not uses_deepspeed(accelerator):
        slots = optimizer.optimizer.state
        return {
            name: {k: torch.as_tensor(v).detach().to("cpu", copy=True) for k, v in slots[p].items() if v is not None}
            for name, p in parameters.items()
            if p in slots
        }
    from deepspeed.utils import safe_get_full_optimizer_state

    flat_slots = list(optimizer.optimizer.optimizer.state.values())
    if not flat_slots:
        return {}
    _link_slots(optimizer.optimizer)
    per_element = [k for k, v in flat_slots[0].items() if torch.is_tensor(v) and v.numel() > 1]
    shared = {k: torch.as_tensor(v).detach().to("cpu", copy=True) for k, v in flat_slots[0].items() if _is_scalar(v)}
    return {
        name: {k: safe_get_full_optimizer_state(p, k).to("cpu", copy=True) for k in per_element} | shared
        for name, p in parameters.items()
    }


def load_optimizer_state(accelerator: Accelerator, module: nn.Module, optimizer: Any, state: OptimizerState) -> None:
    """Put slots written by `optimizer_state` into the prepared optimiser."""
    if not state:
        return
    plain = unwrap(module)
    parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    if not uses_deepspeed(accelerator):
        for name, slots in state.items():
            p = parameters[name]
            # scalars such as Adam's step count stay on the CPU, where the optimisers keep them
            optimizer.optimizer.state[p] = {k: v.clone() if v.dim() == 0 else v.to(p.device) for k, v in slots.items()}
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    zero = optimizer.optimizer
    example = next(iter(state.values()))
    per_element = [k for k, v in example.items() if v.dim() > 0]
    for flat in zero.single_partition_of_fp32_groups:
        # ZeRO makes its slots in the first step; make them now, so that they can be filled before it
        zero.optimizer.state[flat] = {k: torch.zeros_like(flat.data) for k in per_element} | {
            k: v.clone() for k, v in example.items() if v.dim() == 0
        }
    _link_slots(zero)
    for name, p in parameters.items():
        for key in per_element:
            safe_set_full_optimizer_state(p, state[name][key].to(p.device), key)


def _link_slots(zero: Any) -> None:
    """Connect every parameter with its piece of the slots.

    DeepSpeed 0.19 does it once, after the first parameter group's first step, when the other groups have no slots yet;
    so it is made to do it again.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) or (torch.is_tensor(value) and value.numel() == 1)
