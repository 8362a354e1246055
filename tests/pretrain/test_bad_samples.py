"""Unreadable samples are left out of every loss, counted over all ranks, named, and stop the run when too many."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.reader import ShardSet
from tests.conftest import TinySample, write_labels
from tests.tools import REPOSITORY, accelerate, run_python

MAIN = REPOSITORY / "pretrain" / "main.py"


@pytest.fixture
def damaged(tiny_sample: TinySample, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the training shards with one image overwritten, and that image's key."""
    root = tmp_path / "damaged"
    shutil.copytree(tiny_sample.train, root)
    shards = ShardSet(root)
    data, key = shards.read(1, 5).image, shards.read(1, 5).key
    tar = root / shards.manifest.files[1]
    content = tar.read_bytes()
    at = content.index(data)
    tar.write_bytes(content[:at] + bytes(len(data)) + content[at + len(data) :])
    return root, key


def test_one_bad_sample_is_named_and_counted(
    student_config: Callable[..., Path], damaged: tuple[Path, str], tmp_path: Path
) -> None:
    root, key = damaged
    config = student_config(data__shards=str(root), max_steps=6)
    done = accelerate("cpu2_ddp", MAIN, "--config", config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bad sample at step") == 1 and key in done.stdout
    assert '"data/num_bad": 1' in (tmp_path / "runs" / "student" / "summary.json").read_text()


def test_too_many_bad_samples_stop_the_run(
    student_config: Callable[..., Path], damaged: tuple[Path, str], tmp_path: Path
) -> None:
    root, _ = damaged
    config = student_config(data__shards=str(root), max_steps=30)
    done = run_python(MAIN, "--config", config)
    assert done.returncode == 2 and "samples could not be read" in done.stderr and "shard-000001" in done.stderr


def test_labels_fit_the_copy(tiny_sample: TinySample, damaged: tuple[Path, str], tmp_path: Path) -> None:
    """The damage is in the image alone: label sets still belong to the set."""
    folder = write_labels(tiny_sample.train, tmp_path / "again")
    assert ShardSet(damaged[0], labels=folder).num_samples == 72
