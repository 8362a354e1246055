"""Evaluators on the device: the numbers of the CPU; and during a training, which does not notice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.program import parse_config
from engine.runs import RunFolder
from pretrain.config import Config
from pretrain.evaluators.offline import probe_run
from pretrain.trainer import train
from tests.conftest import TinySample
from tests.cuda.conftest import only_cpu
from tests.pretrain.evaluators.conftest import tiny_probe, write_run
from tests.pretrain.runs import losses

EVALUATORS = "knn,linear_probe,alignment,retrieval,finetune"


def numbers(path: Path) -> dict[str, float]:
    return RunFolder(path).read_summary()["metrics"]


def test_the_numbers_are_those_of_the_cpu(tiny_sample: TinySample, tmp_path: Path, device: torch.device) -> None:
    """On the same frozen encoder: to 1e-3; fine-tuned, whose rounding grows with the steps, to four images of 40."""
    run = write_run(tmp_path / "student", tiny_sample)
    probe = tiny_probe(run.path, tiny_sample, evaluators=EVALUATORS, keep_cache=False)
    probe_run(replace(probe, output=tmp_path / "device"))
    with only_cpu():
        probe_run(replace(probe, output=tmp_path / "cpu"))
    found, expected = numbers(tmp_path / "device"), numbers(tmp_path / "cpu")
    assert found.keys() == expected.keys() and len(found) > 10
    tuned = {name for name in found if name.startswith("finetune")}
    for name, value in expected.items():
        # top1 counts images: one of 40 may stand on an edge
        edge = 10 if name in tuned else 2.5 if "top" in name else 0
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-3 + edge), name


def test_a_training_does_not_notice_them(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path
) -> None:
    """Every loss bit for bit, and the evaluators' numbers in the metrics."""
    online = {
        "online__evaluators": "knn,alignment",
        "online__val": str(tiny_sample.val),
        "online__gaze": str(tiny_sample.gaze),
        "online__every_steps": 2,
        "online__options": {"knn.k": 5},
    }
    for run, more in (("watched", online), ("alone", {})):
        words = ["--config", str(student_config(max_steps=5, ema=0.9, loop__deterministic=True, **more)), "--run", run]
        train(parse_config(Config, argv=words)[0])
    names = {name for line in RunFolder(tmp_path / "runs" / "watched").metrics() for name in line}
    assert {"online/knn/top1", "online/attention/nss"} <= names
    watched = [line for line in RunFolder(tmp_path / "runs" / "watched").metrics() if "train/loss" in line]
    assert [line["train/loss"] for line in watched] == losses(tmp_path / "runs" / "alone").tolist()
