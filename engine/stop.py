"""Stopping on request: a signal asks, the training loop answers at the next step."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Launchers pass a signal on that the scheduler has sent to every process already: one request, not two.
ONE_REQUEST_S = 5.0
# Longer than any step: until then the training has taken the worker's last batch and saved.
WORKER_GRACE_S = 120


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGUSR1 set a flag instead of ending the process.

    A SIGINT or SIGTERM more than five seconds after the first request ends the process at once, for whoever does not
    want to wait for the checkpoint. Inside another such context it shares that one's flag: a program asks for it first
    thing, so that a signal during its imports is not lost, and the training loop for those who call it directly.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has asked this process to stop; `reason` is its name."""
        return bool(self.reason)

    def __enter__(self) -> "StopRequest":
        owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if isinstance(owner, StopRequest):
            return owner
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.requested and time.monotonic() - self._since > ONE_REQUEST_S
        if again and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.requested:
            self._since = time.monotonic()
            self.reason = signal.Signals(number).name


def outlast_stop_signals(worker_id: int = 0) -> None:
    """For data-loader workers: a scheduler signals the whole process group, and the batch in flight must survive it.

    A worker asked by SIGTERM ends `WORKER_GRACE_S` later: a loader that is not read to its end terminates its workers
    that way when the program ends, and would wait for ever for one that never does.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE_S))
