"""Writing checkpoints in a thread of its own while the training goes on, and going on when they cannot be written."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from engine.checkpoint import Retention, list_checkpoints, save_checkpoint, step_of

Reporter = Callable[[str], None]

# A write that goes on for longer when the next one is due makes the training go on without that one.
NEXT_S = 60.0
# What the last write, or one on request, may take: tens of GB on a slow disk. A scheduler's grace may end it before.
LAST_S = 1800.0


class Saver:
    """Writes one checkpoint at a time in the background. Only the first rank has one.

    A checkpoint that cannot be written (disk full, no rights, file system gone) does not stop the training: it is
    reported once, at the next step, as is the first that succeeds again. Nor does a write that hangs, as on a file
    system whose server is gone: the saves that are due meanwhile are skipped. All that touches the disk is done in the
    thread, which does not keep the process from ending.

    Args:
        directory: where the checkpoints are.
        report: writes one line for whoever watches; called from the training's thread alone.
    """

    def __init__(self, directory: Path, retention: Retention, *, report: Reporter) -> None:
        self.directory, self.retention, self.report = directory, retention, report
        self.failure = ""
        self._newest = ""
        self._told: Literal["", "failed", "slow"] = ""
        self._step, self._begun = 0, 0.0
        self._thread: threading.Thread | None = None
        self._given_up: threading.Thread | None = None

    def hindrance(self, *, last: bool = False) -> str:
        """Wait until a checkpoint may be submitted: ask before the state is copied, so that no two copies are held.

        Waits for a minute, and no more for a write that took longer than that before; reports once that saves are
        skipped.

        Args:
            last: wait for half an hour instead: this one must not be skipped.

        Returns:
            Why it may not be submitted: an earlier one is still being written. An empty string if it may.
        """
        hangs = self._thread is not None and self._thread is self._given_up
        unfinished = self._unfinished(LAST_S if last else 0.0 if hangs else NEXT_S)
        if unfinished and not last:
            self._given_up = self._thread
            if self._told != "slow":
                self.report(f"{unfinished}; the training goes on, and saves are skipped until that one is done")
            self._told = "slow"
        self.poll()
        return unfinished

    def submit(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Begin to write a checkpoint; `hindrance` was empty. Nobody may change `tensors` any more."""
        assert self._thread is None or not self._thread.is_alive()
        self._step, self._begun = step, time.monotonic()
        # a daemon: a write that hangs must not keep the process, which waits for all others before it ends
        self._thread = threading.Thread(target=self._write, args=(step, tensors, state), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> str:
        """Wait for the checkpoint that is being written, for at most `timeout` seconds (half an hour).

        Returns:
            Why the last one is not there, or an empty string.
        """
        return self._unfinished(LAST_S if timeout is None else timeout) or self.failure

    def poll(self) -> None:
        """Report a failure or a recovery, if one is new; the training calls it in every step."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread = None
        if self.failure and self._told != "failed":
            self.report(f"{self.failure}; the training goes on, {self._newest}, and every later save is tried")
        elif self._told and not self.failure:
            self.report(f"checkpoints can be written again: {self._newest}")
        self._told = "failed" if self.failure else ""

    def _unfinished(self, timeout: float) -> str:
        """Wait for the write for at most `timeout` seconds; one line about it if it goes on even then."""
        thread = self._thread
        if thread is None:
            return ""
        thread.join(min(timeout, NEXT_S))
        if thread.is_alive() and timeout > NEXT_S:
            self.report(f"{self._progress()}: waiting for it, for {timeout / 60:.0f} minutes at most")
            thread.join(timeout - NEXT_S)
        return self._progress() if thread.is_alive() else ""

    def _progress(self) -> str:
        seconds = time.monotonic() - self._begun
        return f"the checkpoint of step {self._step} is still being written to {self.directory} after {seconds:.0f} s"

    def _write(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        failure = ""
        try:
            save_checkpoint(self.directory, step=step, tensors=tensors, state=state, retention=self.retention)
        except Exception as error:  # whatever it is, it must not be lost with this thread
            reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{error!r}"
            failure = f"the checkpoint of step {step} could not be written to {self.directory} ({reason})"
        self.failure = failure
        self._newest = _newest(self.directory)


def _newest(directory: Path) -> str:
    try:
        steps = [step_of(path) for path in list_checkpoints(directory)]
    except OSError:  # a file system that is gone may not even say that
        return "which complete ones are there cannot be read"
    return f"the newest complete one is of step {steps[-1]}" if steps else "no complete one is there"
