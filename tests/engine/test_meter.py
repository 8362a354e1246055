"""What a report says about all ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.meter import Meter
from engine.ranks import Ranks


class WithAnother(Ranks):
    """This rank, and another one that waited for its data in three quarters of the time."""

    def gather(self, value: Any) -> list[Any]:
        return [value, 0.75]


def test_waiting_for_data_is_that_of_the_rank_that_waits_the_most() -> None:
    logged: dict[str, float] = {}
    training: Any = SimpleNamespace(
        ranks=WithAnother(),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        tracker=SimpleNamespace(log=lambda values, step: logged.update(values)),
        schedule=lambda step: 0.1,
        report=lambda line: None,
        extra={"num_skipped": 0, "num_bad": 3},
        batch_size=8,
        total_steps=10,
    )
    meter = Meter(training)
    for mine, expected in ((0.1, 0.75), (0.9, 0.9)):
        meter.add({"loss": torch.tensor(1.0)}, counts=torch.tensor(True))
        meter.add_time(2.0, waited=2.0 * mine)
        meter.publish(1)
        assert logged["time/data_wait"] == pytest.approx(expected)
    assert logged["data/num_bad"] == 3
