"""What the batch scripts ask before and after a training: where its run lies, and whether to run the job again.

python engine/requeue.py locate pretrain/main.py --config configs/pretrain/demo.yaml
python engine/requeue.py judge runs/demo-attention 1
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.attempts import EXIT_FILE
from engine.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, InputError
from engine.files import append_lines, read_lines
from engine.resolve import resolve, run_folder

FAILURES = "failures.jsonl"
MAX_FAILURES = 3  # in a row that came to nothing


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job whose ranks have ended.

    Attributes:
        code: exit code for the job; 75 asks for a requeue.
        line: the reason, for the job's log.
    """

    code: int
    line: str


def judge(folder: Path, status: int) -> Verdict:
    """Decide after a training step of a job has ended; a failure is written down in the run's folder.

    A run that stopped on request (75) is requeued, one with bad input (2) is not. A failure is requeued as well: most
    failures of large jobs are of machines. No crash loop comes of it: a training that died three times at one step
    refuses to start a fourth time, as bad input, with its diagnosis (`engine.attempts`); and here the third failure in
    a row ends the job if in the meantime no attempt began and no checkpoint was written.

    Args:
        folder: the run's folder; its `exit.json`, if there is one, must have been written by this part of the run.
        status: exit status of the launchers, 0 only if all of them ended well.
    """
    marker = _read_marker(folder)
    code = EXIT_DONE if status == 0 else int(marker.get("code", EXIT_FAILED)) or EXIT_FAILED
    reason = str(marker.get("reason") or f"the launchers ended with status {status} and the run left no {EXIT_FILE}")
    if code == EXIT_DONE:
        return Verdict(code, "done")
    if code in (EXIT_REQUEUE, EXIT_BAD_INPUT):
        return Verdict(code, reason)
    count = _count_failure(folder, reason=reason)
    if count < MAX_FAILURES:
        return Verdict(EXIT_REQUEUE, f"failed, to be tried again: {reason}")
    return Verdict(EXIT_FAILED, f"gave up after {count} failures in a row that came to nothing: {reason}")


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        marker = json.loads((folder / EXIT_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _progress(folder: Path) -> list[Any]:
    """What changes whenever an attempt has come to something: its number, and the newest checkpoint."""
    begun = max((line["attempt"] for line in read_lines(folder / "attempts.jsonl")), default=0)
    return [begun, max((path.name for path in (folder / "checkpoints").glob("step-*")), default="")]


def _count_failure(folder: Path, *, reason: str) -> int:
    """Write the failure down; how many there have been in a row without progress in between."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = _progress(folder)
    append_lines(folder / FAILURES, json.dumps({"progress": progress, "reason": reason}))
    count = 0
    for line in read_lines(folder / FAILURES):
        count = count + 1 if line["progress"] == progress else 0
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two commands; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    locate = commands.add_parser("locate", help="print the run folder of a program's command line")
    locate.add_argument("program", type=Path, help="file of the program")
    locate.add_argument("words", nargs=argparse.REMAINDER, help="its options")
    judged = commands.add_parser("judge", help="leave with the job's exit code; 75 asks for a requeue")
    judged.add_argument("folder", type=Path, help="the run's folder")
    judged.add_argument("status", type=int, help="exit status of the launchers")
    options = parser.parse_args(argv)
    if options.command == "judge":
        verdict = judge(options.folder, options.status)
        sys.stderr.write(f"{options.folder.name}: {verdict.line}\n")
        return verdict.code
    try:
        sys.stdout.write(f"{run_folder(resolve(options.program, options.words))}\n")
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_INPUT
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
