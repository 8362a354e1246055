"""Stopping on request: a signal asks, the training loop answers at the next step."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGUSR1 set a flag instead of ending the process.

    A second SIGINT or SIGTERM ends the process at once, for whoever does not want to wait for the checkpoint.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
        self.reason = signal.Signals(number).name


def ignore_stop_signals(worker_id: int = 0) -> None:
    """For data-loader workers: a scheduler signals the whole process group, and the batch in flight must survive it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
