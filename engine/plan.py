"""Numbers that follow from config, data and launcher; computed, never written back."""

import math
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InputError
from engine.launch import local_batch_size


@dataclass(frozen=True)
class Plan:
    """Length of a training and the batch of one rank."""

    total_steps: int
    steps_per_epoch: float
    local_batch: int


def plan_steps(
    *, batch_size: int, epochs: float, max_steps: int | None, num_samples: int, world_size: int, data: Path
) -> Plan:
    """Plan a training of `epochs` passes over `num_samples`, or of `max_steps` where given.

    Steps are whole batches: of `epochs x num_samples` positions the last ones, fewer than a batch, are not used.

    Args:
        batch_size: over all ranks.
        data: where the samples are, for messages.

    Raises:
        InputError: the ranks do not divide the batch, the batch exceeds the set, or there is not one whole step.
    """
    local = local_batch_size(batch_size, world_size=world_size)
    if batch_size > num_samples:
        raise InputError(
            f"data.batch_size {batch_size} is more than the {num_samples} samples in {data}: lower it, or give more "
            "data: a step takes samples of two epochs at most"
        )
    per_epoch = num_samples / batch_size
    total = max_steps or math.floor(epochs * per_epoch)
    if total < 1:
        raise InputError(f"epochs {epochs} is less than one step of {batch_size} images: raise it")
    return Plan(total, per_epoch, local)
