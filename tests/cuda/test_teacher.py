"""A teacher trained on the device, resumed bit-equal, and its labels there and on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from attention.maps import MAX_CODE
from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.errors import Requeue
from engine.program import parse_config
from engine.runs import RunFolder
from shards.labels import STEP
from shards.pack import pack
from shards.reader import ShardSet
from teacher.config import DEFAULT_CONFIG, Config
from teacher.label_config import LabelConfig
from teacher.labeller import label
from teacher.saved import load_teacher
from teacher.trainer import train
from tests.cuda.conftest import only_cpu
from tests.teacher.conftest import BlobSource, arguments_of, training_options


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folder with the gaze sets `train` and `val`, and `images` without gaze."""
    pack(BlobSource(24, seed=1), tmp_path / "train", shard_samples=10)
    pack(BlobSource(9, seed=2), tmp_path / "val", shard_samples=5)
    pack(BlobSource(22, edition=None, seed=3), tmp_path / "images", shard_samples=5)
    return tmp_path


def teach(data: Path, name: str, **options: object) -> Path:
    more = {"run": name, "max_steps": 20, "validate_every": 1.5, "loop__deterministic": True, "loop__num_workers": 1}
    arguments = arguments_of(training_options(data, data / "runs", **more | options))
    config, _ = parse_config(Config, argv=arguments, default_config=DEFAULT_CONFIG)
    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        return train(config).path
    except Requeue:
        return data / "runs" / name


def test_it_learns_stops_and_labels_as_on_the_cpu(data: Path) -> None:
    """20 steps; labels of one teacher from both devices differ by at most one code, and seldom."""
    whole = teach(data, "whole")
    teach(data, "parts", loop__stop_after=7)
    parts = teach(data, "parts")
    first, second = (load_checkpoint(list_checkpoints(run / "checkpoints")[-1]) for run in (whole, parts))
    assert first[0] == 20 and first[2]["identity"] == second[2]["identity"]
    assert first[1]["model"].keys() == second[1]["model"].keys()
    for name, value in first[1]["model"].items():
        # not to the bit: the backward of an antialiased resize has no deterministic kernel
        torch.testing.assert_close(second[1]["model"][name], value, rtol=1e-2, atol=1e-3, msg=name)
    scores = [line["val/kld"] for line in RunFolder(whole).metrics() if "val/kld" in line]
    assert np.isfinite(scores).all() and min(scores[1:]) < scores[0]
    shards, found = data / "images", {}
    for place in ("device", "cpu"):
        config = LabelConfig(run=whole, shards=shards, output=data / place, batch_size=4, num_workers=1)
        if place == "cpu":
            with only_cpu():
                found[place] = codes(shards, label(config))
        else:
            found[place] = codes(shards, label(config))
    difference = np.abs(found["device"] - found["cpu"])
    assert difference.max() <= 1 and (difference > 0).mean() < 0.05 and found["cpu"].std() > 1


def codes(images: Path, labels: Path) -> Any:
    """The stored codes of every map, counted in the steps that they are stored in."""
    shards = ShardSet(images, labels=labels)
    maps = [shards.read(s, r).map for s, size in enumerate(shards.shard_sizes.tolist()) for r in range(size)]
    return np.rint([MAX_CODE // STEP * np.sqrt(one / one.max()) for one in maps if one is not None]).astype(int)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(data: Path, precision: str, device: torch.device) -> None:
    if precision == "fp16" and device.type != "cuda":
        pytest.skip("fp16 is for GPUs")
    run = teach(data, precision, precision=precision, ema=0.9, optim__fused=True, optim__name="adamw", max_steps=6)
    assert load_teacher(run).facts["step"] > 0
    config = LabelConfig(
        run=run, shards=data / "images", output=data / "half", batch_size=4, num_workers=0, precision=precision
    )
    assert codes(data / "images", label(config)).max() == MAX_CODE // STEP
