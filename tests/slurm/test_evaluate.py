"""`slurm/evaluate.sbatch`: tasks share evaluations out, add up whatever has finished, and do only what is missing."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.array_task import array_task
from engine.errors import InputError
from engine.runs import RunFolder
from pretrain.evaluators import shared_work
from pretrain.evaluators.offline import probe_run
from pretrain.evaluators.shared_work import describe_share, pieces_of, run_share
from pretrain.probe_array_config import ProbeArrayConfig
from pretrain.probe_config import CorruptionConfig, FinetuneConfig, KnnConfig, LinearConfig
from tests.conftest import TinySample
from tests.pretrain.evaluators.conftest import tiny_probe, write_run
from tests.slurm.cluster import Cluster
from tests.tools import REPOSITORY

NUM_TASKS = 3
NAMES = ["gaussian_noise", "zoom_blur", "snow", "fog", "elastic_transform"]


def array_config(runs: list[Path], sample: TinySample, **changes: Any) -> ProbeArrayConfig:
    """A quick array: kNN and two corruptions on each run, in one task unless it is told otherwise."""
    config = ProbeArrayConfig(
        runs=runs,
        train=sample.train,
        val=sample.val,
        num_workers=0,
        evaluators="knn,imagenet_c",
        linear=LinearConfig(epochs=10, rates=[0.1]),
        knn=KnnConfig(k=5),
        corruptions=CorruptionConfig(names=["gaussian_noise", "fog"], severities=[1, 2, 3, 4, 5]),
    )
    return replace(config, **changes)


def metrics(run: Path) -> dict[str, float]:
    return RunFolder(run).read_summary().get("metrics", {})


def stamps(run: Path) -> dict[str, int]:
    """When each kept error was written."""
    return {p.name: p.stat().st_mtime_ns for p in (run / "probe" / "cache").glob("errors-*/*.json")}


@pytest.fixture
def runs(tiny_sample: TinySample, tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / name, tiny_sample).path for name in ("a", "b")]


def test_every_piece_is_one_tasks_and_tasks_add_up(
    runs: list[Path], tiny_sample: TinySample, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("imagecorruptions")
    config = array_config(runs, tiny_sample)
    pieces = [str(piece).rpartition("/")[2] for piece in pieces_of(config)]
    assert pieces == [
        f"{run} {work}" for run in "ab" for work in ("knn", "imagenet_c gaussian_noise", "imagenet_c fog")
    ]
    run_share(replace(config, task=1, num_tasks=4))  # gaussian noise on a, fog on b
    assert "imagenet_c/gaussian_noise/top1" in metrics(runs[0]) and "imagenet_c/fog/top1" not in metrics(runs[0])
    assert "imagenet_c/fog/top1" in metrics(runs[1]) and "knn/top1" not in metrics(runs[1])
    said = describe_share(config)[1:]
    assert [line.endswith(": finished") for line in said] == [False, True, False, False, False, True]
    kept = stamps(runs[0])
    run_share(config)
    assert {name: stamp for name, stamp in stamps(runs[0]).items() if name in kept} == kept
    for run in runs:
        found = metrics(run)
        assert {"imagenet_c/gaussian_noise/top1", "imagenet_c/fog/top1", "knn/top1"} <= found.keys()
        protocol = RunFolder(run).read_summary()["protocols"]["imagenet_c"]
        assert not protocol["complete"] and len(protocol["missing"]) == 13 and "imagenet_c/mce" not in found
        assert "imagenet_c/partial_mean_top1" in found
    monkeypatch.setattr(shared_work, "probe_run", lambda probe: pytest.fail(f"{probe.evaluators} is done again"))
    run_share(config)
    assert "0 of this task's 3 pieces are to be done" in capsys.readouterr().out


def test_the_result_is_that_of_one_probe(runs: list[Path], tiny_sample: TinySample) -> None:
    pytest.importorskip("imagecorruptions")
    config = array_config(runs[:1], tiny_sample)
    for task in (2, 0, 1):
        run_share(replace(config, task=task, num_tasks=3))
    whole = tiny_probe(runs[1], tiny_sample, evaluators="knn,imagenet_c", corruptions=config.corruptions)
    probe_run(whole)
    assert metrics(runs[0]) == metrics(runs[1])


def test_other_options_or_weights_are_other_work(runs: list[Path], tiny_sample: TinySample, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("one")
    config = array_config(runs[:1], tiny_sample, evaluators="knn", finetune=FinetuneConfig(lists=[file]))
    run_share(config)
    assert describe_share(config)[1].endswith(": finished")
    assert describe_share(replace(config, batch_size=7))[1].endswith(": finished")
    assert describe_share(replace(config, knn=KnnConfig(k=3)))[1].endswith(": to be done")
    assert describe_share(replace(config, train=tiny_sample.val))[1].endswith(": to be done")
    file.write_text("two")
    assert describe_share(config)[1].endswith(": to be done")


def test_numbers_never_stand_under_the_options_of_others(runs: list[Path], tiny_sample: TinySample) -> None:
    """Options A, then B, then A again; a single probe with others in between; and a merge that comes too late."""
    pytest.importorskip("imagecorruptions")
    first = array_config(runs[:1], tiny_sample, corruptions=CorruptionConfig(names=["contrast"], severities=[1]))
    second = replace(first, seed=1, crop=0.5, knn=KnnConfig(k=3))

    def state() -> tuple[dict[str, float], dict[str, Any]]:
        summary = RunFolder(runs[0]).read_summary()
        return summary["metrics"], summary["protocols"]

    run_share(first)
    ours = state()
    run_share(second)
    assert state()[1]["imagenet_c"]["seed"] == 1 and state()[0] != ours[0]
    assert [line.endswith(": to be done") for line in describe_share(first)[1:]] == [True, True]
    theirs = state()
    shared_work.SharedRun(first, runs[0]).merge("imagenet_c")
    assert state() == theirs
    run_share(first)
    assert state() == ours and all(line.endswith(": finished") for line in describe_share(first)[1:])
    probe_run(tiny_probe(runs[0], tiny_sample, evaluators="knn", knn=KnnConfig(k=3)))
    assert [line.endswith(": to be done") for line in describe_share(first)[1:]] == [True, False]
    run_share(first)
    assert state() == ours


def test_a_run_that_cannot_be_evaluated_leaves_the_others_their_turn(
    runs: list[Path], tiny_sample: TinySample, tmp_path: Path
) -> None:
    config = array_config([tmp_path / "none", runs[0]], tiny_sample, evaluators="knn")
    with pytest.raises(InputError, match="none"):
        run_share(config)
    assert "knn/top1" in metrics(runs[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "timm:resnet18"}, "for a single probe"),
        ({"keep_cache": False}, "share the kept features"),
        ({"evaluators": "knm"}, "did you mean 'knn'"),
        ({"task": 3, "num_tasks": 3}, "tasks count from 0"),
    ],
)
def test_what_an_array_cannot_do_is_refused(
    runs: list[Path], tiny_sample: TinySample, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_share(array_config(runs, tiny_sample, **changes))


def test_tasks_are_slurms_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert array_task(None, None) == (0, 1)
    for name, value in (("ID", 7), ("MIN", 3), ("STEP", 2), ("COUNT", 4)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert array_task(None, None) == (2, 4)
    assert array_task(None, 16) == (7, 16)
    assert array_task(1, 2) == (1, 2)


def test_a_killed_task_is_made_good_by_the_same_line(cluster: Cluster, tiny_sample: TinySample, tmp_path: Path) -> None:
    pytest.importorskip("imagecorruptions")
    run, twin = (write_run(tmp_path / name, tiny_sample).path for name in ("run", "twin"))
    probe = {
        "train": str(tiny_sample.train), "val": str(tiny_sample.val), "num_workers": 0, "evaluators": "knn,imagenet_c",
        "linear": {"epochs": 10, "rates": [0.1]}, "knn": {"k": 5}, "corruptions": {"names": NAMES},
        "load": {"image_size": 96},
    }  # fmt: skip
    options = tmp_path / "probe.yaml"
    options.write_text(yaml.safe_dump(probe))
    line = [f"--array=0-{NUM_TASKS - 1}", "--cpus-per-task=1", REPOSITORY / "slurm" / "evaluate.sbatch"]
    line += ["--config", options, "--runs", f"[{run}]"]
    job = cluster.submit(*line)
    _kill(cluster, job, task=2, run=run)  # zoom blur, the slowest, and elastic transform
    cluster.wait(job, timeout=120)
    kept = stamps(run)
    assert 0 < len(kept) < 5 * len(NAMES), f"the killed task must have left errors unmeasured\n{cluster.logs(job)}"
    summary = RunFolder(run).read_summary()
    assert not summary["protocols"]["imagenet_c"]["complete"] and "imagenet_c/mce" not in summary["metrics"]

    again = cluster.submit(*line)
    cluster.wait(again, timeout=120)
    assert len(stamps(run)) == 5 * len(NAMES), cluster.logs(again)
    assert {name: stamp for name, stamp in stamps(run).items() if name in kept} == kept
    logs = cluster.logs(again)
    assert logs.count("0 of this task's") == NUM_TASKS - 1 and "PARTIAL, 50 of 75 missing" in logs, logs
    whole = array_config([twin], tiny_sample)
    run_share(replace(whole, corruptions=CorruptionConfig(names=NAMES), load=replace(whole.load, image_size=96)))
    assert metrics(run) == metrics(twin)


def _kill(cluster: Cluster, job: int, *, task: int, run: Path) -> None:
    """SIGKILL a task once it has kept its first error: its first corruption is the one with the task's own number."""
    deadline = time.monotonic() + 90
    while not any(name.startswith(f"{NAMES[task - 1]}-") for name in stamps(run)):
        assert time.monotonic() < deadline, f"task {task} kept nothing\n{cluster.states(job)}\n{cluster.logs(job)}"
        time.sleep(0.01)
    cluster.call("scancel", "--signal=KILL", "--full", f"{job}_{task}")
