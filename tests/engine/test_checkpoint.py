"""Checkpoints are complete or absent, and damage is found."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint import Retention, list_checkpoints, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from engine.errors import InputError


def test_round_trip_keeps_values_and_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        tensors = {"model": {"w": torch.full((2,), float(step))}}
        save_checkpoint(tmp_path, step=step, tensors=tensors, state={"extra": {"n": step}}, retention=Retention(last=2))
    found = list_checkpoints(tmp_path)
    assert [p.name for p in found] == ["step-000000002", "step-000000003"]
    step, tensors, state = load_checkpoint(found[-1])
    assert step == 3 and tensors["model"]["w"].tolist() == [3.0, 3.0] and state == {"extra": {"n": 3}}


def test_an_interrupted_save_leaves_the_older_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, step=1, tensors={"model": {"w": torch.ones(2)}}, state={})

    class Unwritable:
        def __reduce__(self) -> str:
            raise RuntimeError("killed here")

    with pytest.raises(RuntimeError):
        save_checkpoint(tmp_path, step=2, tensors={"model": {"w": Unwritable()}}, state={})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    (tmp_path / ".step-000000002.abc.tmp").mkdir()  # what a SIGKILL leaves behind
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000000001"]


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=1, tensors={"model": {"w": torch.ones(64)}}, state={})
    data = bytearray((path / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "model.pt").write_bytes(data)
    with pytest.raises(InputError, match=r"damaged at model\.pt"):
        load_checkpoint(path)


def test_generators_go_on_where_they_were() -> None:
    state = rng_state()
    first = (torch.rand(3), np.random.rand(3), random.random())
    set_rng_state(state)
    again = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(first[0], again[0]) and np.array_equal(first[1], again[1]) and first[2] == again[2]
