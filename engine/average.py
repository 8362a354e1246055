"""Exponential moving average of a module's weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from engine.errors import InputError
from engine.launch import refuse_zero3


def check_average(decay: float, *, accelerator: Accelerator) -> None:
    """Refuse a config's `ema` that would not average.

    Raises:
        InputError: a decay of 1; or a decay above 0 where weights do not lie whole on a rank.
    """
    if decay == 1:
        raise InputError("ema 1.0 would keep the first random weights for ever: take e.g. 0.999, or 0 for no average")
    if decay > 0:
        refuse_zero3(accelerator, what="ema", instead="set it to 0, or zero_stage to 1 or 2")


class Average(nn.Module):
    """Moving average of the trainable weights of a module, in fp32 whatever the module is cast to.

    A part of the module that it averages, so that checkpoints hold it, and with it the number of steps that it has
    taken in. Buffers (batch norm's running statistics, which are moving averages already) are not averaged.

    Args:
        weights: the module's parameters in the order of `named_parameters`; those that are trained are copied.
        decay: in (0, 1); early on the average follows faster, see `update`.
    """

    def __init__(self, weights: Iterable[Tensor], *, decay: float) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        self.decay, self.steps = decay, 0
        copies = [weight.detach().float().clone() for weight in weights if weight.requires_grad]
        self.weights = nn.ParameterList(nn.Parameter(copy, requires_grad=False) for copy in copies)

    @torch.no_grad()
    def update(self, module: nn.Module, *, step: int) -> None:
        """Take in the weights after `step` steps: `m += (1 - d) (w - m)`, `d = min(decay, (1 + step) / (10 + step))`.

        Does nothing where it has taken them in already.
        """
        if step <= self.steps:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        latest = [weight.float() for weight in _weights_of(module).values()]
        torch._foreach_lerp_(list(self.weights), latest, 1 - decay)
        self.steps = step

    def averaged(self, module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the `state` of `module` with averages in the place of weights."""
        names = _weights_of(module)
        means = {name: mean.detach().to("cpu", copy=True) for name, mean in zip(names, self.weights, strict=True)}
        return state | means

    def get_extra_state(self) -> Tensor:
        """Steps taken in, for the module's state."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on after that many steps."""
        self.steps = int(state)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Within the context the module has the averaged weights."""
        weights = list(_weights_of(module).values())
        kept = [weight.detach().clone() for weight in weights]
        try:
            _copy(self.weights, weights)
            yield
        finally:
            _copy(kept, weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # moves with its module, but keeps its precision: in bf16 a small step towards the weights would round to none
        moved: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(fn(tensor).device)  # noqa: E731
        return super()._apply(moved, recurse)


def _weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


@torch.no_grad()
def _copy(values: Iterable[Any], places: Iterable[Tensor]) -> None:
    for value, place in zip(values, places, strict=True):
        place.copy_(value)
