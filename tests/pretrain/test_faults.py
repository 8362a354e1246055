"""Faults in the middle of a training: whatever dies, the run ends as if nothing had happened, or says why it cannot."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import list_checkpoints, load_checkpoint
from shards.reader import ShardSet
from tests.conftest import TinySample
from tests.faults import At, BadGradient, BadLoss, Several, Vanish
from tests.forked import launch
from tests.pretrain.runs import pretrain, same_end, same_tree, start
from tests.tools import REPOSITORY, run_python


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Of the second save, with the first one to be removed after it. Its thread calls, in order: torch.save for model,
# optimiser and random states, fsync for the four files and two folders, rename of the new one, rename of the old one.
KILLS = {
    "before it": At("engine.saver.save_checkpoint", 2, thread="checkpoint"),
    "in the first file": At("torch.save", 4, thread="checkpoint"),
    "between files": At("torch.save", 5, thread="checkpoint"),
    "while flushing": At("os.fsync", 9, thread="checkpoint"),
    "before the rename": At("os.rename", 2, thread="checkpoint"),
    "before the old one goes": At("os.rename", 3, thread="checkpoint"),
    "while the old one goes": At("os.unlink", 1, thread="checkpoint"),
    "between steps": At("engine.loop._train_step", 6),
    "in the optimiser's step": At("engine.faults.StepGuard.finish", 6),
}


def test_killed_anywhere_ends_bit_equal(student_config: Callable[..., Path], tmp_path: Path) -> None:
    config = student_config(max_steps=8, loop__checkpoint_every=2, loop__keep_checkpoints=1, loop__num_workers=1)
    pretrain(config, "--run", "whole")
    for name, fault in KILLS.items():
        run = tmp_path / "runs" / name.replace(" ", "-").replace("'", "")
        pretrain(config, "--run", run.name, code=-signal.SIGKILL, before=fault)
        assert "resumed" in pretrain(config, "--run", run.name), name
        same_end(tmp_path / "runs" / "whole", run)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000008"], name


def test_one_of_two_ranks_killed_in_a_save_ends_bit_equal(student_config: Callable[..., Path], tmp_path: Path) -> None:
    config = student_config(max_steps=8, loop__checkpoint_every=2, loop__keep_checkpoints=1)
    pretrain(config, "--run", "whole", world_size=2)
    started = start(config, "--run", "parts", world_size=2, before=At("os.rename", 2, thread="checkpoint"))
    assert started.wait() == [-signal.SIGKILL, 1] and "rank 0 was lost" in started.output(1)
    assert "resumed" in pretrain(config, "--run", "parts", world_size=2)
    same_end(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")


def test_a_dead_worker_fails_the_run_which_goes_on_bit_equal(
    student_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = student_config(max_steps=8, loop__checkpoint_every=2, loop__num_workers=2)
    pretrain(config, "--run", "whole")
    # counted in each worker: the third batch of one of them
    output = pretrain(config, "--run", "parts", code=1, before=At("pretrain.data.ViewDataset.__getitems__", 3))
    assert "DataLoader worker" in output
    assert json.loads((tmp_path / "runs" / "parts" / "exit.json").read_text())["code"] == 1
    pretrain(config, "--run", "parts")
    same_end(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")


@pytest.mark.parametrize(
    ("fault", "survivor", "words"),
    [
        (signal.SIGKILL, 0, "rank 1 was lost after step"),
        (signal.SIGSTOP, 1, "rank 0 was lost after step"),
        ("hang", 0, "rank 1 (after step 4, in data) made no progress for 4 s"),
        ("fail", 0, "rank 1 failed after step 4: RuntimeError: a fault of the test"),
    ],
)
def test_the_others_stop_and_name_the_rank(
    student_config: Callable[..., Path], tmp_path: Path, fault: signal.Signals | str, survivor: int, words: str
) -> None:
    config = student_config(max_steps=5000, loop__rank_timeout=4)
    victim = 1 - survivor
    if isinstance(fault, str):
        before = At("pretrain.data.ViewDataset.__getitems__", 5, fault)
        started = start(config, world_size=2, before=before, only_rank=victim)
    else:
        started = start(config, world_size=2)
        started.wait_for("step 0006")
        started.signal(fault, rank=victim)
    begun = time.monotonic()
    started.processes[survivor].join(timeout=60)
    output, code = started.output(survivor), started.processes[survivor].exitcode
    started.kill()
    assert code == 1 and words in output, output[-3000:]
    assert "Traceback" not in output and time.monotonic() - begun < 60
    run = tmp_path / "runs" / "student"
    marker = json.loads((run / "exit.json").read_text())
    assert marker["code"] == 1 and words in marker["reason"]
    assert jsonl(run / "attempts.jsonl")[-1]["failed"] is True


def online_options(sample: TinySample, **changes: Any) -> dict[str, Any]:
    """kNN after every second step."""
    online = {"evaluators": "knn", "every_steps": 2, "options": {"knn.k": 5}, "val": str(sample.val)} | changes
    return {f"online__{name}": value for name, value in online.items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_or_signalled_during_an_online_evaluation(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path, ranks: int
) -> None:
    """In kNN's votes after step 4: rank 0 is killed and casts them again; the last rank is signalled and ends them."""
    config = student_config(max_steps=6, loop__checkpoint_every=1, **online_options(tiny_sample))
    pretrain(config, "--run", "whole", world_size=ranks)
    score = "pretrain.evaluators.knn.knn_scores"
    killed = start(config, "--run", "killed", world_size=ranks, before=At(score, 2))
    assert killed.wait() == [-signal.SIGKILL] + [1] * (ranks - 1)
    before = At(score, 2, signal.SIGUSR1)
    pretrain(config, "--run", "signalled", code=75, world_size=ranks, before=before, only_rank=ranks - 1)
    whole, *others = (tmp_path / "runs" / name for name in ("whole", "killed", "signalled"))
    votes = [[line for line in jsonl(run / "metrics.jsonl") if "online/knn/top1" in line] for run in (whole, *others)]
    assert [[line["step"] for line in each] for each in votes] == [[2, 4, 6], [2], [2, 4]]
    for run in others:
        assert "resumed" in pretrain(config, "--run", run.name, world_size=ranks)
        same_end(whole, run)
        assert [line for line in jsonl(run / "metrics.jsonl") if "online/knn/top1" in line] == votes[0]


def test_a_rank_that_hangs_inside_an_evaluation_is_named(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path
) -> None:
    """Rank 1 hangs in kNN's votes; rank 0 waits for it in the next evaluator's first exchange, no longer than said."""
    online = online_options(tiny_sample, evaluators="knn,alignment", gaze=str(tiny_sample.gaze))
    config = student_config(loop__rank_timeout=4, **online)
    before = At("pretrain.evaluators.knn.knn_scores", 1, "hang")
    started = start(config, world_size=2, before=before, only_rank=1)
    started.processes[0].join(timeout=240)
    output, code = started.output(0), started.processes[0].exitcode
    started.kill()
    words = "rank 1 (after step 2, in evaluator knn) made no progress for 4 s while 1 of the others waited"
    assert code == 1 and words in output and "Traceback" not in output, output[-3000:]
    assert words in json.loads((tmp_path / "runs" / "student" / "exit.json").read_text())["reason"]


@pytest.mark.parametrize(
    ("ranks", "zero", "fused"),
    [(1, 0, True), (1, 0, False), (2, 0, False), (2, 1, False), (2, 2, False), (2, 3, False)],
)
def test_a_loss_or_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path, ranks: int, zero: int, fused: bool
) -> None:
    """Weights and optimiser after skipped steps are those before them; their samples are noted, and they are counted.

    The loss of step 3 is infinite, its gradient is not; the gradient of step 4 is NaN, its loss is not.
    """
    # without batch norm, whose statistics follow every forward
    changes = {"model__backbone": "test_vit", "model__head_norm": "none", "optim__fused": fused}
    config = student_config(max_steps=4, loop__checkpoint_every=2, **changes)
    faults = Several((BadLoss((3,)), BadGradient((4,))))
    output = pretrain(config, world_size=ranks, zero=zero, before=faults, only_rank=ranks - 1)
    assert f"step 3 skipped: the loss of rank {ranks - 1} is not finite" in output
    assert "step 4 skipped: the gradient is not finite" in output
    run = tmp_path / "runs" / "student"
    (_, one, _), (_, other, state) = (load_checkpoint(path) for path in list_checkpoints(run / "checkpoints"))
    assert same_tree(one["model"], other["model"]) and same_tree(one["optimizer"], other["optimizer"])
    assert state["extra"]["num_skipped"] == 2
    lines, shards = jsonl(run / "bad_batches.jsonl"), ShardSet(tiny_sample.train)
    assert [(line["step"], line["ranks"]) for line in lines] == [(3, [ranks - 1]), (4, [])]
    for line in lines:
        assert len(line["positions"]) == 12
        assert line["keys"] == [shards.key(shard, row) for _, shard, row in line["positions"]]
    assert [entry["train/skipped"] for entry in jsonl(run / "metrics.jsonl")] == [0, 0, 1, 2]


def test_too_many_skipped_steps_stop_and_can_be_looked_at(student_config: Callable[..., Path], tmp_path: Path) -> None:
    config = student_config(max_steps=9, loop__max_skipped=2, loop__checkpoint_every=2)
    output = pretrain(config, code=1, before=BadLoss((3, 5, 6)))
    assert "not finite in 2 steps in a row" in output and "Traceback" not in output
    run = tmp_path / "runs" / "student"
    assert [line["step"] for line in jsonl(run / "bad_batches.jsonl")] == [3, 5, 6]
    assert list_checkpoints(run / "checkpoints")[-1].name == "step-000000004"
    again = run_python(REPOSITORY / "pretrain" / "replay.py", "--run", run, "--step", 6)
    assert again.returncode == 0 and "12 samples, weights of step 4" in again.stdout, again.stderr
    assert "gradient norm: " in again.stdout and "not finite" not in again.stdout  # the fault is not in the samples


def test_three_deaths_at_one_step_end_the_crash_loop(student_config: Callable[..., Path], tmp_path: Path) -> None:
    config = student_config(max_steps=9, loop__checkpoint_every=2)
    for call in (6, 2):  # counted from the start of each process: always step 5
        pretrain(config, code=1, before=At("engine.loop._train_step", call, "fail"))
    pretrain(config, code=-signal.SIGKILL, before=At("engine.loop._train_step", 2))
    refused = pretrain(config, code=2)
    run = tmp_path / "runs" / "student"
    assert "all died at step 5" in refused and "a fault of the test" in refused and "killed without a word" in refused
    assert "--loop.ignore_failures true" in refused and refused.count("\n") == 1
    assert json.loads((run / "exit.json").read_text())["code"] == 2
    pretrain(config, "--loop.ignore_failures", "true")
    assert jsonl(run / "attempts.jsonl")[-1] == {"attempt": 4, "end": 9, "cause": "done", "failed": False}


def test_a_vanished_folder_does_not_stop_the_training_until_its_end(
    student_config: Callable[..., Path], tmp_path: Path
) -> None:
    """The checkpoint folder is gone from step 4 on, as an unmounted file system is."""
    config = student_config(max_steps=9, loop__checkpoint_every=2)
    output = pretrain(config, code=1, before=Vanish("checkpoints", save=2))
    assert output.count("could not be written to") == 2 and "Traceback" not in output  # said once, and at the end
    assert output.index("step 4/9") < output.index("the training goes on") < output.index("step 9/9")
    assert "failed: the checkpoint of step 9 could not be written" in output
    run = tmp_path / "runs" / "student"
    assert not (run / "encoder").exists() and json.loads((run / "exit.json").read_text())["code"] == 1
    os.rename(run / "checkpoints.away", run / "checkpoints")
    assert "after step 2 of 9" in pretrain(config)


def test_killed_or_signalled_during_an_evaluation(tiny_sample: TinySample, tmp_path: Path) -> None:
    """The teacher's validation is one: it is finished before a stop is answered, and done again after a kill."""
    options = {
        "runs": tmp_path / "runs", "data.train": tiny_sample.gaze, "data.val": tiny_sample.gaze, "max_steps": 6,
        "validate_every": 0.4, "data.batch_size": 10, "data.image_size": "[32,48]", "model.backbone": "test_resnet",
        "loop.num_workers": 0, "loop.tracker": "none", "loop.log_every": 1, "loop.checkpoint_every": 1,
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in options.items()]

    def teach(run: str, before: At | None = None) -> tuple[int, str]:
        main = REPOSITORY / "teacher" / "main.py"
        started = launch(main, *words, "--run", run, logs=tmp_path / "logs", before=before)
        return started.wait()[0], started.output()

    assert teach("whole")[0] == 0
    score = "teacher.validation.Validation.score"
    assert teach("killed", At(score, 4))[0] == -signal.SIGKILL  # the save of step 2 is complete by then
    code, output = teach("signalled", At(score, 2, signal.SIGUSR1))
    assert code == 75 and "(SIGUSR1)" in output
    whole, *others = (tmp_path / "runs" / name for name in ("whole", "killed", "signalled"))
    for run in others:
        code, output = teach(run.name)
        assert code == 0 and "resumed" in output, output
        one, other = (load_checkpoint(list_checkpoints(r / "checkpoints")[-1]) for r in (whole, run))
        assert same_tree(one[1], other[1]) and one[2] == other[2]
        validated = [[line for line in jsonl(r / "metrics.jsonl") if "val/kld" in line] for r in (whole, run)]
        assert validated[0] == validated[1] and len(validated[0]) > 3
