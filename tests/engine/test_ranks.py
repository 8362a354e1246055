"""Exchanges between ranks give every rank the same answer."""

from typing import Any

import pytest

from engine.errors import InputError
from engine.ranks import Ranks
from tests.tools import run_distributed


def exchange(rank: int, world_size: int) -> dict[str, Any]:
    ranks = Ranks()

    def fail() -> None:
        raise InputError("only rank 0 saw it")

    try:
        ranks.on_main(fail)
        message = ""
    except InputError as error:
        message = str(error)
    return {
        "any": (ranks.any(rank == world_size - 1), ranks.any(False)),
        "mean": ranks.mean({"a": float(rank), "b": 1.0}),
        "gather": ranks.gather(rank * rank),
        "broadcast": ranks.broadcast(f"from {rank}"),
        "message": message,
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_hears_the_same(world_size: int) -> None:
    results = run_distributed(exchange, world_size)
    expected = {
        "any": (True, False),
        "mean": {"a": (world_size - 1) / 2, "b": 1.0},
        "gather": [rank * rank for rank in range(world_size)],
        "broadcast": "from 0",
        "message": "only rank 0 saw it",
    }
    assert all(result == expected for result in results)
