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

    Raises:
        InputError: LARS under DeepSpeed ZeRO. LARS needs the norm of each whole layer; ZeRO 1 and 2 hand the optimiser
            flat pieces of all layers, and the result would be another algorithm under the same name.
    """
    if config.name == "lars" and uses_deepspeed(accelerator):
        raise InputError(
            "optim.name 'lars' cannot run under DeepSpeed ZeRO, which flattens the layers whose norms LARS needs: "
            "set optim.name to 'sgd' or 'adamw', or launch with DDP"
        )
    more: dict[str, Any] = {"betas": (config.momentum, 0.999)} if config.name == "adamw" else {}
    return create_optimizer_v2(
        module,
        opt=TIMM_NAMES[config.name],
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        **more,
    )
