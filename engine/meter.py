"""What a training reports: the mean of its scalars over steps and ranks, its speed, its memory."""

import math
import resource

import torch
from torch import Tensor

from engine.progress import step_line
from engine.training import Training

KIB_PER_GIB = 2**20
BYTES_PER_GIB = 2**30


class Meter:
    """Collects scalars and times between two reports.

    Scalars are means over ranks, times are this rank's; the share of waiting for data is that of the rank that waits
    the most, since in a step all ranks wait for the last.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self._reset()

    def add(self, scalars: dict[str, Tensor], *, counts: Tensor) -> None:
        """Take in the scalars of a step that `counts`; those of a skipped one are left out, without asking the device.

        Args:
            scalars: a name may be missing in some steps; the mean is over those that have it.
            counts: boolean scalar.
        """
        for name, value in scalars.items():
            here = counts.to(value.device)
            kept = torch.where(here, value, torch.zeros_like(value))
            total, number = self._sums.get(name, (torch.zeros_like(value), torch.zeros_like(value)))
            self._sums[name] = (total + kept, number + here)

    def add_time(self, seconds: float, *, waited: float) -> None:
        """Take in the time of one step, `waited` of it spent waiting for data."""
        self._steps += 1
        self._seconds += seconds
        self._waited += waited

    def publish(self, step: int) -> None:
        """Log and report the steps since the last report. Every rank must call it."""
        training = self.training
        means = {name: total / number for name, (total, number) in self._sums.items() if number > 0}
        values = training.ranks.mean(means) if means else {}
        self._check(values, step)
        seconds, data_wait = self._seconds / self._steps, max(training.ranks.gather(self._waited / self._seconds))
        rate = training.batch_size / seconds
        numbers = {
            "time/step_s": seconds,
            "time/data_wait": data_wait,
            "time/images_per_s": rate,
            "time/images_per_s_device": rate / training.ranks.world_size,
            "memory/peak_gib": peak_memory(training.accelerator.device),
            "lr": training.schedule(step - 1),
            "train/skipped": float(training.extra["num_skipped"]),
        }
        if "num_bad" in training.extra:
            numbers["data/num_bad"] = float(training.extra["num_bad"])
        if training.ranks.is_main:
            assert training.tracker is not None
            training.tracker.log({f"train/{k}": v for k, v in values.items()} | numbers, step=step)
            training.report(
                step_line(
                    step,
                    training.total_steps,
                    values=values,
                    step_seconds=seconds,
                    images_per_second=rate,
                    data_wait=data_wait,
                )
            )
        self._reset()

    def _check(self, values: dict[str, float], step: int) -> None:
        if not math.isfinite(values.get("loss", 0.0)):
            raise FloatingPointError(
                f"loss is {values['loss']} at step {step} (mean over {self._steps} steps and all ranks): "
                f"lower optim.lr or use precision 'no'; the checkpoints in {self.training.run.checkpoints} are intact"
            )

    def _reset(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on this rank's GPU so far; on a CPU, the most the process took of memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / BYTES_PER_GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_PER_GIB
