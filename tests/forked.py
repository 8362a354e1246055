"""Programs of the repository run in processes that are forked from one that has imported everything already.

A fresh interpreter needs seconds to import torch, and the tests of faults start dozens of them. What runs in the fork
is the real program: its file, as `__main__`, with its command line and a launcher's environment.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.tools import free_port

PRELOADED = ["tests.forked_imports"]


@dataclass
class Launch:
    """One program on one or more ranks, each in a process group of its own.

    Attributes:
        outputs: one file per rank with what it wrote to stdout and stderr.
    """

    processes: list[BaseProcess]
    outputs: list[Path]

    def output(self, rank: int = 0) -> str:
        """What a rank has written so far."""
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""

    def wait_for(self, text: str, *, rank: int = 0, timeout: float = 120) -> None:
        """Wait until a rank has written `text`."""
        end = time.monotonic() + timeout
        while text not in self.output(rank):
            assert time.monotonic() < end and self.processes[rank].is_alive(), f"no {text!r} in\n{self.output(rank)}"
            time.sleep(0.01)

    def signal(self, number: signal.Signals, *, rank: int | None = None, group: bool = True) -> None:
        """Signal the process groups of one rank or of all, as a scheduler does, or the ranks alone."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            assert process.pid is not None
            try:
                (os.killpg if group else os.kill)(process.pid, number)
            except ProcessLookupError:
                continue

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes of all ranks; a rank still alive after `timeout` seconds is killed, and the test fails."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.01))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        assert not hung, f"ranks {hung} hang:\n" + "\n".join(self.output(rank)[-2000:] for rank in hung)
        return [process.exitcode for process in self.processes if process.exitcode is not None]

    def kill(self) -> None:
        """End everything that is left."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()


def launch(
    program: Path,
    *arguments: object,
    logs: Path,
    world_size: int = 1,
    zero: int = 0,
    before: Callable[[], None] | None = None,
    only_rank: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Launch:
    """Start a program.

    Args:
        logs: folder for what the ranks write.
        zero: DeepSpeed ZeRO stage; 0 is DDP, or no launcher at all on one rank.
        before: called in the process of `only_rank` first, to put a fault in its place; importable.
    """
    logs.mkdir(parents=True, exist_ok=True)
    variables = _launcher_variables(world_size, zero) | dict(environment or {})
    processes, outputs = [], []
    for rank in range(world_size):
        output = logs / f"{time.monotonic_ns()}-rank{rank}.log"
        ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 or zero else {}
        words = [str(program), *(str(a) for a in arguments)]
        target = (words, variables | ranked, output, before if rank == only_rank else None)
        process = _context().Process(target=_main, args=target)
        process.start()
        processes.append(process)
        outputs.append(output)
    return Launch(processes, outputs)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _launcher_variables(world_size: int, zero: int) -> dict[str, str]:
    """What `accelerate launch` puts into the environment."""
    variables = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    if world_size > 1 or zero:
        variables |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if zero:
        variables |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero)}
        variables |= {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
        variables |= {f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "none" for what in ("OPTIMIZER", "PARAM")}
    return variables


def _main(words: Sequence[str], variables: Mapping[str, str], output: Path, before: Callable[[], None] | None) -> None:
    """In the fork: become the program."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # the programs' own default, not this process's
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.update(variables)
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).parent))  # as Python does for a program
    if before is not None:
        before()
    runpy.run_path(words[0], run_name="__main__")
