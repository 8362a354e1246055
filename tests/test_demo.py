"""The demo's chain from end to end, cut down: the same programs and configs, fewer images and steps."""

import json
import shutil
import subprocess
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the chain was run."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        steps = [smaller(step) for step in read_chain(REPOSITORY / "configs" / "chain" / "demo.yaml")]
        run_chain(steps, variables={"data": "data/demo", "runs": "runs"})
        yield folder


def test_the_chain_leaves_what_the_readme_says(demo: Path) -> None:
    summary = json.loads((demo / "runs" / "demo" / "summary.json").read_text())
    metrics = summary["metrics"]
    for arm in ("contrastive", "contrastive+attention"):
        for name in ("linear_probe/top1", "attention/nss", "attention/kld", "attention/cc"):
            assert isinstance(metrics[f"{arm}/{name}"], float)
    for name in ("nss", "kld", "cc"):
        assert isinstance(metrics[f"teacher/attention/{name}"], float)
        assert isinstance(metrics[f"centre_bias/{name}"], float)
    assert summary["run"] == "demo" and summary["step"] == 3
    text = (demo / "runs" / "demo" / "report" / "summary.md").read_text()
    assert f"{metrics['contrastive/linear_probe/top1']:.2f}" in text
    assert list((demo / "runs" / "demo-attention" / "wandb").glob("offline-run-*/*.wandb"))


def test_the_student_alone_is_one_command_from_any_folder(demo: Path) -> None:
    main = REPOSITORY / "pretrain" / "main.py"
    done = accelerate("one", main, "--run", "alone", "--max_steps", 2, "--loop.tracker", "none", cwd=demo)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (demo / "runs" / "alone" / "encoder" / "model.safetensors").is_file()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_the_report_opens_in_a_browser_with_every_picture_drawn(demo: Path, tmp_path: Path) -> None:
    """Headless, from disk: no console message, no request, no broken picture, the summary's numbers in the table."""
    page = (demo / "runs" / "demo" / "report" / "index.html").read_text()
    counting = """<script>addEventListener("load", () => {
        const all = [...document.images];
        document.title = `${all.length} ${all.filter(i => i.naturalWidth > 1).length} ${all.filter(i => i.alt).length}`;
    })</script></body>"""
    copy = tmp_path / "index.html"
    copy.write_text(page.replace("</body>", counting))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    total, drawn, named = map(int, done.stdout.split("<title>")[1].split("</title>")[0].split())
    assert total == drawn == named and total >= 5 * 12 + 4
    assert "CONSOLE" not in done.stderr
    assert 'src="http' not in page and "<link" not in page and len(page) < 5_000_000
    metrics = json.loads((demo / "runs" / "demo" / "summary.json").read_text())["metrics"]
    for key in ("contrastive/attention/nss", "contrastive+attention/attention/kld", "teacher/attention/cc"):
        assert f"<td>{metrics[key]:.3f}</td>" in done.stdout
