"""Comparing pretraining runs: their ends, their curves, their order of samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from engine.checkpoint import list_checkpoints, load_checkpoint
from tests.forked import Launch, launch
from tests.tools import REPOSITORY

MAIN = REPOSITORY / "pretrain" / "main.py"


def start(config: Path, *arguments: object, **options: Any) -> Launch:
    """Start pretrain/main.py in forked ranks; see `tests.forked.launch`."""
    return launch(MAIN, "--config", config, *arguments, logs=config.parent / "logs", **options)


def pretrain(config: Path, *arguments: object, code: int = 0, **options: Any) -> str:
    """Run pretrain/main.py in forked ranks, all of which must end with `code`; what rank 0 wrote."""
    started = start(config, *arguments, **options)
    codes = started.wait(timeout=300)
    everything = "\n".join(started.output(rank)[-4000:] for rank in range(len(codes)))
    assert set(codes) == {code}, f"{codes}:\n{everything}"
    return started.output()


def losses(run: Path, key: str = "train/loss") -> np.ndarray:
    """The curve, one value a step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [line for line in lines if key in line]  # an evaluation's line has none
    assert [value["step"] for value in values] == list(range(1, len(values) + 1))
    return np.array([value[key] for value in values])


def order(run: Path) -> dict[int, list[list[int]]]:
    """Positions of every step's samples, in the order of the global batch; a run with `loop.record_order`."""
    steps: dict[int, list[list[int]]] = {}
    for file in sorted((run / "order").glob("rank-*.jsonl")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            steps.setdefault(entry["step"], []).extend(entry["positions"])
    return steps


def same_tree(one: Any, other: Any) -> bool:
    """Whether two trees of tensors and plain values are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tree(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same_tree(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def same_end(first: Path, second: Path) -> None:
    """Encoder, weights, optimiser, counters and random states of all ranks are equal bit for bit; so are the curves."""
    for name in ("model.safetensors", "heads.safetensors"):
        assert same_tree(load_file(first / "encoder" / name), load_file(second / "encoder" / name)), name
    one, other = (load_checkpoint(list_checkpoints(run / "checkpoints")[-1]) for run in (first, second))
    assert one[0] == other[0] and one[2] == other[2]
    for name in ("model", "optimizer", "rng"):
        assert same_tree(one[1][name], other[1][name]), name
    assert losses(first).tolist() == losses(second).tolist()
