"""Each mistake ends with exit code 2 and one line that says what, where and what to do; nothing is left behind."""

import io
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import pytest

from tests.conftest import TinySample, write_labels
from tests.tools import REPOSITORY, accelerate, run_python

MAIN = REPOSITORY / "pretrain" / "main.py"


def refused(*arguments: object, words: list[str], runs: Path | None = None, code: int = 2) -> None:
    """The program, run in this process: what it writes to stderr is one line, and its exit code is `code`."""
    errors = io.StringIO()
    argv = [str(MAIN), *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), redirect_stderr(errors), pytest.raises(SystemExit) as left:
        runpy.run_path(str(MAIN), run_name="__main__")
    assert left.value.code == code, errors.getvalue()
    lines = [line for line in errors.getvalue().splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: " if code == 2 else "failed: "), errors.getvalue()
    assert all(word in lines[0] for word in words), lines[0]
    if runs is not None:
        assert not runs.exists(), "a refused run left its folder"


def test_the_process_leaves_with_exit_code_2(student_config: Callable[..., Path]) -> None:
    done = run_python(MAIN, "--config", student_config(model__backbone="resnet19"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data__shards": "no/such/folder"}, ["no/such/folder"]),
        ({"data__labels": "no/such/labels"}, ["no/such/labels", "teacher/label.py"]),
        ({"data__labels": None}, ["data.labels", "contrastive+attention"]),
        ({"data__control": "shuffled"}, ["data.control 'shuffled'", "--controls shuffled"]),
        ({"arm": "co-train"}, ["data.gaze", "co-train"]),
        ({"sync_batch_norm": True}, ["sync_batch_norm needs GPUs", "cpu"]),
        ({"ema": 1.0}, ["ema 1.0"]),
        ({"optim__name": "lars", "optim__fused": True}, ["optim.fused", "LARS"]),
        ({"data__teacher": "0123456789abcdef"}, ["0123456789ab", "5accade0"]),
        ({"data__batch_size": 1000}, ["1000", "72"]),
        ({"model__backbone": "resnet19"}, ["resnet19"]),
        ({"attention__stages": [9]}, ["attention.stages", "9"]),
        ({"run": "a/b"}, ["a/b"]),
        ({"optim__nme": "sgd"}, ["'optim.nme'", "'optim.name'"]),
        ({"epochs": "many"}, ["epochs"]),
    ],
)
def test_mistakes_in_the_config(
    student_config: Callable[..., Path], tmp_path: Path, overrides: dict[str, object], words: list[str]
) -> None:
    name = overrides.pop("run", None)
    config = student_config(**overrides)
    refused("--config", config, *(["--run", name] if name else []), words=words, runs=tmp_path / "runs")


def test_labels_of_another_image_set(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path
) -> None:
    foreign = write_labels(tiny_sample.val, tmp_path / "foreign")
    config = student_config(data__labels=str(foreign))
    refused("--config", config, words=["another image set"], runs=tmp_path / "runs")


def test_two_label_sets_must_be_chosen_from(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path
) -> None:
    root = tmp_path / "labels"
    shutil.copytree(tiny_sample.labels, root)
    write_labels(tiny_sample.train, root, teacher="ab" * 32)
    refused("--config", student_config(data__labels=str(root)), words=["2 label sets"], runs=tmp_path / "runs")


def test_an_empty_shard_folder(student_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = student_config(data__shards=str(tmp_path / "empty"))
    refused("--config", config, words=[str(tmp_path / "empty")], runs=tmp_path / "runs")


def test_a_run_folder_of_another_config(student_config: Callable[..., Path], tmp_path: Path) -> None:
    config = student_config(max_steps=2)
    assert run_python(MAIN, "--config", config).returncode == 0
    before = sorted(p.name for p in (tmp_path / "runs" / "student").rglob("*"))
    refused("--config", config, "--temperature", 0.7, words=["belongs to another config", "temperature", "0.1", "0.7"])
    assert sorted(p.name for p in (tmp_path / "runs" / "student").rglob("*")) == before


def test_a_world_size_that_does_not_divide_the_batch(student_config: Callable[..., Path], tmp_path: Path) -> None:
    done = accelerate("cpu2_ddp", MAIN, "--config", student_config(data__batch_size=13))
    assert done.returncode != 0 and "batch_size 13 cannot be divided by 2 ranks: set it to 12 or 14" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_lars_under_zero_is_refused(student_config: Callable[..., Path]) -> None:
    done = accelerate("cpu2_zero2", MAIN, "--config", student_config(optim__name="lars"))
    assert done.returncode != 0 and "optim.name 'lars' cannot run under DeepSpeed ZeRO" in done.stderr


def test_check_reports_without_training(student_config: Callable[..., Path], tmp_path: Path) -> None:
    done = run_python(MAIN, "--config", student_config(), "--check")
    assert done.returncode == 0 and not (tmp_path / "runs").exists(), done.stderr
    for words in ("72 samples in 3 shards", "10 steps of 12 images", "test_resnet", "1 rank(s)", "teacher 5accade0"):
        assert words in done.stdout
