"""Forwards that must leave batch norm's running statistics as they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Within the context, training forwards normalise with their own batch and leave the running statistics alone."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def spare_statistics(backbone: nn.Module) -> None:
    """Make the second forward of gradient checkpointing leave the running statistics alone.

    That forward runs inside the backward; without this it would move the statistics by the same batch once more.
    """
    for norm in backbone.modules():
        if isinstance(norm, _BatchNorm):
            norm.register_forward_pre_hook(_hold)
            norm.register_forward_hook(_release, always_call=True)


def _hold(norm: Any, inputs: Any) -> None:
    norm.kept_momentum = norm.momentum
    if torch._C._current_graph_task_id() != -1:  # -1 outside of a backward
        norm.momentum = 0.0


def _release(norm: Any, inputs: Any, output: Any) -> None:
    norm.momentum = norm.kept_momentum
