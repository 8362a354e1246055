"""The model in training and its moving average, one module."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from engine.average import Average
from teacher.model import SaliencyModel


class Teacher(nn.Module):
    """The model that is trained and, with a decay above 0, the moving average of its weights beside it.

    Both are in one module, so that checkpoints hold both. The average, where there is one, is what is validated and
    kept.
    """

    def __init__(self, model: SaliencyModel, *, decay: float) -> None:
        super().__init__()
        self.model = model
        self.average = Average(model.parameters(), decay=decay) if decay > 0 else None

    def forward(self, images: Tensor) -> Tensor:
        """See `SaliencyModel.forward`."""
        return self.model(images)

    def update_average(self, step: int) -> None:
        """Let the average take in the weights after `step` steps."""
        assert self.average is not None
        self.average.update(self.model, step=step)

    @contextmanager
    def chosen(self) -> Iterator[SaliencyModel]:
        """The model that is validated; within the context it has the averaged weights."""
        if self.average is None:
            yield self.model
            return
        with self.average.applied(self.model):
            yield self.model

    def chosen_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights and buffers of the model that is kept, from the `state` of this module."""
        prefix = "model."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        return own if self.average is None else self.average.averaged(self.model, own)
