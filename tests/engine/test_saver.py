"""Checkpoints that cannot be written: said once, the older one kept, and again when they can be."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.checkpoint import Retention, clear_leftovers, list_checkpoints, load_checkpoint, save_checkpoint
from engine.errors import InputError
from engine.runs import RunFolder
from engine.saver import Saver

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
    if os.geteuid() == 0:
        pytest.skip("root writes whatever the mode says, and no file system can be mounted here")
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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, or a plain folder where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    yield folder
    if mounted.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("trouble", [full_disk, read_only, vanished])
def test_the_training_goes_on_and_hears_of_it_once(disk: Path, trouble: Callable[[Path], object]) -> None:
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
    with trouble(disk):  # type: ignore[attr-defined]
        assert "step 2" in save(2) and "step 3" in save(3)
        assert len(said) == 1 and "the training goes on" in said[0] and "step 2 could not be written" in said[0]
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-000000001"]
    assert load_checkpoint(list_checkpoints(checkpoints)[0])[0] == 1
    assert save(4) == "" and len(said) == 2 and "can be written again" in said[1]
    assert [path.name for path in checkpoints.iterdir()] == ["step-000000004"]  # no rest of the failed ones


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
