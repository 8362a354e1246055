"""`slurm/downstream.sbatch` on a real Slurm: one seed a task, stopped and requeued, then the table over all of them."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.downstream.test_pipeline import write_trec
from tests.slurm.cluster import Cluster, running_cluster, why_not
from tests.tools import REPOSITORY, run_python


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def test_a_seed_that_is_stopped_comes_back_and_the_table_finds_every_run(cluster: Cluster, tmp_path: Path) -> None:
    cluster.environment |= {"SACCADE_ROOT": str(REPOSITORY), "VIRTUAL_ENV": sys.prefix, "WANDB_MODE": "offline"}
    cluster.environment["PATH"] = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    options = ["--config", "configs/downstream/trec6.yaml", "--data.path", write_trec(tmp_path / "trec", train=300)]
    options += ["--text.kind", "transformer", "--text.width", 16, "--text.heads", 2, "--data.batch_size", 3]
    options += ["--epochs", 12, "--retrain_epochs", 1, "--arm", "baseline,mse", "--loop.tracker", "none"]
    options += ["--loop.checkpoint_every", 40, "--runs", tmp_path / "runs"]
    script = REPOSITORY / "slurm" / "downstream.sbatch"
    job = cluster.submit("--array=0-1", "--cpus-per-task=1", script, *options)
    marker = tmp_path / "runs" / "trec6-step1-seed0" / "checkpoints"
    deadline = time.monotonic() + 180
    while not list(marker.glob("step-*/manifest.json")):
        assert time.monotonic() < deadline, cluster.logs(job)
        time.sleep(0.05)
    cluster.call("scancel", "--signal=USR1", "--batch", f"{job}_0")
    cluster.wait(job, timeout=300)
    assert "stopped: after step" in cluster.logs(job) and "resumed" in cluster.logs(job), cluster.logs(job)
    table = run_python("downstream/main.py", *options, "--seeds", 2)
    assert table.returncode == 0 and "step " not in table.stdout, table.stderr
    summary = json.loads((tmp_path / "runs" / "trec6" / "summary.json").read_text())
    assert summary["protocol"]["seeds"] == [0, 1] and "mse/gain" in summary["metrics"]
