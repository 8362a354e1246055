"""Optimisers and learning-rate schedules, computed from the config and never written back into it."""

import math
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from engine.errors import InputError
from engine.launch import uses_deepspeed
from engine.settings import OptimConfig

# timm's names: its "sgd" is Nesterov, ours is plain heavy-ball momentum as in SimCLR and EML-NET.
TIMM_NAMES = {"sgd": "momentum", "lars": "lars", "adamw": "adamw"}


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a pure function of the step."""

    peak: float
    warmup_steps: int
    total_steps: int
    shape: str

    def __call__(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "cosine":
            done = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
            return self.peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        if self.shape == "half":
            return self.peak * (0.1 if step >= self.total_steps // 2 else 1.0)
        return self.peak


def build_schedule(config: OptimConfig, *, batch_size: int, steps_per_epoch: float, total_steps: int) -> Schedule:
    """Scale the learning rate for the global batch and lay the schedule over the run.

    Source of the two scalings: SimCLR, Chen et al. 2020, appendix B.1 (0.3 * B / 256 and 0.075 * sqrt(B)).
    """
    scale = {"linear": batch_size / 256, "sqrt": math.sqrt(batch_size), "none": 1.0}[config.lr_scaling]
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
    return Schedule(config.lr * scale, warmup, total_steps, config.schedule)


def build_optimizer(module: nn.Module, config: OptimConfig, *, accelerator: Accelerator) -> Optimizer:
    """Optimiser over `module`; norms and biases in a group without weight decay and without layer-wise scaling.

    LARS is You et al. 2017's, as timm has it: `v = m v + r (g + wd w)`, `w -= lr v`,
    `r = 1e-3 |w| / (|g| + wd |w|)`. SimCLR's code differs in two details that matter little: it divides by
    `|g + wd w|`, and multiplies by the learning rate before the momentum, not after.

    Raises:
        InputError: LARS under DeepSpeed ZeRO. LARS needs the norm of each whole layer; ZeRO hands the optimiser flat
            pieces of all layers, and the result would be another algorithm under the same name. Or fused LARS.
    """
    if config.name == "lars" and uses_deepspeed(accelerator):
        raise InputError(
            "optim.name 'lars' cannot run under DeepSpeed ZeRO, which flattens the layers whose norms LARS needs: "
            "set optim.name to 'sgd' or 'adamw', or launch with DDP"
        )
    if config.name == "lars" and config.fused:
        raise InputError("optim.fused: LARS has no fused form: leave it false, or set optim.name to 'sgd' or 'adamw'")
    more: dict[str, Any] = {"betas": (config.momentum, 0.999)} if config.name == "adamw" else {}
    if config.name != "lars":
        more["fused"] = config.fused
    groups = _weight_groups(module, weight_decay=config.weight_decay)
    if config.name == "lars":
        groups[0]["always_adapt"] = True  # else a decay of 0 would switch the layer-wise scaling off
    return create_optimizer_v2(
        [group for group in groups if group["params"]],
        opt=TIMM_NAMES[config.name],
        lr=config.lr,
        weight_decay=0.0,
        momentum=config.momentum,
        **more,
    )


def _weight_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The weights, and what gets no weight decay: norms, biases, and what the module's `no_weight_decay` names.

    timm makes these groups too, but not for a decay of 0, and LARS needs them there.
    """
    spared: set[str] = getattr(module, "no_weight_decay", set)()
    weights: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim > 1 and not name.endswith(".bias") and name not in spared
            (weights if plain else rest).append(parameter)
    return [{"params": weights, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
