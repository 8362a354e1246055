"""What a batch says of the samples it holds."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import Fault
from engine.loading import TensorBatch, make_loader


@dataclass
class Numbers(TensorBatch):
    values: Tensor


class Keyed(torch.utils.data.Dataset[Any]):
    """Samples are their positions; keys are words, where they can be had."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault

    def __getitems__(self, positions: list[int]) -> Numbers:
        return Numbers(torch.tensor(positions))

    def key_of(self, position: int) -> str:
        if self.fault is not None and position == 5:
            raise self.fault
        return f"key {position}"


@pytest.mark.parametrize("fault", [ValueError("no index"), OSError("no disk"), Fault("no server")])
def test_a_note_names_every_key_that_can_be_found_out(fault: Exception) -> None:
    """It is made while all ranks wait for each other: nothing may end one of them."""
    batches = [[4, 5], [6]]
    notes = [batch.note()() for batch in make_loader(Keyed(fault), batches, num_workers=0)]
    assert notes == [{"positions": [4, 5], "keys": ["key 4", None]}, {"positions": [6], "keys": ["key 6"]}]
