"""One way to start under plain `python`, `accelerate launch`, DDP and DeepSpeed, on GPUs or on CPUs over gloo."""

import os
import socket
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, set_seed

from engine.errors import InputError
from engine.settings import Precision

COLLECTIVE_TIMEOUT = timedelta(minutes=20)


def build_accelerator(*, precision: Precision = "no", seed: int = 0) -> Accelerator:
    """Join the process group that the launcher announced in the environment, and seed every generator.

    On machines without a GPU the backend is gloo: accelerate does not choose it by itself under DeepSpeed, and under a
    GPU-style launch it would leave the ranks unconnected without a word, which is checked here.

    Raises:
        InputError: the rendezvous host cannot be resolved, or the launcher's settings do not connect the ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find out by itself, with a warning per rank
    if world_size > 1:
        _check_rendezvous()
    handlers = []
    if world_size > 1 or deepspeed:
        backend = "gloo" if on_cpu else "nccl"
        handlers = [InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT)]
    accelerator = Accelerator(cpu=on_cpu and not deepspeed, mixed_precision=precision, kwargs_handlers=handlers)
    if accelerator.num_processes != world_size or (
        world_size > 1 and accelerator.distributed_type == DistributedType.NO
    ):
        raise InputError(
            f"the launcher started {world_size} ranks but accelerate connected {accelerator.num_processes} of them "
            f"as {accelerator.distributed_type}: use one of configs/accelerate/*.yaml"
        )
    if deepspeed:
        _check_zero_stage(accelerator)
    set_seed(seed, device_specific=True)
    return accelerator


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether the ranks train under DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure_deepspeed(accelerator: Accelerator, *, local_batch: int, clip_norm: float) -> None:
    """Tell DeepSpeed what it cannot see, because the data loader and the loop are ours. Does nothing under DDP."""
    if uses_deepspeed(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = local_batch
        settings["gradient_clipping"] = clip_norm


def local_batch_size(global_batch: int, *, world_size: int) -> int:
    """Samples per rank and step.

    Raises:
        InputError: the world size does not divide the global batch.
    """
    if global_batch % world_size:
        down, up = global_batch // world_size * world_size, -(-global_batch // world_size) * world_size
        nearest = f"{down} or {up}" if down else f"{up}"
        raise InputError(
            f"batch_size {global_batch} cannot be divided by {world_size} ranks: set it to {nearest}, "
            f"or launch another number of ranks"
        )
    return global_batch // world_size


def _check_rendezvous() -> None:
    host = os.environ.get("MASTER_ADDR", "")
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise InputError(
            f"MASTER_ADDR '{host}' cannot be resolved ({error}): pass a reachable --main_process_ip"
        ) from error


def _check_zero_stage(accelerator: Accelerator) -> None:
    stage = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2):
        raise InputError(
            f"DeepSpeed ZeRO stage {stage} is not supported (checkpoints hold stages 1 and 2): "
            f"set zero_stage to 1 or 2 in the accelerate config, or launch with DDP"
        )
