"""The backward of one training step, in one or several passes through the module."""

from accelerate import Accelerator
from torch import Tensor, nn


class Backward:
    """Adds the gradients of losses to the prepared module's; handed to step functions by the training loop."""

    def __init__(self, accelerator: Accelerator, module: nn.Module) -> None:
        self.accelerator, self.module = accelerator, module

    def __call__(self, loss: Tensor) -> None:
        """Backward of a scalar `loss`, scaled where mixed precision asks for it."""
        self.accelerator.backward(loss)
