"""The folder that `shards/pack.py` writes to: one pack owns it at a time."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from engine.errors import InputError
from engine.files import write_json
from shards.manifest import FILE_NAME
from shards.writer import remove_temporaries

WORK_FOLDER = ".packing"
POLL_S = 0.1
LOCK_WAIT_S = 5.0


@contextmanager
def exclusive(output: Path, plan_digest: str) -> Iterator[None]:
    """Own `output` while packing: one pack at a time, and only of the plan it was begun with.

    The lock is inherited by the packing processes, so it stays held until the last process of a killed pack is gone.

    What was written stays when the pack ends with an error, for the next one to go on. A finished set keeps no trace.

    Raises:
        InputError: the folder holds something else, another plan's unfinished pack, or is in use.
    """
    work = output / WORK_FOLDER
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file: give a folder as --output")
    if output.exists() and not work.is_dir() and not (output / FILE_NAME).exists():
        if any(output.glob("shard-*")):
            raise InputError(
                f"{output}: holds shards without {FILE_NAME}: put that back, or delete that folder and pack again"
            )
        if any(output.iterdir()):
            raise InputError(f"{output}: is not empty and holds no unfinished pack: choose another --output")
    with _lock(work):
        _claim(work / "plan.json", plan_digest, output)
        remove_temporaries(output)
        try:
            yield
        finally:
            if (output / FILE_NAME).exists():
                _tidy(work)


def _lock(work: Path) -> TextIO:
    """The lock file, locked. A pack that ended meanwhile may have deleted the one that was waited for: then anew."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while time.monotonic() < deadline:
        work.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError, BlockingIOError), ExitStack() as stack:
            lock = stack.enter_context(open(work / "lock", "w"))
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(work / "lock")):
                stack.pop_all()
                return lock
        time.sleep(POLL_S)
    raise InputError(f"{work.parent}: another process is packing into it: wait for it to end")


def _tidy(work: Path) -> None:
    """Delete the work folder; the lock last, as the next pack may take another one from then on."""
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink()
    (work / "lock").unlink()
    with suppress(OSError):  # the next pack is in it already
        work.rmdir()


def _claim(path: Path, plan_digest: str, output: Path) -> None:
    try:
        known = json.loads(path.read_bytes())["plan"]
    except FileNotFoundError:
        write_json(path, {"plan": plan_digest})
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: unreadable: delete the folder {output} and pack again") from error
    if known != plan_digest:
        raise InputError(
            f"{output}: holds an unfinished pack of other images or options: give the same ones to go on, choose "
            "another --output, or delete that folder"
        )
