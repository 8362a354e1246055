"""Parts of a benchmark as processes side by side, each begun when what it needs is done."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from engine.progress import duration, report


@dataclass(frozen=True)
class Job:
    """One part.

    Attributes:
        name: unique; a plain file name, that of its log.
        function: of a module, so that another process can import it; returns one line about its result.
        arguments: of the function; pickled.
        needs: names of the jobs that must be done before.
        on_cpu: leave a GPU alone.
    """

    name: str
    function: Callable[..., str]
    arguments: Sequence[Any] = ()
    needs: frozenset[str] = frozenset()
    on_cpu: bool = False


def run_jobs(jobs: Iterable[Job], *, num_processes: int, logs: Path, minutes: float = 0.0) -> None:
    """Run all jobs in `num_processes` processes of one thread each, and report each as it ends.

    What a job prints goes to `logs/NAME.log`. A job that fails stops those that need it, and no others.

    Args:
        minutes: begin none later than this; 0 begins all.

    Raises:
        RuntimeError: some jobs failed, after all others are done; names them and their logs.
    """
    waiting = {job.name: job for job in jobs}
    total, started = len(waiting), time.monotonic()
    done: set[str] = set()
    failed: dict[str, str] = {}
    running: dict[Future[str], Job] = {}
    logs.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes are the parallelism
    with ExitStack() as stack:
        pools = {
            on_cpu: stack.enter_context(
                ProcessPoolExecutor(
                    num_processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(on_cpu,)
                )
            )
            for on_cpu in {job.on_cpu for job in waiting.values()}
        }
        while waiting or running:
            late = 0 < 60 * minutes < time.monotonic() - started
            ready = [] if late else [job for job in waiting.values() if job.needs <= done]
            for job in ready[: num_processes - len(running)]:
                running[pools[job.on_cpu].submit(_run, job, logs)] = waiting.pop(job.name)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                if error is None:
                    done.add(job.name)
                else:
                    failed[job.name] = f"{type(error).__name__}: {error}"
                line = failed.get(job.name) or future.result()
                count, passed = len(done) + len(failed), duration(time.monotonic() - started)
                report(f"[{count}/{total}, {passed}] {job.name}: {line}")
    if waiting and not failed:
        report(f"{minutes:g} minutes are over: {len(waiting)} of {total} parts were not begun")
    if failed:
        first = next(iter(failed))
        raise RuntimeError(
            f"{len(failed)} of {total} parts failed, {len(waiting)} were not begun; the first: {first}, "
            f"{failed[first]} (see {logs / first}.log); run the same command again, it takes what is finished"
        )


def _begin(on_cpu: bool) -> None:
    """In a new process, before anything asks for a GPU."""
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _run(job: Job, logs: Path) -> str:
    started = time.monotonic()
    with open(logs / f"{job.name}.log", "a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        line = job.function(*job.arguments)
    return f"{line} ({duration(time.monotonic() - started)})"
