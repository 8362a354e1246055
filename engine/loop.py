"""The training loop that every program shares: step, measure, report, save, stop."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from engine.checkpoint import list_checkpoints, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from engine.errors import InputError, Requeue
from engine.launch import configure_deepspeed, uses_deepspeed
from engine.optim import Schedule, build_optimizer, build_schedule
from engine.passes import Backward
from engine.progress import report, silent, step_line
from engine.ranks import Ranks
from engine.runs import RunFolder
from engine.settings import LoopConfig, OptimConfig
from engine.state import load_model_state, load_optimizer_state, model_state, optimizer_state
from engine.stop import StopRequest
from engine.tracking import Tracker

Reporter = Callable[[str], None]

# What may differ between two parts of one run: it changes how fast the same result is reached, not the result. The data
# may have moved; what it holds is compared by its digest (`Training.identity`).
FREE_KEYS = frozenset({"loop", "runs", "data.shards", "data.labels", "data.train", "data.val"})


class TrainingConfig(Protocol):
    """The part of a program's config that the loop needs."""

    optim: OptimConfig
    loop: LoopConfig


class StepFunction(Protocol):
    """Computes one step's losses from a batch and hands them to `backward`; the loop does the rest.

    Returns the step's named scalars, `loss` among them.
    """

    def __call__(self, batch: Any, *, step: int, backward: Backward) -> dict[str, Tensor]: ...


@dataclass
class Training:
    """Everything one training consists of; as a context, closes the tracker.

    Attributes:
        identity: what the run was started on (data digest, ...); a checkpoint with another identity is refused.
        extra: small JSON state that belongs in checkpoints (counters, best value so far).
        report: writes one line for whoever watches; silent on all ranks but the first.
    """

    accelerator: Accelerator
    ranks: Ranks
    run: RunFolder
    tracker: Tracker | None
    module: nn.Module
    optimizer: Any
    schedule: Schedule
    config: LoopConfig
    total_steps: int
    batch_size: int
    clip_norm: float
    identity: dict[str, str]
    extra: dict[str, Any]
    report: Reporter

    def __enter__(self) -> "Training":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.tracker is not None:
            self.tracker.finish(failed=kind is not None and not issubclass(kind, Requeue))

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one.

        Returns:
            Number of steps already done.
        """
        newest: Path | None = self.ranks.broadcast(next(iter(list_checkpoints(self.run.checkpoints)[::-1]), None))
        if newest is None:
            if self.ranks.is_main:
                self.run.rewind_metrics(-1)
            return 0
        step, tensors, state = load_checkpoint(newest)
        for key, value in self.identity.items():
            if state["identity"].get(key) != value:
                raise InputError(
                    f"{newest} was trained on other {key} ({str(state['identity'].get(key))[:12]}, now {value[:12]}): "
                    f"give the same {key}, or another --run"
                )
        load_model_state(self.accelerator, self.module, tensors["model"])
        load_optimizer_state(self.accelerator, self.module, self.optimizer, tensors["optimizer"])
        if len(tensors["rng"]) == self.ranks.world_size:
            set_rng_state(tensors["rng"][self.ranks.rank])
        self.extra.update(state["extra"])
        if self.ranks.is_main:
            self.run.rewind_metrics(step)
            self.report(f"resumed {self.run.path} after step {step} of {self.total_steps}")
        return step

    def weights(self) -> dict[str, Tensor]:
        """Full-precision weights and buffers on CPU, by name. Every rank must call it."""
        return model_state(self.accelerator, self.module)

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps. Every rank must call it."""
        tensors = {
            "model": self.weights(),
            "optimizer": optimizer_state(self.accelerator, self.module, self.optimizer),
            "rng": self.ranks.gather(rng_state()),
        }
        if self.ranks.is_main:
            save_checkpoint(
                self.run.checkpoints,
                step=step,
                tensors=tensors,
                state={"extra": self.extra, "identity": self.identity, "world_size": self.ranks.world_size},
                keep=self.config.keep_checkpoints,
            )
        self.ranks.barrier()


def start_training(
    module: nn.Module,
    *,
    accelerator: Accelerator,
    ranks: Ranks,
    run: RunFolder,
    config: TrainingConfig,
    resolved: dict[str, Any],
    batch_size: int,
    steps_per_epoch: float,
    total_steps: int,
    identity: dict[str, str],
) -> Training:
    """Bring `module` and its optimiser under the launcher, claim the run folder, and open the tracker.

    Args:
        resolved: the program's config as nested plain values, for the run folder and the tracker.
        batch_size: over all ranks.
        identity: see `Training`.

    Raises:
        InputError: the run folder belongs to another config, or optimiser and launcher do not go together.
    """
    optimizer = build_optimizer(module, config.optim, accelerator=accelerator)
    ranks.on_main(lambda: run.claim(resolved, free=FREE_KEYS))
    configure_deepspeed(accelerator, local_batch=batch_size // ranks.world_size, clip_norm=config.optim.clip_norm)
    prepared, prepared_optimizer = accelerator.prepare(module, optimizer)
    prepared.train()
    tracker = None
    if ranks.is_main:
        tracker = Tracker(run, backend=config.loop.tracker, project=config.loop.project, config=resolved)
    return Training(
        accelerator=accelerator,
        ranks=ranks,
        run=run,
        tracker=tracker,
        module=prepared,
        optimizer=prepared_optimizer,
        schedule=build_schedule(
            config.optim, batch_size=batch_size, steps_per_epoch=steps_per_epoch, total_steps=total_steps
        ),
        config=config.loop,
        total_steps=total_steps,
        batch_size=batch_size,
        clip_norm=config.optim.clip_norm,
        identity=identity,
        extra={},
        report=report if ranks.is_main else silent,
    )


Hook = Callable[[int], None]


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
        FloatingPointError: the loss is not finite, on whichever rank.
    """
    meter = _Meter(training)
    source = iter(batches)
    with StopRequest() as stop:
        for step in range(start_step, training.total_steps):
            started = time.perf_counter()
            batch = next(source)
            waited = time.perf_counter() - started
            scalars = _train_step(training, batch, step_function, step=step)
            done = step + 1
            meter.add(scalars, waited=waited, seconds=time.perf_counter() - started)
            last = done == training.total_steps
            if done % training.config.log_every == 0 or last:
                meter.publish(done)
            for interval, hook in hooks:
                if done % interval == 0 or last:
                    training.module.eval()
                    hook(done)
                    training.module.train()
            signalled = training.ranks.any(stop.requested)
            asked = signalled or done == training.config.stop_after
            if asked or last or done % training.config.checkpoint_every == 0:
                training.save(done)
            if asked and not last:
                why = (stop.reason or "a signal to another rank") if signalled else "loop.stop_after"
                raise Requeue(
                    f"after step {done} of {training.total_steps} ({why}); the same command goes on from there"
                )


def _train_step(training: Training, batch: Any, step_function: StepFunction, *, step: int) -> dict[str, Tensor]:
    accelerator, optimizer = training.accelerator, training.optimizer
    rate = training.schedule(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    scalars = step_function(batch, step=step, backward=Backward(accelerator, training.module))
    if training.clip_norm > 0 and not uses_deepspeed(accelerator):
        accelerator.clip_grad_norm_(training.module.parameters(), training.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return {name: value.detach() for name, value in scalars.items()}


class _Meter:
    """Collects scalars and times between two reports; the times are this rank's, the scalars the mean over ranks."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.waited, self.seconds = 0, 0.0, 0.0

    def add(self, scalars: dict[str, Tensor], *, waited: float, seconds: float) -> None:
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.steps += 1
        self.waited += waited
        self.seconds += seconds

    def publish(self, step: int) -> None:
        training = self.training
        values = training.ranks.mean({k: v / self.steps for k, v in self.sums.items()})
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"loss is {values['loss']} at step {step} (mean over {self.steps} steps and all ranks): "
                f"lower optim.lr or use precision 'no'; the last checkpoint in {training.run.checkpoints} is intact"
            )
        seconds = self.seconds / self.steps
        speed = {
            "time/step_s": seconds,
            "time/data_wait": self.waited / self.seconds,
            "time/images_per_s": training.batch_size / seconds,
            "lr": training.schedule(step - 1),
        }
        if training.ranks.is_main:
            assert training.tracker is not None
            training.tracker.log({f"train/{k}": v for k, v in values.items()} | speed, step=step)
            training.report(
                step_line(
                    step,
                    training.total_steps,
                    values=values,
                    step_seconds=seconds,
                    images_per_second=speed["time/images_per_s"],
                    data_wait=speed["time/data_wait"],
                )
            )
        self._reset()
