"""A small number of the cases of benchmarks/fuzz.py, and that it would find what it looks for."""

import importlib
import os
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shards.damage import TARGETS, SeededChance, Target
from tests.tools import REPOSITORY

# Cases of each reader; a long run is benchmarks/fuzz.py.
CASES = int(os.environ.get("SACCADE_FUZZ_CASES", "200"))


class Drawn:
    """Chance from hypothesis, which makes a failing case as small as it can."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        """See `Chance`."""
        return self._data.draw(st.integers(low, high))

    def binary(self, max_size: int) -> bytes:
        """See `Chance`."""
        return self._data.draw(st.binary(max_size=max_size))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_random_damage_raises_only_our_errors(target: Target) -> None:
    @settings(max_examples=CASES, deadline=None)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        assert target.fault_of(target.make(Drawn(data))) is None

    run()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_damage_gets_past_the_first_defence_now_and_then(target: Target) -> None:
    """Some cases are read, some are refused, and a seed always gives the same case."""
    read = 0
    for seed in range(150):
        data = target.make(SeededChance(seed))
        assert data == target.make(SeededChance(seed))
        try:
            target.read(data)
        except target.allowed:
            continue
        read += 1
    assert 0 < read < 150


def test_the_benchmark_counts_foreign_errors_hangs_and_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "benchmarks"), *sys.path])
    fuzz = importlib.import_module("fuzz")

    class Counting:
        """Gives the number of the case instead of chance."""

        def __init__(self, seed: int) -> None:
            self.case = (seed - fuzz.SEED_STRIDE) // 2

    def make(chance: Any) -> bytes:
        return bytes([chance.case])

    def read(data: bytes) -> None:
        if data[0] == 3:
            raise KeyError("foreign")
        if data[0] == 5:
            raise ValueError("two\nlines")
        if data[0] == 6:
            time.sleep(60)

    def die(_: bytes) -> None:
        os._exit(9)

    targets = (Target("sleepy", make, read, (ValueError,)), Target("deadly", make, die, (ValueError,)))
    monkeypatch.setattr(fuzz, "TARGETS", targets)
    monkeypatch.setattr(fuzz, "SeededChance", Counting)
    monkeypatch.setattr(fuzz, "BATCH", 4)
    done, faults, hangs = fuzz.run(16, minutes=1, limit_s=1.0)
    assert done == {"sleepy": 8, "deadly": 8}
    assert faults == ["sleepy case 3: KeyError: 'foreign'"]
    # The faults that a batch had gathered go with its process; the benchmark fails all the same.
    assert hangs[-1] == "deadly case 7: the process ended with 9" and len(hangs) == 9
    assert [text for text in hangs if "sleepy" in text] == ["sleepy case 6: not done in 1 s"]
