"""The backward of one training step, in one or several passes through the module."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator
from torch import Tensor, nn

from engine.launch import uses_deepspeed


class Backward:
    """Adds the gradients of losses to the prepared module's; handed to step functions by the training loop."""

    def __init__(self, accelerator: Accelerator, module: nn.Module) -> None:
        self.accelerator, self.module = accelerator, module
        self._last = True

    def __call__(self, loss: Tensor) -> None:
        """Backward of a scalar `loss`, scaled where mixed precision asks for it; once per forward and pass."""
        if uses_deepspeed(self.accelerator):
            # accelerate's wrapper steps the optimiser as well, so only the last pass may call itself the boundary.
            self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=self._last)
        else:
            self.accelerator.backward(loss)

    def passes(self, count: int) -> Iterator[int]:
        """Numbers of the passes of one step, 0 to `count - 1`; each is one forward of the module and one backward.

        Their gradients add up to the gradient of the sum of their losses; the ranks exchange gradients in the last pass
        only (under ZeRO 2, whose gradients live on one rank each, in every pass). Run the loop to its end, the same
        number of passes on every rank. A loop inside a pass divides that pass: its passes are the step's last only
        where the outer one is.

            for index in backward.passes(len(chunks)):
                backward(loss_of(module(chunks[index])))

        Raises:
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"a step needs at least one pass, got {count}")
        outer = self._last
        try:
            for index in range(count):
                self._last = outer and index == count - 1
                with self._exchange():
                    yield index
        finally:
            self._last = outer

    def _exchange(self) -> AbstractContextManager[None]:
        """Keeps gradients on their rank during the forward and backward of every pass but the last."""
        if uses_deepspeed(self.accelerator):
            # Its own no_sync is refused where gradients are partitioned; there, the boundary alone adds passes up.
            self.module.set_gradient_accumulation_boundary(self._last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if self._last else self.accelerator.no_sync(self.module)
