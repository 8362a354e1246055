"""`slurm/pretrain.sbatch` and `slurm/sweep.sbatch` on a real Slurm of two nodes: signals, a lost node, bad input."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import TinySample
from tests.slurm.cluster import Cluster
from tests.tools import REPOSITORY, run_python

STEPS, EVERY = 300, 50
SCRIPT = REPOSITORY / "slurm" / "pretrain.sbatch"
# seconds: a launcher's failure ends a job whose other node is gone after this long
PATIENCE = {"SACCADE_PATIENCE": "3"}


@dataclass
class Student:
    """A small training on two nodes, one rank each, under names of one's own."""

    cluster: Cluster
    config: Path
    runs: Path

    def submit(self, name: str, *options: object, nodes: int = 2) -> int:
        resources = (f"--nodes={nodes}", "--cpus-per-task=1")
        return self.cluster.submit(*resources, *options, SCRIPT, "--config", self.config, "--run", name)

    def wait_for_step(self, name: str, step: int, job: int) -> None:
        """Wait until the run has logged `step` steps or more."""
        file = self.runs / name / "metrics.jsonl"
        deadline = time.monotonic() + 180
        while not file.exists() or len(file.read_text().splitlines()) < step:
            assert time.monotonic() < deadline, self.cluster.logs(job)
            time.sleep(0.05)

    def assert_same_end(self, first: str, second: str) -> None:
        """Final weights and all losses are equal bit for bit."""
        one, other = self.runs / first, self.runs / second
        for name in ("model.safetensors", "heads.safetensors"):
            weights = [load_file(run / "encoder" / name) for run in (one, other)]
            assert weights[0].keys() == weights[1].keys()
            assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
        lines = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
        curves = [[line["train/loss"] for line in run if "train/loss" in line] for run in lines]
        assert len(curves[0]) == STEPS and curves[0] == curves[1]


@pytest.fixture(scope="module")
def student(cluster: Cluster, tiny_sample: TinySample, tmp_path_factory: pytest.TempPathFactory) -> Student:
    root = tmp_path_factory.mktemp("student")
    config = {
        "runs": str(root / "runs"),
        "arm": "contrastive+attention",
        "max_steps": STEPS,
        "data": {"shards": str(tiny_sample.train), "labels": str(tiny_sample.labels), "batch_size": 12},
        "model": {"backbone": "test_resnet", "projector_hidden": 32, "projector_out": 16},
        "attention": {"channels": 16},
        "optim": {"name": "adamw", "lr": 0.001, "lr_scaling": "none", "warmup_epochs": 0.5},
        "loop": {"log_every": 1, "checkpoint_every": EVERY, "tracker": "none", "num_workers": 0},
    }
    config["data"] |= {"image_size": 32}  # type: ignore[operator]
    (root / "student.yaml").write_text(yaml.safe_dump(config))
    return Student(cluster, root / "student.yaml", root / "runs")


@pytest.fixture(scope="module")
def undisturbed(student: Student) -> Callable[[], str]:
    """Starts a run that nothing happens to; called, it waits for its end and gives its name."""
    job = student.submit("whole")

    def wait() -> str:
        student.cluster.wait(job, timeout=240)
        log = student.cluster.logs(job)
        assert (student.runs / "whole" / "encoder").is_dir() and "requeue" not in log, log
        return "whole"

    return wait


def test_a_signal_saves_requeues_and_the_run_ends_bit_equal(student: Student, undisturbed: Callable[[], str]) -> None:
    """USR1 to the batch script alone, as `#SBATCH --signal=B:USR1@300` sends it: both nodes' ranks must hear of it."""
    job = student.submit("signalled")
    student.wait_for_step("signalled", 20, job)
    student.cluster.call("scancel", "--signal=USR1", "--batch", job)
    student.cluster.wait(job, timeout=240)
    log = student.cluster.logs(job)
    assert "(SIGUSR1)" in log and f"requeue {job}\n" in log, log
    assert "resumed" in log and "failed, to be tried again" not in log, log
    student.assert_same_end(undisturbed(), "signalled")


@pytest.mark.parametrize("node", ["n2", "n1"])
def test_a_lost_node_requeues_and_the_run_ends_bit_equal(
    student: Student, undisturbed: Callable[[], str], node: str
) -> None:
    """With the first node the batch script is lost too: Slurm itself requeues the job once the node is down."""
    undisturbed()
    student.cluster.environment |= PATIENCE
    name = f"lost-{node}"
    job = student.submit(name)
    student.wait_for_step(name, EVERY + 10, job)
    student.cluster.kill_node(node)
    if node == "n1":  # what Slurm finds out after its SlurmdTimeout
        student.cluster.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
    student.cluster.start_node(node)
    if node == "n1":
        student.cluster.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
    student.cluster.wait(job, timeout=240)
    log = student.cluster.logs(job)
    assert (f"requeue {job}\n" in log) == (node == "n2") and "resumed" in log, log
    student.assert_same_end("whole", name)


def test_a_rendezvous_host_that_cannot_be_resolved_is_named(student: Student) -> None:
    job = student.submit("nowhere", "--export=ALL,SACCADE_RENDEZVOUS=no-such-host.invalid")
    student.cluster.wait(job, timeout=60)
    assert "error: rendezvous host 'no-such-host.invalid' cannot be resolved" in student.cluster.logs(job)
    assert " ExitCode=2:0" in student.cluster.call("scontrol", "--oneliner", "show", "job", job)
    assert not (student.runs / "nowhere").exists()


def test_a_bad_option_ends_the_job_before_a_launcher_starts(student: Student) -> None:
    job = student.cluster.submit("--cpus-per-task=1", SCRIPT, "--config", student.config, "--optim.lrr", 3)
    student.cluster.wait(job, timeout=60)
    assert student.cluster.logs(job).endswith("error: Unknown key: 'optim.lrr'. Did you mean 'optim.lr'?\n")
    assert " ExitCode=2:0" in student.cluster.call("scontrol", "--oneliner", "show", "job", job)


def test_a_sweep_trains_every_line_and_a_signalled_task_is_requeued_alone(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks of one seed: the one that is asked to stop is requeued as task 0, and both end bit-equal."""
    for name, value in student.cluster.environment.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "sweep.txt"
    file.write_text("".join(f"--config {student.config} --run task{task}\n" for task in (0, 1)))
    options = f"--sbatch=--parsable --cpus-per-task=1 --output={student.cluster.root}/%A_%a.out"
    submitted = run_python(REPOSITORY / "engine" / "sweep.py", "--file", file, "--submit", "true", options)
    assert submitted.returncode == 0, submitted.stderr
    job = int(submitted.stdout.splitlines()[-1])
    student.wait_for_step("task0", 20, job)
    student.cluster.call("scancel", "--signal=USR1", "--batch", f"{job}_0")
    student.cluster.wait(job, timeout=240)
    log = student.cluster.logs(job)
    assert f"requeue {job}_0\n" in log and f"requeue {job}_1\n" not in log and log.count("resumed") == 1, log
    student.assert_same_end("task0", "task1")
