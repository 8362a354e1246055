"""What became of a run's processes: the attempts so far, and the exit code of the last one for batch scripts.

`attempts.jsonl` has a line when an attempt starts and one when it ends; a process that is killed leaves only the first.
`exit.json` is `{"code", "reason", "step"}` of the newest end, and absent while the run goes on: launchers
such as `accelerate launch` turn every code but 0 into 1, so batch scripts read it here.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.files import append_lines, give_time, read_lines, write_json

EXIT_FILE = "exit.json"
MAX_FAILURES = 3
UNKNOWN_CAUSE = "killed without a word (out of memory, a lost node, a time limit?)"


class Attempts:
    """The attempts of one run; rank 0 alone writes."""

    def __init__(self, run: Path) -> None:
        self.path = run / "attempts.jsonl"

    def begin(self, step: int, *, last_logged: int, ignore_failures: bool) -> None:
        """Note that an attempt starts from `step`, unless the last ones all died at one place.

        Args:
            last_logged: last step in metrics.jsonl: how far a process that was killed had come.

        Raises:
            InputError: the last three attempts died at the same step.
        """
        attempts = self._read()
        if attempts and "end" not in attempts[-1]:  # it cannot speak any more: what is known is noted for it
            attempts[-1] |= {"end": max(last_logged, attempts[-1]["start"]), "cause": UNKNOWN_CAUSE, "failed": True}
            self._append({k: attempts[-1][k] for k in ("attempt", "end", "cause", "failed")})
        failed = attempts[-MAX_FAILURES:]
        steps = {attempt["end"] for attempt in failed if attempt["failed"]}
        same = len(failed) == MAX_FAILURES and all(a["failed"] for a in failed) and len(steps) == 1
        if same and not ignore_failures:
            causes = "; ".join(f"{a['attempt']}: {a['cause']}" for a in failed)
            raise InputError(
                f"the last {MAX_FAILURES} attempts of {self.path.parent} all died at step {steps.pop()} ({causes}): "
                f"mend the cause, then start once with --loop.ignore_failures true"
            )
        self._append({"attempt": len(attempts) + 1, "start": step, "time": time.time(), "job": _job()})

    def end(self, step: int, *, cause: str, failed: bool) -> None:
        """Note that the attempt ended after `step`; a stop on request has not failed."""

        def write() -> None:
            with suppress(OSError):
                number = max((line["attempt"] for line in read_lines(self.path)), default=0)
                self._append({"attempt": number, "end": step, "cause": cause, "failed": failed})

        give_time(write)  # what ends the attempt may be the file system itself

    def _read(self) -> list[dict[str, Any]]:
        attempts: dict[int, dict[str, Any]] = {}
        for line in read_lines(self.path):
            attempts.setdefault(line["attempt"], {}).update(line)
        return list(attempts.values())

    def _append(self, line: dict[str, Any]) -> None:
        append_lines(self.path, json.dumps(line))


def write_exit(run: Path, code: int, *, reason: str) -> None:
    """Leave `exit.json` in a run folder that exists; never fails nor hangs, since the program is ending already."""

    def write() -> None:
        ends = [line["end"] for line in _lines_or_none(run / "attempts.jsonl") if "end" in line]
        with suppress(OSError):
            if run.is_dir():
                write_json(run / EXIT_FILE, {"code": code, "reason": reason, "step": ends[-1] if ends else None})

    give_time(write)


def clear_exit(run: Path) -> None:
    """Remove the `exit.json` of an earlier attempt: from now on, its absence says that nobody could write one."""
    with suppress(OSError):
        (run / EXIT_FILE).unlink(missing_ok=True)


def describe(error: BaseException | None) -> str:
    """First line of an error, with its type; "done" for none."""
    if error is None:
        return "done"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:500]


def _lines_or_none(path: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        return list(read_lines(path))
    return []


def _job() -> str | None:
    """Slurm's number of this job, by which its log is found."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
