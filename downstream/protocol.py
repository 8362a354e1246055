"""What a model must offer so that its attention can be mined and supervised, and what a task must bring."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass
class Attended:
    """What a model gives for a batch.

    Attributes:
        logits: `(batch, classes)`.
        maps: modality ("text", "image", ...) to attention densities `(batch, *positions)`, sum 1 over the positions.
        masks: modality to bool `(batch, *positions)`, true where a position exists; absent where all do.
    """

    logits: Tensor
    maps: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)


class AttentionModel(nn.Module):
    """Base of models with attention: an encoder whose output can be masked, and everything behind it.

    Subclasses give `encode` and `attend`; `forward` is one after the other. The split is what makes probing cheap: a
    masked input is encoded once, however many masks are tried on it.
    """

    def encode(self, inputs: Inputs) -> dict[str, Tensor]:
        """Modality to features `(batch, *positions, channels)`: what masks multiply, position by position."""
        raise NotImplementedError

    def attend(self, features: dict[str, Tensor], inputs: Inputs) -> Attended:
        """Attention and logits from (masked) features; `inputs` as in `encode`, with as many rows as the features."""
        raise NotImplementedError

    def settle(self, features: dict[str, Tensor], inputs: Inputs, *, modality: str) -> tuple[dict[str, Tensor], Inputs]:
        """Work out once what masks of `modality` do not change; what `attend` gets for every masked copy.

        The miner calls it between `encode` and `attend`. A model that overrides it saves work; no result changes.
        """
        return features, inputs

    def forward(self, inputs: Inputs) -> Attended:
        """Logits and attention maps of a batch."""
        return self.attend(self.encode(inputs), inputs)


class Targets(Protocol):
    """Targets by row: a tensor, or what makes one of the rows it is asked for."""

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


class Examples(Protocol):
    """A part of a data set, read by row.

    A part that fits into a GPU's memory may offer `to(device)`, which gives the same part there, and then its `device`
    (see `downstream.data.place`). A part whose examples are of several kinds, as VQA's answer types, may offer `kinds`,
    one name per example: accuracy is then also reported for each.

    Attributes:
        keys: a name per example, unique.
    """

    keys: Sequence[str]

    @property
    def targets(self) -> Targets:
        """int64 class numbers `(examples,)`, or float32 answer shares `(examples, classes)`."""

    def __len__(self) -> int: ...

    def inputs(self, rows: np.ndarray) -> Inputs:
        """Inputs of some rows, as the model's `encode` takes them; row i of every tensor belongs to `rows[i]`."""


class Task(Protocol):
    """A data set with its model.

    Attributes:
        train, held_out, test: `held_out` is taken from the training set and chooses the epoch.
        modalities: modality to the shape of its maps, for those that may be supervised.
        facts: what the numbers were measured on: sizes, split, seed, hashes.
    """

    train: Examples
    held_out: Examples
    test: Examples
    modalities: dict[str, tuple[int, ...]]
    facts: dict[str, Any]

    def build_model(self) -> AttentionModel:
        """A model from random weights, drawn from torch's generator."""

    def masks(self, modality: str, inputs: Inputs) -> Tensor:
        """Masks to probe one example with: `(masks, *positions)` in [0, 1]; the first leaves everything."""
