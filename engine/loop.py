"""The training loop that every program shares: step, measure, report, save, stop."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from torch import Tensor

from engine.errors import Requeue
from engine.faults import Positions, StepGuard
from engine.files import append_lines
from engine.meter import Meter
from engine.passes import Backward
from engine.stop import StopRequest
from engine.training import FREE_KEYS, Training, TrainingConfig, start_training

__all__ = ["FREE_KEYS", "Hook", "StepFunction", "Training", "TrainingConfig", "fit", "start_training"]

Hook = Callable[[int], None]


class StepFunction(Protocol):
    """Computes one step's losses from a batch and hands them to `backward`; the loop does the rest.

    Returns the step's named scalars, `loss` among them.
    """

    def __call__(self, batch: Any, *, step: int, backward: Backward) -> dict[str, Tensor]: ...


def fit(
    training: Training,
    batches: Iterable[Any],
    step_function: StepFunction,
    *,
    start_step: int,
    hooks: Sequence[tuple[int, Hook]] = (),
) -> None:
    """Train from `start_step` to the end.

    Args:
        batches: one batch of this rank per step, beginning with step `start_step`.
        hooks: pairs of interval in steps and function of the number of steps done, called on every rank in order,
            also after the last step.

    Raises:
        Requeue: a stop was asked for; the checkpoint is written.
        SaveFault: the last checkpoint could not be written.
        FloatingPointError: loss or gradient were not finite in too many steps in a row, on whichever rank.
    """
    meter, guard = Meter(training), StepGuard(training)
    source = iter(batches)
    training.step = start_step
    with StopRequest() as stop:
        if start_step < training.total_steps:
            _stop_before(training, stop)
        for step in range(start_step, training.total_steps):
            started = time.perf_counter()
            training.at("data")
            batch = next(source)
            waited = time.perf_counter() - started
            training.at("step")
            counts, scalars = _train_step(training, guard, batch, step_function, step=step)
            meter.add(scalars, counts=counts)
            meter.add_time(time.perf_counter() - started, waited=waited)
            done = training.step = step + 1
            training.at("step")
            last = done == training.total_steps
            if done % training.config.log_every == 0 or last:
                guard.settle()
                meter.publish(done)
            _call_hooks(training, hooks, guard)
            signalled = training.ranks.any(stop.requested)
            asked = signalled or done == training.config.stop_after
            if asked or last or done % training.config.checkpoint_every == 0:
                guard.settle()
                training.save(done, last=asked or last)
            _report_trouble(training)
            if asked or last:
                training.at("saving")
                training.finish_saving()
            if asked and not last:
                raise _requeue(training, stop, signalled=signalled)


def _train_step(
    training: Training, guard: StepGuard, batch: Any, step_function: StepFunction, *, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Whether the step was made, and its scalars."""
    rate = training.schedule(step)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    positions = getattr(batch, "positions", None)
    if training.config.record_order:
        _record(training, step, positions)
    backward = guard.backward()
    scalars = step_function(batch, step=step, backward=backward)
    note = batch.note() if hasattr(batch, "note") else None
    counts = guard.finish(backward, scalars["loss"], step=step, note=note)
    return counts, {name: value.detach() for name, value in scalars.items()}


def _call_hooks(training: Training, hooks: Sequence[tuple[int, Hook]], guard: StepGuard) -> None:
    done = training.step
    due = [hook for interval, hook in hooks if done % interval == 0 or done == training.total_steps]
    if due:
        guard.settle()
        training.at("hooks")
        for hook in due:
            training.module.eval()
            hook(done)
            training.module.train()
        training.at("step")


def _stop_before(training: Training, stop: StopRequest) -> None:
    """Answer a stop that was asked for while the program was put together: there is nothing new to save."""
    if training.ranks.any(stop.requested):
        raise _requeue(training, stop, signalled=True)


def _requeue(training: Training, stop: StopRequest, *, signalled: bool) -> Requeue:
    why = (stop.reason or "a signal to another rank") if signalled else "loop.stop_after"
    return Requeue(f"after step {training.step} of {training.total_steps} ({why}); the same command goes on from there")


def _report_trouble(training: Training) -> None:
    """Say once that files cannot be written, and once that they can be again."""
    if training.saver is not None:
        training.saver.poll()
    run = training.run
    if bool(run.unwritten) != training.metrics_wait:
        training.metrics_wait = bool(run.unwritten)
        what = "cannot be written, and wait in memory" if run.unwritten else "are written again, none is lost"
        training.report(f"metrics {what} ({run.metrics_file})")


def _record(training: Training, step: int, positions: Positions | None) -> None:
    order = training.run.order
    with suppress(OSError):
        order.mkdir(exist_ok=True)
        line = {"step": step + 1, "positions": positions}
        append_lines(order / f"rank-{training.ranks.rank:04d}.jsonl", json.dumps(line))
