"""One optimiser step that all ranks make or none: a loss or gradient that is not finite never reaches the weights."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from engine.files import append_lines, give_time
from engine.launch import uses_deepspeed
from engine.passes import Backward
from engine.training import Training

Positions = list[tuple[int, ...]]
SampleNote = dict[str, list[Any]]  # lists of one entry a sample: "positions", "keys", ...


class CheckedBackward(Backward):
    """Backward that makes the gradient of a loss that is not finite NaN, whatever the formula would give.

    So the ranks agree without a word: their gradients are added up, and the sum is then NaN on all of them.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module) -> None:
        super().__init__(accelerator, module)
        self.finite: Tensor | None = None

    def __call__(self, loss: Tensor) -> None:
        """Backward of `loss`; multiplied by exactly 1 where it is finite."""
        finite = torch.isfinite(loss.detach())
        self.finite = finite if self.finite is None else self.finite & finite
        super().__call__(loss * torch.where(finite, 1.0, math.nan).to(loss.dtype))


@dataclass
class _Step:
    """A step (counted from 1, as in the metrics) that was asked about, and the answer on its way to the host."""

    step: int
    note: Callable[[], SampleNote] | None
    loss: Tensor
    finite: Tensor
    bad: Tensor
    copied: torch.cuda.Event | None


class StepGuard:
    """Makes or skips the optimiser steps, counts the skipped ones, and notes their batches.

    The question is one number, the norm of the reduced gradient, which is the same on all ranks: no exchange is needed.
    DeepSpeed and the fp16 scaler ask it themselves, and their answer is used. A fused optimiser skips on the device, so
    the host looks at the answer one step later and never waits; another one waits for it before its step.

    Raises:
        FloatingPointError: from `finish` or `settle`, after `max_skipped` skipped steps in a row, on all ranks.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self._pending: _Step | None = None
        training.extra.setdefault("num_skipped", 0)
        training.extra.setdefault("num_skipped_in_a_row", 0)

    def backward(self) -> CheckedBackward:
        """For the step function of one step."""
        return CheckedBackward(self.training.accelerator, self.training.module)

    def finish(
        self, backward: CheckedBackward, loss: Tensor, *, step: int, note: Callable[[], SampleNote] | None
    ) -> Tensor:
        """Clip the gradient and make the optimiser's step, or skip it.

        Args:
            backward: that was handed to the step function.
            loss: of the step, for the note about a skipped one.
            step: steps done before.
            note: says which samples this rank's batch holds; called only if the step is skipped.

        Returns:
            Whether the step counts: a boolean scalar on the loss's device.
        """
        self.settle()
        accelerator, optimizer = self.training.accelerator, self.training.optimizer
        finite = torch.isfinite(loss) if backward.finite is None else backward.finite
        if uses_deepspeed(accelerator):
            bad = torch.tensor(_deepspeed_fault(optimizer.optimizer, finite, self.training))
        elif accelerator.scaler is not None:
            bad = torch.tensor(self._scaled_step(accelerator.scaler, finite))
        else:
            bad = ~torch.isfinite(self._clip())
            _step_unless(bad, optimizer)
        optimizer.zero_grad()
        copied = None
        answer = bad.to("cpu", non_blocking=True)
        if bad.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending = _Step(step + 1, note, loss.detach(), finite, answer, copied)
        if copied is None:
            self.settle()
        return ~bad.to(loss.device)

    def settle(self) -> None:
        """Look at the answer about the last step; every rank must call it."""
        last, self._pending = self._pending, None
        if last is None:
            return
        if last.copied is not None:
            last.copied.synchronize()
        extra = self.training.extra
        if not bool(last.bad):
            extra["num_skipped_in_a_row"] = 0
            return
        extra["num_skipped"] += 1
        extra["num_skipped_in_a_row"] += 1
        self._note(last)
        if extra["num_skipped_in_a_row"] >= self.training.config.max_skipped:
            run = self.training.run
            raise FloatingPointError(
                f"loss or gradient was not finite in {extra['num_skipped_in_a_row']} steps in a row, the last of them "
                f"{last.step}: {run.bad_batches_file} names their samples; lower optim.lr, use precision 'no', or "
                f"look at one with: python pretrain/replay.py --run {run.path} --step {last.step}"
            )

    def _scaled_step(self, scaler: Any, finite: Tensor) -> bool:
        """Clip and step by the fp16 scaler; whether it skipped the step for more than a scale that was too high.

        The scale tells: accelerate's own word misses the steps that fused optimisers skip on the device.
        """
        before = scaler.get_scale()
        if self.training.clip_norm > 0:
            self._clip()
        optimizer = self.training.optimizer
        with _asked_on_the_host(optimizer.optimizer) if not optimizer.optimizer.state else nullcontext():
            optimizer.step()
        after = scaler.get_scale()
        return after < before and _is_fault(after, finite, self.training)

    def _clip(self) -> Tensor:
        """Norm of the reduced gradient, before it is clipped where that is asked for."""
        accelerator, parameters = self.training.accelerator, list(self.training.module.parameters())
        if self.training.clip_norm > 0:
            norm = accelerator.clip_grad_norm_(parameters, self.training.clip_norm)
            assert norm is not None
            return norm
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _note(self, last: _Step) -> None:
        """One line in `bad_batches.jsonl` and one for whoever watches."""
        ranks, run = self.training.ranks, self.training.run
        parts = ranks.gather((float(last.loss), bool(last.finite), last.note() if last.note is not None else {}))
        bad_ranks = [rank for rank, (_, finite, _) in enumerate(parts) if not finite]
        where = f"the loss of rank {', '.join(map(str, bad_ranks))}" if bad_ranks else "the gradient"
        self.training.report(f"step {last.step} skipped: {where} is not finite")
        if ranks.is_main:
            line: dict[str, Any] = {
                "step": last.step,
                "ranks": bad_ranks,
                "losses": [loss if math.isfinite(loss) else str(loss) for loss, _, _ in parts],
            }
            line |= {name: [value for _, _, note in parts for value in note[name]] for name in parts[0][2]}
            give_time(partial(_append, run.bad_batches_file, json.dumps(line)))


def _append(file: Path, line: str) -> None:
    with suppress(OSError):
        append_lines(file, line)


@contextmanager
def _asked_on_the_host(optimizer: Any) -> Iterator[None]:
    """Makes the scaler skip a step of a fused optimiser as it skips others': see `_step_unless`."""
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    optimizer._step_supports_amp_scaling = False
    try:
        yield
    finally:
        optimizer._step_supports_amp_scaling = fused


def _step_unless(bad: Tensor, optimizer: Any) -> None:
    """Make the step unless `bad`. Fused optimisers are told on the device, as torch's gradient scaler does it.

    Not in their first step: skipping it would leave SGD's new momentum without a value.
    """
    plain = optimizer.optimizer
    if plain.state and all(group.get("fused") for group in plain.param_groups):
        plain.found_inf = bad.float()
        optimizer.step()
        del plain.found_inf
    elif not bool(bad):
        optimizer.step()


def _deepspeed_fault(zero: Any, finite: Tensor, training: Training) -> bool:
    """Whether DeepSpeed skipped its step for more than a loss scale that was too high."""
    scale = training.loss_scale
    if scale is None:
        return bool(zero.overflow)
    scale.update(zero, overflow=zero.overflow)
    return zero.overflow and _is_fault(scale.value, finite, training)


def _is_fault(scale: float, finite: Tensor, training: Training) -> bool:
    """A scaled gradient may overflow where the loss is finite: the scale is halved then, and that is no fault."""
    return scale <= 1 or training.ranks.any(not bool(finite))
