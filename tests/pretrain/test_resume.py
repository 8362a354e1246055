"""Stopping and going on: bit-equal on as many ranks, the same samples and curve on another number of them."""

import json
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.faults import At
from tests.pretrain.runs import losses, order, pretrain, same_end, start

# free of batch statistics, but with random numbers of its own on every rank
VIT = {
    "model__backbone": "test_vit",
    "model__head_norm": "none",
    "model__backbone_options": {"drop_path_rate": 0.3, "proj_drop_rate": 0.1},
}


@pytest.mark.parametrize(
    ("ranks", "zero", "workers", "model"),
    [(1, 0, 0, {}), (1, 0, 2, VIT), (2, 0, 1, VIT), (2, 1, 0, VIT), (2, 2, 0, VIT), (2, 3, 0, VIT)],
    ids=["one", "workers", "ddp", "zero1", "zero2", "zero3"],
)
def test_stopped_in_the_middle_of_an_epoch_ends_bit_equal(
    student_config: Callable[..., Path], tmp_path: Path, ranks: int, zero: int, workers: int, model: dict[str, object]
) -> None:
    config = student_config(loop__num_workers=workers, loop__record_order=True, **model)
    pretrain(config, "--run", "whole", world_size=ranks, zero=zero)
    first = pretrain(config, "--run", "parts", "--loop.stop_after", 4, code=75, world_size=ranks, zero=zero)
    assert "stopped: after step 4 of 10 (loop.stop_after)" in first
    assert "after step 4 of 10" in pretrain(config, "--run", "parts", world_size=ranks, zero=zero)
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    same_end(whole, parts)
    assert order(whole) == order(parts)


def test_other_numbers_of_ranks_see_the_same_samples_and_learn_the_same(
    student_config: Callable[..., Path], tmp_path: Path
) -> None:
    """4 -> 2 -> 3 -> 2 -> 1 ranks, ZeRO 2, DDP, ZeRO 3, ZeRO 1, none, against one process: within 1e-4 (about 1e-6)."""
    config = student_config(model__backbone="test_vit", model__head_norm="none", max_steps=20, loop__record_order=True)
    pretrain(config, "--run", "whole")
    for stop, ranks, zero in ((4, 4, 2), (8, 2, 0), (12, 3, 3), (16, 2, 1)):
        pretrain(config, "--run", "parts", "--loop.stop_after", stop, code=75, world_size=ranks, zero=zero)
    pretrain(config, "--run", "parts")
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    assert len(order(whole)) == 20 and order(whole) == order(parts)
    np.testing.assert_allclose(losses(parts), losses(whole), atol=1e-4)
    assert np.ptp(losses(whole)) > 0.1


def test_signals_lose_nothing(student_config: Callable[..., Path], tmp_path: Path) -> None:
    """A stop signal to the whole process group, twice at once as launchers pass it on: saved once, exit code 75."""
    config = student_config(max_steps=30, loop__num_workers=1)
    pretrain(config, "--run", "whole")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        started = start(config, "--run", number.name)
        started.wait_for("step 07")
        for _ in range(2):  # the data loader's worker must not die of it either
            started.signal(number)
        assert started.wait() == [75] and number.name in started.output(), started.output()
        run = tmp_path / "runs" / number.name
        (saved,) = (run / "checkpoints").iterdir()
        marker = json.loads((run / "exit.json").read_text())
        assert marker["code"] == 75 and number.name in marker["reason"]
        assert saved.name == f"step-{marker['step']:09d}"
        assert "resumed" in pretrain(config, "--run", number.name)
        same_end(tmp_path / "runs" / "whole", run)


@pytest.mark.parametrize(
    ("target", "call"), [("engine.saver.save_checkpoint", 1), ("engine.training.Training.resume", 1)]
)
def test_signals_while_saving_and_before_the_first_step(
    student_config: Callable[..., Path], tmp_path: Path, target: str, call: int
) -> None:
    config = student_config(max_steps=8, loop__checkpoint_every=3)
    pretrain(config, "--run", "whole")
    before = At(target, call, signal.SIGTERM)
    output = pretrain(config, "--run", "parts", code=75, before=before)
    steps = sorted(path.name for path in (tmp_path / "runs" / "parts" / "checkpoints").iterdir())
    if "resume" in target:
        assert "stopped: after step 0 of 8 (SIGTERM)" in output and not steps
    else:
        assert len(steps) in (1, 2)  # in step 3 itself, or in the one after
    pretrain(config, "--run", "parts")
    same_end(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")


def test_a_signal_to_one_rank_stops_all_at_one_step(student_config: Callable[..., Path], tmp_path: Path) -> None:
    config = student_config(max_steps=2000, loop__num_workers=1)
    started = start(config, world_size=2)
    started.wait_for("step 0006")
    started.signal(signal.SIGTERM, rank=1)
    assert started.wait() == [75, 75] and "(a signal to another rank)" in started.output(), started.output()
    assert len(list((tmp_path / "runs" / "student" / "checkpoints").iterdir())) == 1


def test_a_finished_run_is_left_as_it_is(student_config: Callable[..., Path], tmp_path: Path) -> None:
    config = student_config(max_steps=2)
    pretrain(config)
    weights = (tmp_path / "runs" / "student" / "encoder" / "model.safetensors").read_bytes()
    assert "step" not in pretrain(config).split("resumed")[0]
    assert (tmp_path / "runs" / "student" / "encoder" / "model.safetensors").read_bytes() == weights


def wandb_steps(file: Path) -> list[tuple[int, int]]:
    """Our step and W&B's own of every line of history in a `.wandb` file, a LevelDB log of protocol buffers."""
    wandb_internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, at, part, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no header fits into the rest of a block
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal.Record.FromString(part)
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            found += [(int(values["step"]), int(values["_step"]))] if "step" in values else []
            part = b""
    return found


def test_wandb_goes_on_at_the_same_step(student_config: Callable[..., Path], tmp_path: Path) -> None:
    config = student_config(max_steps=5, loop__tracker="wandb")
    pretrain(config, "--loop.stop_after", 3, code=75)
    pretrain(config)
    parts = sorted((tmp_path / "runs" / "student" / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in parts} == {"run-student.wandb"}
    assert [wandb_steps(file) for file in parts] == [[(1, 1), (2, 2), (3, 3)], [(4, 4), (5, 5)]]
