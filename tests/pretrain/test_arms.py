"""Every arm trains, logs what it should, and leaves a W&B history keyed by our step."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tools import REPOSITORY, run_python

MAIN = REPOSITORY / "pretrain" / "main.py"
EXPECTED = {
    "contrastive": {"train/nt_xent"},
    "contrastive+attention": {"train/nt_xent", "train/attention", "train/kld", "train/nss"},
    "supervised": {"train/cross_entropy", "train/accuracy"},
    "supervised+attention": {"train/cross_entropy", "train/attention", "train/kld", "train/nss"},
}


@pytest.mark.parametrize("arm", sorted(EXPECTED))
def test_an_arm_trains_and_logs_its_losses(student_config: Callable[..., Path], tmp_path: Path, arm: str) -> None:
    done = run_python(MAIN, "--config", student_config(arm=arm, max_steps=12, attention__stages=[-2, -1]))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (tmp_path / "runs" / "student" / "metrics.jsonl").open()]
    common = {"train/loss", "lr", "time/step_s", "time/data_wait", "time/images_per_s", "step"}
    losses = {key for key in lines[0] if key.startswith("train/")} - {"train/loss", "train/attention_views"}
    assert losses - EXPECTED[arm] <= {"train/accuracy"} and EXPECTED[arm] | common <= lines[0].keys()
    assert all(0 <= line["time/data_wait"] <= 1 for line in lines)
    if "attention" in arm:
        assert lines[-1]["train/attention"] < lines[0]["train/attention"]
    elif arm == "supervised":
        assert lines[-1]["train/loss"] < lines[0]["train/loss"] + 0.5


def test_wandb_history_offline_has_our_steps(student_config: Callable[..., Path], tmp_path: Path) -> None:
    """A run stopped after step 4 and resumed leaves W&B files whose steps are 1 to 6, without a gap or a clock."""
    config = student_config(max_steps=6, loop__tracker="wandb")
    assert run_python(MAIN, "--config", config, "--loop.stop_after", 4).returncode == 75
    assert run_python(MAIN, "--config", config).returncode == 0
    files = sorted((tmp_path / "runs" / "student" / "wandb").glob("offline-run-*/*.wandb"))
    steps = [step for file in files for step in history_steps(file)]
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]


def history_steps(file: Path) -> list[int]:
    """Our `step` of every history record in a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append(int(float(items["step"])))
    return steps


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, the format of .wandb files behind their 7-byte header.

    Pieces have a 7-byte head (CRC, length, type: 1 whole, 2 first, 3 middle, 4 last) and never cross a 32 KiB block,
    the first of which begins at the file's header.
    """
    position, parts = 0, b""
    while position + 7 <= len(content):
        left = 32768 - (position + 7) % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        data = content[position + 7 : position + 7 + length]
        position += 7 + length
        parts = data if kind in (1, 2) else parts + data
        if kind in (1, 4):
            yield parts
