"""The model in training and its moving average, one module."""

import copy

import torch
from torch import Tensor, nn

from teacher.model import SaliencyModel


class Teacher(nn.Module):
    """The model that is trained and, with a decay above 0, its moving average beside it.

    Both are in one module, so that checkpoints hold both.
    """

    def __init__(self, model: SaliencyModel, *, decay: float) -> None:
        super().__init__()
        self.model, self.decay = model, decay
        self.average = copy.deepcopy(model).requires_grad_(False) if decay > 0 else None

    @property
    def chosen(self) -> SaliencyModel:
        """The model that is validated and kept."""
        return self.model if self.average is None else self.average

    @property
    def chosen_prefix(self) -> str:
        """What the names of `chosen`'s weights begin with in this module's state."""
        return "model." if self.average is None else "average."

    def forward(self, images: Tensor) -> Tensor:
        """See `SaliencyModel.forward`."""
        return self.model(images)

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Move the average towards the weights after `step` steps; early on it follows faster."""
        assert self.average is not None
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(value.to(mean.dtype), 1 - decay)
        for kept, latest in zip(self.average.buffers(), self.model.buffers(), strict=True):
            kept.copy_(latest)
