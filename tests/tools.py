"""What several rooms' tests share: running programs and running functions on several ranks."""

import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parent.parent


def run_python(*arguments: object, cwd: Path | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a program of the repository with this Python; stdout and stderr are captured."""
    command = [sys.executable, *(str(a) for a in arguments)]
    return subprocess.run(
        command, cwd=cwd or REPOSITORY, capture_output=True, text=True, timeout=timeout, env=clean_environment()
    )


def accelerate(config: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --config_file configs/accelerate/<config>.yaml ...` on a free port."""
    file = REPOSITORY / "configs" / "accelerate" / f"{config}.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", free_port())
    return run_python(*launcher, *arguments, cwd=cwd, timeout=480)


def clean_environment() -> dict[str, str]:
    """Environment without a launcher's variables, one thread per process: a test machine has few cores."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_SERVICE")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("ACCELERATE_")}
    return kept | {"OMP_NUM_THREADS": "1", "WANDB_MODE": kept.get("WANDB_MODE", "offline")}


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Run `function(rank, world_size, *arguments)` on gloo ranks; returns what each returned, in rank order.

    A rank that raises ends the test with its traceback; a rank that hangs ends it after `timeout` seconds.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(queue, function, rank, world_size, port, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        results: dict[int, Any] = {}
        for _ in processes:
            rank, value, trace = queue.get(timeout=timeout)
            assert trace is None, f"rank {rank} of {world_size}:\n{trace}"
            results[rank] = value
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


def _rank_main(queue: Any, function: Any, rank: int, world_size: int, port: int, arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    try:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
        queue.put((rank, function(rank, world_size, *arguments), None))
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
