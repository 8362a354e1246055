"""Writing checkpoints in a thread of its own while the training goes on, and going on when they cannot be written."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.checkpoint import Retention, list_checkpoints, save_checkpoint, step_of

Reporter = Callable[[str], None]


class Saver:
    """Writes one checkpoint at a time in the background. Only the first rank has one.

    A checkpoint that cannot be written (disk full, no rights, file system gone) does not stop the training: it is
    reported once, at the next step, as is the first that succeeds again.

    Args:
        directory: where the checkpoints are.
        report: writes one line for whoever watches; called from the training's thread alone.
    """

    def __init__(self, directory: Path, retention: Retention, *, report: Reporter) -> None:
        self.directory, self.retention, self.report = directory, retention, report
        self.failure = ""
        self._told = False
        self._thread: threading.Thread | None = None

    def submit(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Begin to write a checkpoint, after the one that is being written. Nobody may change `tensors` any more."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(step, tensors, state), name="checkpoint")
        self._thread.start()

    def wait(self, timeout: float | None = None) -> str:
        """Wait for the checkpoint that is being written, for at most `timeout` seconds.

        Returns:
            Why the last one could not be written, or an empty string.
        """
        if self._thread is not None:
            self._thread.join(timeout)
        return self.failure

    def poll(self) -> None:
        """Report a failure or a recovery, if one is new; the training calls it in every step."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread = None
        if self.failure and not self._told:
            self.report(f"{self.failure}; the training goes on, {self._newest()}, and every later save is tried")
        elif self._told and not self.failure:
            self.report(f"checkpoints can be written again: {self._newest()}")
        self._told = bool(self.failure)

    def _write(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        try:
            save_checkpoint(self.directory, step=step, tensors=tensors, state=state, retention=self.retention)
            self.failure = ""
        except Exception as error:  # whatever it is, it must not be lost with this thread
            reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{error!r}"
            self.failure = f"the checkpoint of step {step} could not be written to {self.directory} ({reason})"

    def _newest(self) -> str:
        steps = [step_of(path) for path in list_checkpoints(self.directory)]
        return f"the newest complete one is of step {steps[-1]}" if steps else "no complete one is there"
