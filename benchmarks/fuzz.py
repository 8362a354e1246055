"""Damaged files of every kind that is read, by the hundred thousand: `python benchmarks/fuzz.py`.

Archives, indices and manifests, 100,000 of them together, and as many of each of images, maps, objects and lists of bad
samples.

Each case is made from its number, read in a process of its own kind, and may end quietly or in one of our own errors.
Anything else is a foreign error; a case that takes longer than the limit is a hang; a process that dies is counted too.
The damage is that of tests/shards, which run a small number of the same cases.
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import environment, report

from engine.progress import ProgressBar
from tests.shards.damage import TARGETS, SeededChance

BATCH = 500
SEED_STRIDE = 1_000_003
NUM_SHOWN = 10


class Runner:
    """A process that works through cases; replaced when it hangs or dies."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("fork")
        self.start()

    def start(self) -> None:
        """Start, or start again."""
        self.connection, other = self.context.Pipe()
        self.at = self.context.Value("q", -1)
        self.process = self.context.Process(target=_work, args=(other, self.at), daemon=True)
        self.process.start()
        other.close()

    def stop(self) -> None:
        """End the process whatever it is doing."""
        self.process.kill()
        self.process.join()

    def run(self, target: int, first: int, last: int, *, limit_s: float) -> tuple[int, list[str], str | None]:
        """Run cases `first` to `last - 1`; how many were done, their faults, and how the next one hung or died."""
        self.connection.send((target, first, last))
        at, since, how = -1, time.monotonic(), ""
        while not how:
            if self.connection.poll(0.2):
                try:
                    return last - first, self.connection.recv(), None
                except EOFError:
                    self.process.join()
                    how = f"the process ended with {self.process.exitcode}"
            elif self.at.value != at:
                at, since = self.at.value, time.monotonic()
            elif time.monotonic() - since > limit_s:
                how = f"not done in {limit_s:g} s"
        at = max(first, self.at.value)
        self.stop()
        self.start()
        return at - first + 1, [], f"{TARGETS[target].name} case {at}: {how}"


def _work(connection: Any, at: Any) -> None:
    # The image libraries' own complaints about each case; what matters comes back as faults.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        number, first, last = connection.recv()
        target, faults = TARGETS[number], []
        for case in range(first, last):
            at.value = case
            fault = target.fault_of(target.make(SeededChance(case * len(TARGETS) + number + SEED_STRIDE)))
            if fault is not None:
                faults.append(f"{target.name} case {case}: {fault}")
        connection.send(faults)


def run(num_cases: int, *, minutes: float, limit_s: float) -> tuple[dict[str, int], list[str], list[str]]:
    """Cases done of each target, foreign errors, and hangs or deaths."""
    done = dict.fromkeys((target.name for target in TARGETS), 0)
    faults: list[str] = []
    hangs: list[str] = []
    each, deadline = -(-num_cases // len(TARGETS)), time.monotonic() + 60 * minutes
    runner = Runner()
    try:
        with ProgressBar(each * len(TARGETS), "fuzzing") as bar:
            while min(done.values()) < each and time.monotonic() < deadline:
                for number, target in enumerate(TARGETS):
                    first = done[target.name]
                    last = min(first + BATCH, each)
                    if first == last:
                        continue
                    count, found, hang = runner.run(number, first, last, limit_s=limit_s)
                    done[target.name] += count
                    faults += found
                    hangs += [] if hang is None else [hang]
                    bar.update(count, foreign_errors=len(faults), hangs=len(hangs))
    finally:
        runner.stop()
    return done, faults, hangs


def main() -> None:
    """Fuzz and write the results; exit code 1 on any fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=240_000, help="cases over all readers, each an equal part")
    parser.add_argument("--minutes", type=float, default=30, help="stop after this time")
    parser.add_argument("--limit", type=float, default=10, help="seconds after which one case counts as a hang")
    options = parser.parse_args()
    start = time.monotonic()
    done, faults, hangs = run(options.cases, minutes=options.minutes, limit_s=options.limit)
    rows = "\n".join(f"| {name} | {count} |" for name, count in done.items())
    shown = "\n".join(f"- `{text[:200]}`" for text in [*faults, *hangs][:NUM_SHOWN])
    report(
        "fuzz",
        figures={"cases": sum(done.values()), "foreign_errors": len(faults), "hangs": len(hangs)},
        environment=environment(
            seconds=round(time.monotonic() - start), limit_s=options.limit, cases_asked=options.cases
        ),
        title="Readers against damaged data",
        notes=(__doc__ or "") + "\nA hang is a case that was not done within the limit, or ended its process.",
        table=f"| Reader | Cases |\n|---|---|\n{rows}" + (f"\n\nFound:\n\n{shown}" if shown else ""),
    )
    sys.exit(1 if faults or hangs else 0)


if __name__ == "__main__":
    main()
