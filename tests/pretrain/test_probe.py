"""Probes: the linear classifier against scikit-learn, and the whole program on a small run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from engine.errors import InputError
from pretrain.evaluators.linear_probe import fit_linear
from pretrain.evaluators.offline import check_probe, probe_run
from pretrain.probe_config import GazeConfig, KnnConfig, LinearConfig
from tests.conftest import TinySample
from tests.pretrain.evaluators.conftest import tiny_probe, write_run
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


def test_the_program_gives_on_two_ranks_what_one_process_finds(tiny_sample: TinySample, tmp_path: Path) -> None:
    """A student without a head of its own: its read-out is trained, the same on any number of ranks."""
    run = write_run(tmp_path / "student", tiny_sample, arm="contrastive").path
    options = {"linear.epochs": 5, "knn.k": 9, "gaze_options.stride": 2, "gaze_options.readout_steps": 3}
    sections = {"linear": LinearConfig(epochs=5), "knn": KnnConfig(k=9)}
    names = "linear_probe,knn,alignment"
    probe = tiny_probe(run, tiny_sample, evaluators=names, output=tmp_path / "one", **sections)
    probe_run(replace(probe, gaze_options=GazeConfig(stride=2, readout_steps=3, readout_lr=0.004)))
    data = ("--train", tiny_sample.train, "--val", tiny_sample.val, "--gaze", tiny_sample.gaze, "--num_workers", 1)
    extra = [part for key, value in options.items() for part in (f"--{key}", value)]
    done = accelerate("cpu2_ddp", PROBE, "--run", run, "--evaluators", names, *data, *extra)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((path / "summary.json").read_text()) for path in (tmp_path / "one", run))
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-6) and one["metrics"]["attention/num_images"] == 20
    assert two["protocols"] == one["protocols"]
    for word in ("k 9, T 0.1", "5 epochs", "read-out"):
        assert word in done.stdout
    assert (run / "probe" / "alignment.safetensors").is_file()


def test_bad_input_is_one_line(tiny_sample: TinySample, tmp_path: Path) -> None:
    run = write_run(tmp_path / "student", tiny_sample).path
    done = run_python(PROBE, "--run", run, "--evaluators", "linear_prob")
    assert done.returncode == 2 and "did you mean 'linear_probe'" in done.stderr, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": Path("runs/absent")}, "runs/absent"),
        ({"val": Path("absent")}, "absent"),
        ({"gaze": Path("absent")}, "absent"),
        ({"run": None}, "--encoder"),
    ],
)
def test_what_is_missing_is_named_before_anything_runs(
    tiny_sample: TinySample, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    run = write_run(tmp_path / "student", tiny_sample).path
    for start in (check_probe, probe_run):
        with pytest.raises(InputError, match=words):
            start(replace(tiny_probe(run, tiny_sample), **changes))
    assert not (run / "summary.json").exists() and not (run / "probe").exists()
