"""The demo's chain from end to end, cut down: the same programs and configs, fewer images and steps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.chain import Step, read_chain, run_chain
from tests.tools import REPOSITORY, accelerate

SMALLER: dict[str, dict[str, Any]] = {
    "shards/generate.py": {
        "num_train": 160, "num_val": 60, "num_gaze_train": 32, "num_gaze_val": 24, "num_workers": 2,
    },
    "teacher/main.py": {"max_steps": 4, "loop.tracker": "none"},
    "pretrain/main.py": {"max_steps": 3, "data.batch_size": 32, "loop.num_workers": 1},
    "pretrain/probe.py": {"linear.epochs": 3, "num_workers": 1},
}  # fmt: skip


def smaller(step: Step) -> Step:
    return replace(step, options={**step.options, **SMALLER.get(step.program, {})})


def test_the_chain_leaves_what_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    steps = [smaller(step) for step in read_chain(REPOSITORY / "configs" / "chain" / "demo.yaml")]
    run_chain(steps, variables={"data": "data/demo", "runs": "runs"})
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    metrics = summary["metrics"]
    for arm in ("contrastive", "contrastive+attention"):
        for name in ("linear_probe/top1", "attention/nss", "attention/kld", "attention/cc"):
            assert isinstance(metrics[f"{arm}/{name}"], float)
    for name in ("nss", "kld", "cc"):
        assert isinstance(metrics[f"teacher/attention/{name}"], float)
        assert isinstance(metrics[f"centre_bias/{name}"], float)
    assert summary["run"] == "demo" and summary["step"] == 3
    page = (tmp_path / "runs" / "demo" / "report" / "index.html").read_text()
    assert page.count("data:image/jpeg") >= 5 * 12 and "http://" not in page.replace("http://www.w3.org", "")
    text = (tmp_path / "runs" / "demo" / "report" / "summary.md").read_text()
    assert f"{metrics['contrastive/linear_probe/top1']:.1f}" in text
    assert list((tmp_path / "runs" / "demo-attention" / "wandb").glob("offline-run-*/*.wandb"))

    # with the sample in place, the student alone is one command without arguments, from any folder
    main = REPOSITORY / "pretrain" / "main.py"
    done = accelerate("one", main, "--run", "alone", "--max_steps", 2, "--loop.tracker", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "alone" / "encoder" / "model.safetensors").is_file()
