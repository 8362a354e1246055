"""The moving average: what it refuses, and which weights it keeps; its formula is tested with the student's options."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from engine.average import Average, check_average
from engine.errors import InputError


def launcher(*, zero: int) -> Any:
    """What is asked of an accelerator, under a ZeRO stage or, at 0, none."""
    kind = DistributedType.DEEPSPEED if zero else DistributedType.NO
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=zero) if zero else None)
    return SimpleNamespace(distributed_type=kind, state=state)


@pytest.mark.parametrize(("decay", "zero", "words"), [(1.0, 0, "ema 1.0 would keep"), (0.9, 3, "ZeRO 3 cuts them up")])
def test_what_would_not_average_is_refused(decay: float, zero: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_average(decay, accelerator=launcher(zero=zero))


@pytest.mark.parametrize(("decay", "zero"), [(0.0, 3), (0.9, 2), (0.9, 0)])
def test_what_averages_is_not(decay: float, zero: int) -> None:
    check_average(decay, accelerator=launcher(zero=zero))


def test_frozen_weights_are_passed_over() -> None:
    torch.manual_seed(0)
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 3)
    model = nn.Sequential(frozen, trained)
    average = Average(model.parameters(), decay=0.5)
    with torch.no_grad():
        trained.weight.add_(1.0)
    average.update(model, step=1)
    state = average.averaged(model, model.state_dict())
    assert torch.equal(state["0.weight"], frozen.weight)
    # d = (1 + 1) / (10 + 1) of the way is left
    torch.testing.assert_close(state["1.weight"], trained.weight.detach() - 2 / 11)
