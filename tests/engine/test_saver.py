"""Checkpoints that cannot be written: said once, the older one kept, and again when they can be."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import engine.saver
from engine import files
from engine.checkpoint import Retention, clear_leftovers, list_checkpoints, load_checkpoint, save_checkpoint, step_of
from engine.errors import InputError
from engine.runs import RunFolder
from engine.saver import Saver
from engine.tracking import Tracker
from tests.pretrain.runs import pretrain

Trouble = Callable[[Path], AbstractContextManager[None]]
TENSORS = {"model": {"w": torch.zeros(1 << 18)}}  # 1 MiB


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """`folder` on a file system without room; where none can be mounted, files that may not grow."""
    filler = folder / "filler"
    if os.path.ismount(folder):
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 14))
        yield
        filler.unlink()
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """`folder` as it is when its file system was remounted without the right to write."""
    if os.path.ismount(folder):
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        return
    folder.chmod(0o500)
    yield
    folder.chmod(0o700)


@contextmanager
def vanished(folder: Path) -> Iterator[None]:
    """The checkpoints' folder is not there."""
    os.rename(folder / "checkpoints", folder / "away")
    yield
    assert not (folder / "checkpoints").exists()  # a folder made anew would hide the one that comes back
    os.rename(folder / "away", folder / "checkpoints")


@contextmanager
def stale(folder: Path) -> Iterator[None]:
    """The server has lost `folder`: whatever is asked about what is in it, the answer is ESTALE."""

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(path: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(path, str | os.PathLike) and folder in Path(path).parents:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return function(path, *arguments, **named)

        return ask

    asked: dict[str, Any] = {
        name: refusing(getattr(os, name)) for name in ("stat", "lstat", "scandir", "listdir", "mkdir", "rename")
    }
    with mock.patch.multiple(os, **asked):
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, or a plain folder where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    yield folder
    if mounted.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)
    folder.chmod(0o700)


def skip_where_root_writes_anyway(trouble: object, folder: Path) -> None:
    """Root writes whatever the mode of a folder says."""
    if trouble is read_only and os.geteuid() == 0 and not os.path.ismount(folder):
        pytest.skip("root may write everywhere, and no file system can be mounted here")


@contextmanager
def hanging(folder: Path) -> Iterator[None]:
    """Writes that do not end, as on a hard-mounted file system whose server is gone."""
    never = mock.Mock(side_effect=lambda *arguments, **named: time.sleep(1000))
    with mock.patch.multiple(engine.saver, NEXT_S=0.2, LAST_S=0.4, save_checkpoint=never):
        yield


@dataclass(frozen=True)
class From:
    """A trouble with the disk that begins right before the save of a step and stays; tells when the state is copied."""

    trouble: Trouble
    folder: Path
    step: int

    def __call__(self) -> None:
        import engine.training as module

        save, copy, trouble = module.Training.save, module.model_state, self.trouble(self.folder)

        def troubled(training: module.Training, step: int, **named: Any) -> None:
            if step == self.step:
                assert training.saver is not None
                training.saver.wait()
                trouble.__enter__()
            save(training, step, **named)

        def told(*arguments: Any, **named: Any) -> Any:
            sys.stdout.write("state copied\n")
            return copy(*arguments, **named)

        module.Training.save, module.model_state = troubled, told  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("trouble", [full_disk, read_only, vanished, stale])
def test_the_training_goes_on_and_hears_of_it_once(disk: Path, trouble: Trouble) -> None:
    skip_where_root_writes_anyway(trouble, disk)
    checkpoints = disk / "checkpoints"
    checkpoints.mkdir()
    said: list[str] = []
    saver = Saver(checkpoints, Retention(last=1), report=said.append)

    def save(step: int) -> str:
        saver.submit(step, TENSORS, {})
        failure = saver.wait()
        saver.poll()
        saver.poll()
        return failure

    assert save(1) == "" and said == []
    with trouble(disk):
        assert "step 2" in save(2) and "step 3" in save(3)
        assert len(said) == 1 and "the training goes on" in said[0] and "step 2 could not be written" in said[0]
        known: dict[Trouble, str] = {vanished: "no complete one is there", stale: "are there cannot be read"}
        assert known.get(trouble, "the newest complete one is of step 1") in said[0]
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-000000001"]
    assert load_checkpoint(list_checkpoints(checkpoints)[0])[0] == 1
    assert save(4) == "" and len(said) == 2 and "can be written again" in said[1]
    assert [path.name for path in checkpoints.iterdir()] == ["step-000000004"]  # no rest of the failed ones


class Hanging:
    """A save that hangs until it is `released`, and then succeeds or fails as it would have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released, self.calls = threading.Event(), 0
        self._save = engine.saver.save_checkpoint
        monkeypatch.setattr(engine.saver, "save_checkpoint", self)

    def __call__(self, *arguments: Any, **named: Any) -> Path:
        self.calls += 1
        assert self.released.wait(60)
        return self._save(*arguments, **named)


def test_saves_are_skipped_while_one_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Hanging(monkeypatch)
    monkeypatch.setattr(engine.saver, "NEXT_S", 0.01)
    monkeypatch.setattr(engine.saver, "LAST_S", 0.02)
    said: list[str] = []
    saver = Saver(tmp_path, Retention(last=1), report=said.append)
    assert saver.hindrance() == ""
    saver.submit(1, TENSORS, {})
    for _ in range(3):
        assert "step 1 is still being written" in saver.hindrance()
        saver.poll()
    assert len(said) == 1 and "saves are skipped until that one is done" in said[0]
    assert "step 1 is still" in saver.hindrance(last=True) and "step 1 is still" in saver.wait()
    assert len(said) == 3 and all("waiting for it" in line for line in said[1:])
    hanging.released.set()
    monkeypatch.setattr(engine.saver, "LAST_S", 60.0)
    assert saver.hindrance(last=True) == saver.wait() == ""
    saver.poll()
    assert "can be written again: the newest complete one is of step 1" in said[-1]
    saver.submit(2, TENSORS, {})
    assert saver.wait() == "" and [step_of(path) for path in list_checkpoints(tmp_path)] == [2] and hanging.calls == 2


def test_metrics_do_not_wait_for_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HANG_S", 0.01)
    run = RunFolder(tmp_path)
    os.mkfifo(run.metrics_file)  # opening it waits for a reader
    for step in (1, 2):
        run.log({"a": 1.0}, step=step)
    assert [json.loads(line)["step"] for line in run.unwritten] == [1, 2]
    reader = os.open(run.metrics_file, os.O_RDONLY)  # lets it open; it cannot be written to as a file can
    run.metrics_file.unlink()
    os.close(reader)
    monkeypatch.undo()
    run.flush()
    assert [line["step"] for line in run.metrics()] == [1, 2] and not run.unwritten


def test_metrics_wait_for_a_disk_with_room(disk: Path) -> None:
    run = RunFolder(disk)
    run.log({"a": 1.0}, step=1)
    with full_disk(disk):
        if os.path.ismount(disk):
            for step in range(2, 500):  # more than the rest of a block
                run.log({"a": 1.0}, step=step)
            assert run.unwritten
    run.log({"a": 1.0}, step=500)
    steps = [line["step"] for line in run.metrics()]
    assert steps == (list(range(1, 501)) if os.path.ismount(disk) else [1, 500]) and not run.unwritten


@pytest.mark.parametrize("what", ["log", "finish"])
def test_wandb_without_room_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    wandb = pytest.importorskip("wandb")
    refusing = mock.Mock(**{f"{what}.side_effect": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))})
    monkeypatch.setattr(wandb, "init", lambda **options: refusing)
    run = RunFolder(tmp_path)
    tracker = Tracker(run, backend="wandb", project="p", config={})
    tracker.log({"a": 1.0}, step=1)
    tracker.images("pictures", [np.zeros((4, 4, 3), np.uint8)], captions=["one"], step=1)
    tracker.finish()
    assert refusing.log.call_count == 2 and refusing.finish.call_count == 1
    assert [line["a"] for line in run.metrics()] == [1.0]


REASONS: dict[Trouble, str] = {
    full_disk: "No space left|too large",
    read_only: "Read-only|denied",
    hanging: "still being written",
}


@pytest.mark.parametrize("trouble", REASONS)
def test_a_training_goes_on_to_its_end_and_fails_at_its_last_save_alone(
    student_config: Callable[..., Path], disk: Path, tmp_path: Path, trouble: Trouble
) -> None:
    skip_where_root_writes_anyway(trouble, disk)
    run = tmp_path / "runs" / "student"
    run.mkdir(parents=True)
    (run / "checkpoints").symlink_to(disk)
    config = student_config(max_steps=8, loop__checkpoint_every=2, loop__keep_checkpoints=1)
    # where a write hangs, all ranks must skip the same saves
    ranks = 2 if trouble is hanging else 1
    output = pretrain(config, code=1, before=From(trouble, disk, step=4), world_size=ranks)
    assert output.count("the training goes on") == 1 and "Traceback" not in output
    assert output.index("step 4/8") < output.index("the training goes on") < output.index("step 8/8")
    marker = json.loads((run / "exit.json").read_text())
    assert marker["code"] == 1 and "the checkpoint of step 8 could not be written" in marker["reason"]
    assert re.search(REASONS[trouble], marker["reason"]) and f"failed: {marker['reason']}" in output
    assert [line["step"] for line in RunFolder(run).metrics()] == list(range(1, 9))
    (kept,) = list_checkpoints(run / "checkpoints")
    assert load_checkpoint(kept)[0] == 2
    # while a write goes on there is no second copy of the state
    assert output.count("state copied") == (2 if trouble is hanging else 4)


def test_retention_keeps_the_last_every_mth_and_the_best(tmp_path: Path) -> None:
    values = {1: 0.2, 2: 0.9, 3: 0.9, 4: 0.1, 5: 0.3, 6: 0.4}

    def kept(retention: Retention) -> list[int]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for step, value in values.items():
            state = {"metrics": {"knn": value}}
            save_checkpoint(folder, step=step, tensors={}, state=state, retention=retention)
        return [int(path.name[5:]) for path in list_checkpoints(folder)]

    assert kept(Retention(last=2)) == [5, 6]
    assert kept(Retention(last=1, every=2)) == [2, 4, 6]
    assert kept(Retention.parse(last=1, every=0, best="max:knn")) == [2, 6]  # the older of two equals
    assert kept(Retention.parse(last=1, every=3, best="min:knn")) == [3, 4, 6]
    assert kept(Retention.parse(last=1, every=0, best="max:absent")) == [6]
    for bad in ("knn", "best:knn", "max:"):
        with pytest.raises(InputError, match=r"loop\.keep_best"):
            Retention.parse(last=1, every=0, best=bad)


def test_what_a_kill_left_half_done_is_cleared(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=1, tensors=TENSORS, state={})
    for name in (".step-000000002.0123.tmp", ".step-000000000.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pt").write_bytes(b"x")
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
