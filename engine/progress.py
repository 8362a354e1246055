"""Progress on the terminal: a bar for the tools that count items, one line per report for training."""

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.pulse import PULSE

PLAIN_INTERVAL_S = 10.0


class ProgressBar:
    """Counts items with an estimate of the time left: a bar on a terminal, a plain line every 10 s in a log file.

    Args:
        total: items in all.
        label: what is written before the count.
        stream: None takes standard error.
        done: items of `total` that an earlier run finished: counted, and left out of the estimate.
    """

    def __init__(self, total: int, label: str, *, stream: TextIO | None = None, done: int = 0) -> None:
        self.total, self.label, self.done, self.count = total, label, done, done
        self._stream = stream or sys.stderr
        self._started = self._reported = time.monotonic()
        self._bar: Progress | None = None
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, *times, console=Console(file=self._stream))
            self._task = self._bar.add_task(label, total=total, completed=done, note="")
            self._bar.start()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, n: int = 1, **fields: object) -> None:
        """Count `n` more items; `fields` are shown behind the bar."""
        self.count += n
        PULSE.beat()
        note = " ".join(f"{name} {value}" for name, value in fields.items())
        if self._bar is not None:
            self._bar.update(self._task, advance=n, note=note)
        elif time.monotonic() - self._reported >= PLAIN_INTERVAL_S:
            self._reported = time.monotonic()
            self._write_line(note)

    def close(self) -> None:
        """Stop the bar; in a log file, write the final count."""
        if self._bar is not None:
            self._bar.stop()
        else:
            self._write_line("")

    def _write_line(self, note: str) -> None:
        elapsed = time.monotonic() - self._started
        timing = f"{elapsed:.1f} s"
        if self.done < self.count < self.total:
            timing += f", ETA {duration((self.total - self.count) * elapsed / (self.count - self.done))}"
        self._stream.write(f"{self.label}: {self.count}/{self.total} ({timing}) {note}".rstrip() + "\n")
        self._stream.flush()


def report(line: str) -> None:
    """Write one line for whoever watches the run; the only way training programs talk on stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def silent(line: str) -> None:
    """What the other ranks call instead of `report`."""


def duration(seconds: float) -> str:
    """Seconds as `1h02m`, `3m20s` or `12s`."""
    whole = int(max(seconds, 0))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def step_line(
    step: int,
    total: int,
    *,
    values: dict[str, float],
    step_seconds: float,
    images_per_second: float,
    data_wait: float,
) -> str:
    """One training report: step, percent, values, milliseconds per step, images/s, share of time waiting for data, ETA.

    Args:
        data_wait: share of the step spent waiting for the data loader, 0 to 1.
    """
    shown = " | ".join(f"{name} {value:.4g}" for name, value in values.items())
    return (
        f"step {step:0{len(str(total))}d}/{total} ({100 * step / max(total, 1):.0f}%) | {shown} | "
        f"dt {1000 * step_seconds:.0f}ms | {images_per_second:.0f} img/s | wait {100 * data_wait:.0f}% | "
        f"ETA {duration((total - step) * step_seconds)}"
    )
