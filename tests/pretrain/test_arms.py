"""Every arm trains, logs what it should, and leaves a W&B history keyed by our step."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import InputError
from engine.program import parse_config
from pretrain.config import Config
from pretrain.model import Student
from pretrain.trainer import open_data, train
from shards.controls import write_control
from shards.reader import ShardSet
from tests.conftest import TinySample
from tests.tools import REPOSITORY, run_python

MAIN = REPOSITORY / "pretrain" / "main.py"
ATTENTION = {"train/attention", "train/kld", "train/nss", "train/attention_views"}
EXPECTED = {
    "contrastive": {"train/nt_xent"},
    "contrastive+attention": {"train/nt_xent"} | ATTENTION,
    "co-train": {"train/nt_xent"} | ATTENTION,
    "supervised": {"train/cross_entropy", "train/accuracy"},
    "supervised+attention": {"train/cross_entropy", "train/accuracy"} | ATTENTION,
}


def read(path: Path) -> Config:
    return parse_config(Config, argv=["--config", str(path)])[0]


@pytest.mark.parametrize("arm", sorted(EXPECTED))
def test_an_arm_trains_and_logs_its_losses(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path, arm: str
) -> None:
    gaze = {"data__gaze": str(tiny_sample.gaze), "data__gaze_batch_size": 12}
    train(read(student_config(arm=arm, max_steps=12, attention__stages=[-2, -1], optim__lr=0.003, **gaze)))
    lines = [json.loads(x) for x in (tmp_path / "runs" / "student" / "metrics.jsonl").open()]
    common = {"train/loss", "lr", "time/step_s", "time/data_wait", "time/images_per_s", "step"}
    assert EXPECTED[arm] | common <= lines[0].keys()
    foreign = set().union(*EXPECTED.values()) - EXPECTED[arm]
    assert not foreign & lines[0].keys()
    assert all(0 <= line["time/data_wait"] <= 1 for line in lines)
    if EXPECTED[arm] >= ATTENTION:
        first, last = ([line["train/attention"] for line in part] for part in (lines[:3], lines[-3:]))
        assert sum(last) < sum(first)


@pytest.mark.parametrize(("kld", "nss"), [(1.0, 0.0), (0.0, 1.0), (2.0, 0.5)])
def test_the_attention_loss_is_a_kld_minus_b_nss(
    student_config: Callable[..., Path], tmp_path: Path, kld: float, nss: float
) -> None:
    """Of the logged means; a term of weight 0 is not computed."""
    weights = {"attention__kld": kld, "attention__nss": nss, "attention__weight": 3.0}
    train(read(student_config(max_steps=2, attention__stages=[1], **weights)))
    line = json.loads((tmp_path / "runs" / "student" / "metrics.jsonl").open().readline())
    assert abs(line["train/attention"]) > 1e-3
    expected = kld * line.get("train/kld", 0.0) - nss * line.get("train/nss", 0.0)
    assert line["train/attention"] == pytest.approx(expected, rel=1e-4)
    assert ("train/kld" in line, "train/nss" in line) == (kld > 0, nss > 0)
    assert line["train/loss"] == pytest.approx(line["train/nt_xent"] + 3.0 * line["train/attention"], rel=1e-4)


def test_the_projection_head_is_simclrs(student_config: Callable[..., Path]) -> None:
    """z = BN(W2 relu(BN(W1 h))), no biases beside the norms; without norms z = W2 relu(W1 h + b1) + b2."""
    normalise = torch.nn.functional.batch_norm
    for norm in ("batch", "none"):
        student = Student(read(student_config(model__head_norm=norm)), num_classes=4).train()
        head: Any = student.projector
        features = torch.randn(8, student.backbone.num_features)
        linears = [layer for layer in head.layers if isinstance(layer, torch.nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in linears] == [(32, features.shape[1]), (16, 32)]
        hidden = features @ linears[0].weight.T
        if norm == "batch":
            assert all(layer.bias is None for layer in linears)
            expected = normalise(
                torch.relu(normalise(hidden, None, None, training=True)) @ linears[1].weight.T,
                None,
                None,
                training=True,
            )
        else:
            expected = torch.relu(hidden + linears[0].bias) @ linears[1].weight.T + linears[1].bias
        torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("control", ["shuffled", "centre_bias"])
def test_a_control_is_chosen_by_its_kind(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path, control: str
) -> None:
    """Beside the teacher's set and the other control; "none" takes the teacher's; one that is missing is named."""
    images = ShardSet(tiny_sample.train)
    own = next(path.parent for path in tiny_sample.labels.glob("*/manifest.json"))
    root = tmp_path / "labels"
    shutil.copytree(own, root / own.name)
    config = read(student_config(data__labels=str(root), data__control=control))
    with pytest.raises(InputError, match=f"data.control '{control}'.*--controls {control}"):
        open_data(config)
    for kind in ("shuffled", "centre_bias"):
        write_control(kind, images, own, root)
    chosen = open_data(config).label_manifest
    assert chosen is not None and chosen.extra["teacher"]["control"] == control
    config.data.control = "none"
    chosen = open_data(config).label_manifest
    assert chosen is not None and "control" not in chosen.extra["teacher"]


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
