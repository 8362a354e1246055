"""Stopping and going on: bit-equal weights, whatever stopped it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint import list_checkpoints, load_checkpoint
from tests.tools import REPOSITORY, clean_environment, run_python

MAIN = REPOSITORY / "pretrain" / "main.py"


def same_end(first: Path, second: Path) -> None:
    """Final weights, heads and optimiser are equal bit for bit, and so are the logged losses."""
    for name in ("model.safetensors", "heads.safetensors"):
        one, other = load_file(first / "encoder" / name), load_file(second / "encoder" / name)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    ends = [load_checkpoint(list_checkpoints(run / "checkpoints")[-1]) for run in (first, second)]
    assert ends[0][0] == ends[1][0]
    for name, slots in ends[0][1]["optimizer"].items():
        assert all(torch.equal(value, ends[1][1]["optimizer"][name][key]) for key, value in slots.items())
    curves = [[json.loads(x)["train/loss"] for x in (run / "metrics.jsonl").open()] for run in (first, second)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_in_the_middle_of_an_epoch_ends_bit_equal(
    student_config: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    config = student_config(loop__num_workers=workers)
    assert run_python(MAIN, "--config", config, "--run", "whole").returncode == 0
    first = run_python(MAIN, "--config", config, "--run", "parts", "--loop.stop_after", 4)
    assert first.returncode == 75 and "stopped: after step 4 of 10 (loop.stop_after)" in first.stderr
    second = run_python(MAIN, "--config", config, "--run", "parts")
    assert second.returncode == 0 and "after step 4 of 10" in second.stdout
    same_end(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_signals_lose_nothing(student_config: Callable[..., Path], tmp_path: Path, number: signal.Signals) -> None:
    """A stop signal saves and exits 75; SIGKILL cannot, and the run goes on from its last checkpoint."""
    config = student_config(max_steps=30, loop__checkpoint_every=5, loop__num_workers=1)
    assert run_python(MAIN, "--config", config, "--run", "whole").returncode == 0
    command = [sys.executable, str(MAIN), "--config", str(config), "--run", "parts"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(),
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 07"):
                break
        # the whole group, as a scheduler does: the data loader's worker must not die of it
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 75 and number.name in errors, errors
    again = run_python(MAIN, "--config", config, "--run", "parts")
    assert again.returncode == 0 and "resumed" in again.stdout, again.stderr
    same_end(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")


def test_a_finished_run_is_left_as_it_is(student_config: Callable[..., Path], tmp_path: Path) -> None:
    config = student_config(max_steps=2)
    assert run_python(MAIN, "--config", config).returncode == 0
    weights = (tmp_path / "runs" / "student" / "encoder" / "model.safetensors").read_bytes()
    again = run_python(MAIN, "--config", config)
    assert again.returncode == 0 and "step" not in again.stdout.split("resumed")[0]
    assert (tmp_path / "runs" / "student" / "encoder" / "model.safetensors").read_bytes() == weights
