"""What a captioner offers: teacher forcing for training, one step at a time for search."""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor, nn

from downstream.protocol import Inputs


@dataclass
class Told:
    """What a captioner gives for captions that it is shown.

    Attributes:
        logits: `(batch, steps, words)`; step t predicts the token after token t.
        energies: `(batch, steps, height, width)`, before the softmax over places.
        maps: attention densities of the same shape, sum 1 over the places.
    """

    logits: Tensor
    energies: Tensor
    maps: Tensor


@dataclass
class State:
    """What a captioner keeps between two words; the first axis of every tensor is the caption."""

    memory: dict[str, Tensor]
    words: dict[str, Tensor]

    def take(self, rows: Tensor, *, same_images: bool = False) -> Self:
        """The state of some captions, in a new order; the memory stays where each caption keeps its image."""
        memory = self.memory if same_images else {name: value[rows] for name, value in self.memory.items()}
        return replace(self, memory=memory, words={name: value[rows] for name, value in self.words.items()})


class Captioner(nn.Module):
    """Base of captioners.

    `inputs` holds "features" `(batch, channels, height, width)` of a frozen encoder, or "images" for a model with one
    of its own; and, in `forward`, "tokens" `(batch, length)` from the start token on, 0 behind the end.
    """

    def begin(self, inputs: Inputs) -> State:
        """State before the first word, one caption per image."""
        raise NotImplementedError

    def advance(self, tokens: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """The next word's logits `(captions, words)` and map `(captions, height, width)` after `tokens` `(captions,)`.

        In evaluation mode, `advance` token by token gives what `forward` gives at once.
        """
        raise NotImplementedError

    def forward(self, inputs: Inputs) -> Told:
        """Teacher forcing: every token but the last predicts the one behind it."""
        raise NotImplementedError
