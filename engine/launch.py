"""One way to start under plain `python`, `accelerate launch`, DDP and DeepSpeed, on GPUs or on CPUs over gloo."""

import os
import socket
from collections import namedtuple
from dataclasses import fields, is_dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed
from torch import nn

from engine.errors import InputError
from engine.loss_scale import LossScale
from engine.settings import Precision

COLLECTIVE_TIMEOUT = timedelta(minutes=20)


def build_accelerator(*, precision: Precision = "no", seed: int = 0) -> Accelerator:
    """Join the process group that the launcher announced in the environment, and seed every generator.

    On machines without a GPU the backend is gloo: accelerate does not choose it by itself under DeepSpeed, and under a
    GPU-style launch it would leave the ranks unconnected without a word, which is checked here.

    Raises:
        InputError: the rendezvous host cannot be resolved, the launcher's settings do not connect the ranks, or fp16 is
            asked for without a GPU.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    if on_cpu and precision == "fp16":
        raise InputError("precision fp16 needs a GPU, and there is none: set precision to bf16 or no")
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
        # the launcher's settings outlive a training, and `configure_deepspeed` has changed them for the one before
        kinds: dict[str, Any] = {kind: {"enabled": precision == kind} for kind in ("bf16", "fp16")}
        _deepspeed_settings(accelerator).update(kinds, torch_autocast={"enabled": False})
    set_seed(seed, device_specific=True)
    return accelerator


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether the ranks train under DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def configure_deepspeed(
    accelerator: Accelerator, module: nn.Module, *, local_batch: int, clip_norm: float
) -> LossScale | None:
    """Tell DeepSpeed what it cannot see, because the data loader and the loop are ours. Does nothing under DDP.

    Returns:
        For fp16 the loss scale, to be attached to the prepared optimiser.
    """
    if not uses_deepspeed(accelerator):
        return None
    settings, scale = _deepspeed_settings(accelerator), None
    settings["train_micro_batch_size_per_gpu"] = local_batch
    settings["gradient_clipping"] = clip_norm
    if accelerator.mixed_precision == "bf16":
        # DeepSpeed's own bf16 casts weights but neither inputs nor buffers; autocast is what the other launchers do
        settings["bf16"] = {"enabled": False}
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif accelerator.mixed_precision == "fp16":
        settings["fp16"] = {"enabled": False}
        autocast = torch.autocast(accelerator.device.type, dtype=torch.float16)
        module.forward = autocast(module.forward)  # type: ignore[method-assign]
        scale = LossScale()
    if _zero_stage(accelerator) == 3:
        module.register_forward_hook(_as_named_tuple)
    return scale


def refuse_zero3(accelerator: Accelerator, *, what: str, instead: str = "set zero_stage to 1 or 2") -> None:
    """Refuse DeepSpeed ZeRO 3 for what needs whole weights on every rank.

    Raises:
        InputError: it is ZeRO 3.
    """
    if uses_deepspeed(accelerator) and accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise InputError(f"{what} needs whole weights on every rank, and ZeRO 3 cuts them up: {instead}")


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


def _zero_stage(accelerator: Accelerator) -> int:
    return int(_deepspeed_settings(accelerator).get("zero_optimization", {}).get("stage", 0))


def _deepspeed_settings(accelerator: Accelerator) -> dict[str, Any]:
    settings: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    return settings


def _as_named_tuple(module: nn.Module, arguments: Any, output: Any) -> Any:
    """A data class as the named tuple of the same names, inside which ZeRO 3 finds the tensors.

    It hooks on them to bring the module's own weights back for the backward; in a data class it would see none.
    """
    if not is_dataclass(output) or isinstance(output, type):
        return output
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    return namedtuple(type(output).__name__, values)(**values)  # type: ignore[misc]


def _check_zero_stage(accelerator: Accelerator) -> None:
    stage = _zero_stage(accelerator)
    if stage not in (1, 2, 3):
        raise InputError(
            f"DeepSpeed ZeRO stage {stage} is not supported: set zero_stage to 1, 2 or 3 in the accelerate config, or "
            f"launch with DDP"
        )
