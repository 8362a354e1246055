"""`slurm/label.sbatch` on a real Slurm: tasks are killed and requeued, and the same line completes the set."""

import time
from pathlib import Path

import pytest
import torch

from shards.pack import pack
from shards.reader import ShardSet
from teacher.config import ModelConfig
from teacher.model import SaliencyModel
from teacher.saved import load_teacher, save_teacher
from tests.slurm.cluster import Cluster
from tests.teacher.conftest import BlobSource
from tests.tools import REPOSITORY, run_python

NUM_SHARDS, NUM_TASKS = 15, 3
IMAGE_SIZE = (192, 256)


@pytest.fixture(scope="module")
def slow_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a teacher that takes long enough over an image to be killed at it."""
    run = tmp_path_factory.mktemp("runs") / "slow"
    run.mkdir()
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet18")
    state = SaliencyModel(config, image_size=IMAGE_SIZE).state_dict()
    facts = {"step": 0, "metrics": {}, "data": {}, "gaze": {}}
    save_teacher(run, state, model=config, image_size=IMAGE_SIZE, facts=facts)
    return run


def test_killed_and_requeued_tasks_are_made_good_by_the_same_line(
    cluster: Cluster, slow_teacher: Path, tmp_path: Path
) -> None:
    pack(BlobSource(NUM_SHARDS * 10, edition=None, seed=5), tmp_path / "images", shard_samples=10)
    common = ["--run", slow_teacher, "--shards", tmp_path / "images", "--batch_size", 1, "--num_workers", 0]
    undisturbed = run_python(REPOSITORY / "teacher" / "label.py", *common, "--output", tmp_path / "whole")
    assert undisturbed.returncode == 0, undisturbed.stderr
    teacher = load_teacher(slow_teacher).hash
    whole, labels = (tmp_path / root / teacher[:16] for root in ("whole", "labels"))

    line = [f"--array=0-{NUM_TASKS - 1}", "--cpus-per-task=1", REPOSITORY / "slurm" / "label.sbatch", *common]
    line += ["--output", tmp_path / "labels"]
    job = cluster.submit(*line)
    _disturb(cluster, job, task=1, labels=labels, command=["scancel", "--signal=KILL", "--full", f"{job}_1"])
    _disturb(cluster, job, task=2, labels=labels, command=["scontrol", "requeue", f"{job}_2"])
    cluster.wait(job, timeout=240)
    assert not (labels / "manifest.json").exists(), "the killed task must have left shards unwritten"

    again = cluster.submit(*line)
    cluster.wait(again, timeout=240)
    assert "sealed" in cluster.logs(again), cluster.logs(again)
    written = {p.name: p.read_bytes() for p in labels.iterdir() if not p.name.endswith(".tmp")}
    assert written == {p.name: p.read_bytes() for p in whole.iterdir()}
    shards = ShardSet(tmp_path / "images", labels=labels, teacher_hash=teacher)
    assert sum(shards.read(s, r).map is not None for s in range(NUM_SHARDS) for r in range(10)) == NUM_SHARDS * 10


def _disturb(cluster: Cluster, job: int, *, task: int, labels: Path, command: list[str]) -> None:
    """Run `command` once the task has written its first shard and not yet its last."""
    first = NUM_SHARDS // NUM_TASKS * task
    index = labels / f"shard-{first:06d}.index"
    deadline = time.monotonic() + 180
    while not index.exists():
        assert time.monotonic() < deadline, f"task {task} wrote nothing\n{cluster.states(job)}\n{cluster.logs(job)}"
        time.sleep(0.01)
    cluster.call(*command)
