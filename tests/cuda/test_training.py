"""Pretraining runs on the device: each option, bit-equal resume, faults, signals, and changes between CPU and GPU."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.errors import Requeue
from engine.faults import CheckedBackward
from engine.program import parse_config
from engine.runs import RunFolder
from pretrain.config import Config
from pretrain.trainer import train
from tests.conftest import TinySample
from tests.cuda.conftest import DEVICE, only_cpu
from tests.pretrain.runs import MAIN, losses, order, same_end, same_tree
from tests.tools import accelerate, clean_environment

STEPS = 8
# Steps small enough that rounding does not grow: curves of two ways to compute can be compared.
CALM = {"optim__name": "sgd", "optim__lr": 0.005, "temperature": 0.5, "max_steps": STEPS, "attention__stages": [1]}
VIT = {"model__backbone": "test_vit", "model__head_norm": "none"}
NEEDS_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="fp16 and its scale are for GPUs")

ReadConfig = Callable[..., Config]


@pytest.fixture
def read(student_config: Callable[..., Path], tiny_sample: TinySample) -> ReadConfig:
    """A small config; keyword arguments as for `student_config`."""

    def make(**overrides: Any) -> Config:
        if overrides.get("arm") == "co-train":
            overrides |= {"data__gaze": str(tiny_sample.gaze), "data__gaze_batch_size": 6}
        return parse_config(Config, argv=["--config", str(student_config(**CALM | overrides))])[0]

    return make


def run(config: Config, name: str, **loop: Any) -> Path:
    """Train under another name and with other options of the loop; the run folder, also where it was stopped."""
    AcceleratorState._reset_state(reset_partial_state=False)  # it keeps the precision of the run before
    try:
        return train(dataclasses.replace(config, run=name, loop=dataclasses.replace(config.loop, **loop))).path
    except Requeue:
        return config.runs / name


def curve(folder: Path) -> list[float]:
    found = losses(folder).tolist()
    assert all(math.isfinite(value) for value in found)
    return found


def last_state(folder: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


# Options


def test_a_plain_run_begins_as_on_the_cpu(read: ReadConfig) -> None:
    """Same samples, crops and colours, the latter rounded to 8 bits on the CPU: the first losses to 3 %."""
    config = read(**VIT, optim__lr=0.05, loop__record_order=True)
    found = run(config, "device")
    with only_cpu():
        expected = run(config, "cpu", stop_after=3)
    assert order(expected) == {step: places for step, places in order(found).items() if step <= 3}
    assert curve(found)[:3] == pytest.approx(curve(expected), rel=0.03)
    line = json.loads((found / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["train/skipped"] == 0 and line["memory/peak_gib"] > 0
    if DEVICE == "cuda":
        assert line["memory/peak_gib"] == pytest.approx(torch.cuda.max_memory_allocated() / 2**30, rel=0.5)
        summary = json.loads((found / "summary.json").read_text())
        assert summary["environment"]["device"] == torch.cuda.get_device_name()


def test_it_learns(read: ReadConfig) -> None:
    """Classes of 72 images without augmentation, by heart: the loss falls from 2.2 to about 1.1 on the CPU."""
    plain = {"views__min_area": 0.9, "views__jitter": 0.0, "views__grey": 0.0, "views__blur": 0.0}
    losses = curve(run(read(**plain, arm="supervised", optim__name="adamw", optim__lr=3e-3, max_steps=100), "learnt"))
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])


# Losses of eight steps in fp32, their sums in another order: two runs of one command have differed by 2.6e-3 on a GPU,
# runs with half and twice the learning rate differ by several per cent.
CLOSE = 5e-3
# Option, and by how much of a plain run's loss each loss may differ.
OPTIONS: dict[str, tuple[dict[str, Any], float]] = {
    "bf16": ({"precision": "bf16"}, 0.15),
    "fp16": ({"precision": "fp16"}, 0.05),
    "channels-last": ({"channels_last": True}, CLOSE),
    "fused": ({"optim__fused": True}, CLOSE),
    "checkpointing": ({"model__gradient_checkpointing": True}, CLOSE),
    "average": ({"ema": 0.9}, CLOSE),
    "synchronised": ({"sync_batch_norm": True}, CLOSE),
    "compiled": ({"compile": True}, CLOSE),
    "clipped": ({"optim__clip_norm": 1e6}, CLOSE),
    "fused and clipped in fp16": ({"precision": "fp16", "optim__fused": True, "optim__clip_norm": 1e6}, 0.05),
    # but `compile`: torch 2.11's inductor expects channels-last strides of the gradients of convolutions over 1x1 maps,
    # to which 32 pixels shrink in the last stage, and gets others; with maps of usual sizes it compiles and runs
    "everything": (
        {
            "precision": "bf16",
            "channels_last": True,
            "optim__fused": True,
            "model__gradient_checkpointing": True,
            "ema": 0.9,
            "sync_batch_norm": DEVICE == "cuda",
        },
        0.15,
    ),
}


@pytest.mark.parametrize("option", list(OPTIONS))
def test_each_option_learns_as_the_plain_run(read: ReadConfig, option: str) -> None:
    overrides, tolerance = OPTIONS[option]
    if DEVICE != "cuda" and (overrides.get("precision") == "fp16" or overrides.get("sync_batch_norm")):
        pytest.skip("for GPUs alone")
    if overrides.get("compile") and shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("torch.compile needs a C compiler")
    plain = curve(run(read(), "plain"))
    folder = run(read(**overrides), "option")
    # a scale that is too high at first skips steps, after which the weights lag behind
    skipped = last_state(folder)[2].get("loss_scale", {}).get("scale", 65536.0) < 65536
    assert curve(folder)[: 2 if skipped else STEPS] == pytest.approx(plain[: 2 if skipped else STEPS], rel=tolerance)
    assert last_state(folder)[2]["extra"]["num_skipped"] == 0


def test_parts_of_the_batch_learn_as_the_whole(read: ReadConfig) -> None:
    whole = curve(run(read(**VIT), "whole"))
    assert curve(run(read(**VIT, optim__micro_batch=5), "parts")) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("arm", ["contrastive", "co-train", "supervised", "supervised+attention"])
def test_every_arm(read: ReadConfig, arm: str) -> None:
    folder = run(read(arm=arm, diagnostics_every=4), "arm")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(curve(folder)) == STEPS
    assert ("train/gradient_ratio" in lines[3]) == (arm in ("co-train", "supervised+attention"))


def test_lars(read: ReadConfig) -> None:
    assert len(curve(run(read(optim__name="lars", optim__lr=0.3), "lars"))) == STEPS


# Resume

RESUMED: dict[str, dict[str, Any]] = {
    "fp32": {},
    "vit": VIT | {"model__backbone_options": {"drop_path_rate": 0.3, "proj_drop_rate": 0.1}},
    "fp16": {"precision": "fp16"},
    "co-train": {"arm": "co-train", "attention__nss_target": "sampled"},
    "adamw": {"optim__name": "adamw", "optim__lr": 1e-3, "optim__fused": True, "optim__micro_batch": 5},
    # but channels-last: in that order the backward of a ResNet's max pooling adds up in any order
    "everything": {
        "precision": "bf16",
        "optim__fused": True,
        "model__gradient_checkpointing": True,
        "ema": 0.9,
        "diagnostics_every": 2,
    },
}


@pytest.mark.parametrize("name", list(RESUMED))
def test_stopped_in_the_middle_of_an_epoch_it_ends_bit_equal(read: ReadConfig, name: str) -> None:
    """With two workers that read ahead; weights, optimiser, loss scale, random states, curve: `atol=0`."""
    if DEVICE != "cuda" and name == "fp16":
        pytest.skip("for GPUs alone")
    config = read(**RESUMED[name], loop__deterministic=True, loop__num_workers=2, loop__record_order=True)
    whole = run(config, "whole")
    for stop in (2, 5):  # six steps are an epoch
        parts = run(config, "parts", stop_after=stop)
    parts = run(config, "parts")
    same_end(whole, parts)
    assert order(whole) == order(parts)
    if name == "fp16":
        assert last_state(whole)[2]["loss_scale"]["good_steps"] > 0


@pytest.mark.usefixtures("programs_arithmetic")
def test_a_fresh_process_goes_on_bit_equal(read: ReadConfig, tmp_path: Path) -> None:
    config = read(loop__deterministic=True, ema=0.9)
    whole = run(config, "whole")
    run(config, "parts", stop_after=3)
    done = subprocess.run(
        command(config, "parts"), env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr
    same_end(whole, tmp_path / "runs" / "parts")


def test_from_cpu_to_gpu_and_back_the_samples_are_the_same(read: ReadConfig) -> None:
    """Checkpoints of one load on the other; fused AdamW's step count moves between them."""
    config = read(**VIT, loop__record_order=True, optim__name="adamw", optim__lr=1e-3, optim__fused=True)
    whole = run(config, "whole")
    with only_cpu():
        run(config, "parts", stop_after=2)
    run(config, "parts", stop_after=5)
    with only_cpu():
        parts = run(config, "parts")
    assert order(parts) == order(whole) and len(order(whole)) == STEPS
    assert curve(parts) == pytest.approx(curve(whole), rel=0.05)
    rng = last_state(whole)[1]["rng"][0]
    assert len(rng["cuda"]) == (1 if DEVICE == "cuda" else 0) and last_state(parts)[1]["rng"][0]["cuda"] == []


# Faults


@contextmanager
def bad_loss(*steps: int) -> Iterator[None]:
    """The losses of some steps, counted from 1 of this process, are infinite, while their gradients are finite."""
    calls = 0
    original = CheckedBackward.__call__

    def backward(self: CheckedBackward, loss: Tensor) -> None:
        nonlocal calls
        calls += 1
        original(self, loss + torch.inf if calls in steps else loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckedBackward, "__call__", backward)
        yield


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_loss_that_is_not_finite_is_skipped(read: ReadConfig, precision: str, fused: bool) -> None:
    """Weights and optimiser after the skipped step are those before; it is counted, and its samples are noted."""
    if DEVICE != "cuda" and precision == "fp16":
        pytest.skip("for GPUs alone")
    config = read(**VIT, precision=precision, optim__fused=fused, optim__clip_norm=1.0, max_steps=6)
    run(config, "bad", stop_after=4)
    with bad_loss(1):
        folder = run(config, "bad", stop_after=5)
    (_, before, old), (_, after, new) = (load_checkpoint(path) for path in list_checkpoints(folder / "checkpoints"))
    assert same_tree(before["model"], after["model"]) and same_tree(before["optimizer"], after["optimizer"])
    assert new["extra"]["num_skipped"] == old["extra"]["num_skipped"] + 1
    noted = [json.loads(line) for line in (folder / "bad_batches.jsonl").read_text().splitlines()]
    assert noted[-1]["step"] == 5 and len(noted[-1]["positions"]) == 12
    run(config, "bad")
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


@NEEDS_GPU
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_of_the_loss_scale_is_no_fault(read: ReadConfig, fused: bool, tmp_path: Path) -> None:
    """A scale of 2^40 overflows: steps are skipped without a note while it is halved, and the scale is resumed."""
    config = read(**VIT, precision="fp16", optim__fused=fused, loop__checkpoint_every=1, loop__keep_checkpoints=99)
    folder = run(config, "scaled", stop_after=1)
    path = list_checkpoints(folder / "checkpoints")[-1] / "manifest.json"
    manifest = json.loads(path.read_text())
    assert set(manifest["state"]["loss_scale"]) == {"scale", "good_steps"}
    manifest["state"]["loss_scale"]["scale"] = 2.0**40
    path.write_text(json.dumps(manifest))
    run(config, "scaled")
    states = [load_checkpoint(path) for path in list_checkpoints(folder / "checkpoints")]
    scales = [state["loss_scale"]["scale"] for _, _, state in states]
    assert scales[1:4] == [2.0**39, 2.0**38, 2.0**37]
    assert same_tree(states[1][1]["model"], states[2][1]["model"])
    assert states[-1][2]["extra"]["num_skipped"] == 0 and not (folder / "bad_batches.jsonl").exists()


# As a program


def environment() -> dict[str, str]:
    variables = clean_environment()
    return variables if DEVICE == "cuda" else variables | {"CUDA_VISIBLE_DEVICES": ""}


def command(config: Config, name: str, *more: str) -> list[str]:
    """The command line of a run, whose YAML lies where `student_config` wrote it."""
    return [sys.executable, str(MAIN), "--config", str(config.runs.parent / "student.yaml"), "--run", name, *more]


@pytest.mark.usefixtures("programs_arithmetic")
def test_sigterm_saves_and_the_same_command_goes_on(read: ReadConfig, tmp_path: Path) -> None:
    """Exit code 75 in the middle of an epoch, with workers; then the weights of an undisturbed run."""
    steps = 400 if DEVICE == "cuda" else 40
    config = read(loop__deterministic=True, loop__num_workers=2, max_steps=steps)
    process = subprocess.Popen(
        command(config, "parts"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        seen = next((line for line in process.stdout if line.startswith(f"step {20:0{len(str(steps))}}/")), None)
        assert seen is not None, "it ended before step 20"
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 75 and "(SIGTERM)" in output, output
    parts = run(config, "parts")
    assert RunFolder(parts).read_summary()["step"] == steps
    same_end(run(config, "whole"), parts)


@pytest.mark.usefixtures("programs_arithmetic")
def test_under_accelerate_launch(read: ReadConfig, tmp_path: Path) -> None:
    """`configs/accelerate/gpu1.yaml` (`one.yaml` without a GPU) gives the run of plain python."""
    config = read(loop__deterministic=True)
    expected = run(config, "plain")
    launcher = "gpu1" if DEVICE == "cuda" else "one"
    done = accelerate(launcher, MAIN, "--config", tmp_path / "student.yaml", "--run", "launched", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    same_end(expected, tmp_path / "runs" / "launched")


def test_check_names_the_device(read: ReadConfig, tmp_path: Path) -> None:
    config = read()
    started = time.monotonic()
    done = subprocess.run([*command(config, "x"), "--check"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"on {DEVICE}" in done.stdout and time.monotonic() - started < 300
