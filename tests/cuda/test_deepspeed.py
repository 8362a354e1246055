"""DeepSpeed ZeRO 1, 2 and 3 over nccl on one GPU, as `accelerate launch` starts it: fp32, fp16, bf16; stopped too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.program import parse_config
from pretrain.config import Config
from pretrain.trainer import train
from tests.cuda.conftest import DEVICE
from tests.pretrain.runs import losses, order
from tests.tools import REPOSITORY, accelerate

RECIPES = REPOSITORY / "tests" / "pretrain" / "run_recipes.py"
STEPS = 8
CALM = {
    "optim__name": "sgd",
    "optim__lr": 0.05,
    "max_steps": STEPS,
    "temperature": 0.5,
    "model__backbone": "test_vit",
    "model__head_norm": "none",
    "loop__record_order": True,
}


# bf16 comes last: DeepSpeed keeps its autocast for the rest of the process
def jobs(config: Path) -> list[list[str]]:
    def job(run: str, *words: str) -> list[str]:
        return ["--config", str(config), "--run", run, *words]

    adamw = ["--optim.name", "adamw", "--optim.lr", "0.001", "--optim.fused", "true"]
    fp32 = [job("no"), job("parts", "--loop.stop_after", "3"), job("parts"), job("cross"), job("small", *adamw)]
    fp32 += [job("resumed", *adamw, "--loop.stop_after", "3"), job("resumed", *adamw)]
    half = [job("fp16", "--precision", "fp16"), job("half", "--precision", "fp16", "--loop.stop_after", "3")]
    half += [job("half", "--precision", "fp16")] if DEVICE == "cuda" else []
    return fp32 + (half if DEVICE == "cuda" else []) + [job("bf16", "--precision", "bf16")]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_learns_as_the_plain_run(student_config: Callable[..., Path], tmp_path: Path, stage: int) -> None:
    """Losses of eight steps against the plain run's on the same device; stopped runs against whole ones."""
    file, runs = student_config(**CALM), tmp_path / "runs"
    plain = train(parse_config(Config, argv=["--config", str(file), "--run", "plain"])[0])
    crossing = parse_config(Config, argv=["--config", str(file), "--run", "cross", "--loop.stop_after", "4"])[0]
    with pytest.raises(Exception, match="after step 4"):  # the rest of it under ZeRO
        train(crossing)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs(file)))
    done = accelerate(f"zero{stage}", "--num_processes", 1, RECIPES, tmp_path / "jobs.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    expected = losses(plain.path)
    for run, tolerance in (("no", 1e-4), ("cross", 1e-4), ("parts", 1e-4), ("fp16", 0.05), ("bf16", 0.05)):
        if run == "fp16" and DEVICE != "cuda":
            continue
        np.testing.assert_allclose(losses(runs / run), expected, rtol=tolerance, err_msg=run)
        assert order(runs / run) == order(plain.path)
    np.testing.assert_allclose(losses(runs / "resumed"), losses(runs / "small"), rtol=1e-4)
    if DEVICE == "cuda":
        np.testing.assert_allclose(losses(runs / "half"), losses(runs / "fp16"), rtol=1e-3)
        half, whole = (last_state(runs / run) for run in ("half", "fp16"))
        assert half["loss_scale"] == whole["loss_scale"] and half["loss_scale"]["good_steps"] > 0
    assert all(last_state(runs / run)["extra"]["num_skipped"] == 0 for run in ("no", "bf16", "parts"))


def last_state(folder: Path) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])[2]
