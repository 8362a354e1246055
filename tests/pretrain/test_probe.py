"""Probes: the linear classifier against scikit-learn, and the whole program on a small run."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pretrain.evaluators.linear_probe import fit_linear
from pretrain.probe_config import LinearConfig
from tests.conftest import TinySample
from tests.tools import REPOSITORY, accelerate, run_python

PROBE = REPOSITORY / "pretrain" / "probe.py"


def test_linear_probe_is_as_good_as_scikit_learn() -> None:
    """At most 0.5 points below logistic regression on the same features, on overlapping classes."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 24))
    labels = rng.integers(0, 5, 4000)
    features = (centres[labels] + 1.6 * rng.normal(size=(4000, 24))) * rng.uniform(0.1, 10, 24)
    train, test = slice(0, 2000), slice(2000, None)
    scaler = StandardScaler().fit(features[train])
    theirs = LogisticRegression(max_iter=2000).fit(scaler.transform(features[train]), labels[train])
    expected = theirs.score(scaler.transform(features[test]), labels[test])
    tensors = torch.from_numpy(features).float()
    scores, rate = fit_linear(
        tensors[train],
        torch.from_numpy(labels[train]),
        tensors[test],
        num_classes=5,
        config=LinearConfig(),
        seed=0,
    )
    found = (scores.argmax(1).numpy() == labels[test]).mean()
    assert rate in LinearConfig().rates and 0.5 < expected < 0.95
    assert found > expected - 0.005


def run_and_probe(config: Path, sample: TinySample, runs: Path, *, launcher: str = "python") -> dict[str, float]:
    data = ("--train", sample.train, "--val", sample.val, "--gaze", sample.gaze, "--linear.epochs", 5)
    arguments = ("--run", runs / "student", *data, "--num_workers", 0, "--gaze_options.stride", 2)
    done = run_python(PROBE, *arguments) if launcher == "python" else accelerate(launcher, PROBE, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((runs / "student" / "summary.json").read_text())["metrics"]


@pytest.mark.parametrize("arm", ["contrastive+attention", "contrastive"])
def test_probe_gives_the_same_on_one_and_two_ranks(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path, arm: str
) -> None:
    """The contrastive arm has no head of its own: its read-out is trained, the same on any number of ranks."""
    config = student_config(arm=arm, max_steps=3)
    assert run_python(REPOSITORY / "pretrain" / "main.py", "--config", config).returncode == 0
    one = run_and_probe(config, tiny_sample, tmp_path / "runs")
    two = run_and_probe(config, tiny_sample, tmp_path / "runs", launcher="cpu2_ddp")
    names = {"linear_probe/top1", "attention/nss", "attention/kld", "attention/cc"}
    assert names <= one.keys() and one["attention/num_images"] == 20
    for name in names:
        assert two[name] == pytest.approx(one[name], abs=1e-5)
    assert (tmp_path / "runs" / "student" / "probe" / "alignment.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--evaluators", "linear_prob"), ["linear_prob", "linear_probe"]),
        (("--run", "runs/absent"), ["runs/absent"]),
        (("--val", "absent"), ["absent"]),
    ],
)
def test_bad_input_is_one_line(
    student_config: Callable[..., Path],
    tiny_sample: TinySample,
    tmp_path: Path,
    arguments: tuple[str, str],
    words: list[str],
) -> None:
    config = student_config(max_steps=1)
    assert run_python(REPOSITORY / "pretrain" / "main.py", "--config", config).returncode == 0
    base = {"--run": tmp_path / "runs" / "student", "--train": tiny_sample.train, "--val": tiny_sample.val}
    base |= {"--gaze": tiny_sample.gaze, arguments[0]: arguments[1]}
    done = run_python(PROBE, *(part for pair in base.items() for part in pair))
    assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]
