"""One training's state: what it consists of, how it begins, goes on, and is saved."""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from engine.attempts import Attempts, describe, write_exit
from engine.checkpoint import (
    Retention,
    clear_leftovers,
    list_checkpoints,
    load_checkpoint,
    rng_state,
    set_rng_state,
    step_of,
)
from engine.errors import EXIT_FAILED, InputError, Requeue, SaveFault
from engine.launch import configure_deepspeed
from engine.loss_scale import LossScale, load_scale, scale_state
from engine.optim import Schedule, build_optimizer, build_schedule
from engine.program import leave_now
from engine.progress import report, silent
from engine.ranks import Ranks
from engine.runs import RunFolder
from engine.saver import Saver
from engine.settings import LoopConfig, OptimConfig
from engine.state import load_model_state, load_optimizer_state, model_state, optimizer_state
from engine.tracking import Tracker
from engine.watch import RankWatch, broken_exchange

Reporter = Callable[[str], None]

# What may differ between two parts of one run: it changes how fast the same result is reached, not the result. The data
# may have moved; what it holds is compared by its digest (`Training.identity`).
FREE_KEYS = frozenset(
    {"loop", "runs", "online", "diagnostics_every", "optim.micro_batch"}
    | {f"data.{name}" for name in ("shards", "labels", "gaze", "train", "val", "path", "remote")}
)
LAST_SAVE_S = 60.0


class TrainingConfig(Protocol):
    """The part of a program's config that the loop needs."""

    optim: OptimConfig
    loop: LoopConfig


@dataclass
class Training:
    """Everything one training consists of; a context that notes how it ended.

    Attributes:
        identity: what the run was started on (data digest, ...); a checkpoint with another identity is refused.
        extra: small JSON state that belongs in checkpoints (counters, best value so far).
        report: writes one line for whoever watches; silent on all ranks but the first.
        step: steps done.
        metrics_wait: whether metrics cannot be written at the moment.
        watch: of the other ranks; while the training is entered as a context.
        loss_scale: of fp16 under DeepSpeed; elsewhere the accelerator has it, or there is none.
    """

    accelerator: Accelerator
    ranks: Ranks
    run: RunFolder
    tracker: Tracker | None
    saver: Saver | None
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
    step: int = 0
    metrics_wait: bool = False
    watch: RankWatch | None = None
    loss_scale: LossScale | None = None

    def __enter__(self) -> "Training":
        self.watch = RankWatch(self.ranks, timeout=self.config.rank_timeout, on_lost=self._lost)
        if self.ranks.world_size > 1 and self.config.rank_timeout > 0 and not self.watch.active:
            self.report("the ranks cannot reach rank 0 on a port of its own: none will notice when another is lost")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.watch is not None
        self.watch.leave("" if kind is None else describe(error), expect_verdict=broken_exchange(error))
        stopped = kind is None or issubclass(kind, Requeue)
        # a SaveFault is what waiting has come to
        failure = self.saver.wait(0.0 if isinstance(error, SaveFault) else None) if self.saver is not None else ""
        self.run.flush()
        if self.ranks.is_main:
            mistake = kind is not None and issubclass(kind, InputError)  # the user's, and no crash
            Attempts(self.run.path).end(self.step, cause=describe(error), failed=not (stopped or mistake))
            if self.tracker is not None:
                self.tracker.finish(failed=not stopped)
        if failure and kind is None:
            raise SaveFault(failure)

    def at(self, place: str) -> None:
        """Say to the other ranks what this one does now; "step" where it may have to wait for them."""
        if self.watch is not None:
            self.watch.at(self.step, place)

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one.

        Returns:
            Number of steps already done.
        """
        newest: Path | None = self.ranks.broadcast(next(iter(list_checkpoints(self.run.checkpoints)[::-1]), None))
        if newest is None:
            if self.ranks.is_main:
                self.run.rewind(-1)
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
        load_scale(self.accelerator, self.loss_scale, self.optimizer.optimizer, state.get("loss_scale", {}))
        if len(tensors["rng"]) == self.ranks.world_size:
            set_rng_state(tensors["rng"][self.ranks.rank])
        self.extra.update(state["extra"])
        self.step = step
        if self.ranks.is_main:
            self.run.rewind(step)
            self.report(f"resumed {self.run.path} after step {step} of {self.total_steps}")
        return step

    def weights(self) -> dict[str, Tensor]:
        """Full-precision weights and buffers on CPU, by name. Every rank must call it."""
        return model_state(self.accelerator, self.module)

    def save(self, step: int, *, last: bool = False) -> None:
        """Copy the state after `step` steps, and begin to write it as a checkpoint. Every rank must call it.

        While an earlier one is being written there is no copy of a second: this waits, and where that one hangs it
        skips the checkpoint.

        Raises:
            SaveFault: it is the `last` one, which must not be skipped.
        """
        self.at("saving")
        hindrance = self.ranks.broadcast(self.saver.hindrance(last=last) if self.saver is not None else "")
        self.at("step")
        if hindrance and last:
            raise SaveFault(_unsaved(f"the checkpoint of step {step} could not be written: {hindrance}"))
        if hindrance:
            return
        main = self.ranks.is_main
        tensors = {
            "model": model_state(self.accelerator, self.module, wanted=main),
            "optimizer": optimizer_state(self.accelerator, self.module, self.optimizer, wanted=main),
            "rng": self.ranks.gather(rng_state()),
        }
        if self.saver is not None:
            metric = self.saver.retention.metric
            state = {
                "extra": deepcopy(self.extra),
                "identity": self.identity,
                "world_size": self.ranks.world_size,
                "loss_scale": scale_state(self.accelerator, self.loss_scale),
                "metrics": {metric: self.run.latest[metric]} if metric in self.run.latest else {},
            }
            self.saver.submit(step, tensors, state)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is written. Every rank must call it.

        Raises:
            SaveFault: it could not be written, not even in half an hour.
        """
        failure = self.ranks.broadcast(self.saver.wait() if self.saver is not None else "")
        if failure:
            raise SaveFault(_unsaved(failure))

    def _lost(self, verdict: str) -> None:
        """End this process because another rank is lost; the collective it waits in would never return."""
        if self.saver is not None:
            self.saver.wait(LAST_SAVE_S)
        if self.ranks.rank == (0 if not verdict.startswith("rank 0 ") else 1):
            Attempts(self.run.path).end(self.step, cause=verdict, failed=True)
            write_exit(self.run.path, EXIT_FAILED, reason=verdict)
        leave_now(
            EXIT_FAILED, f"failed: {verdict}; all ranks stop, and the same command goes on from the last checkpoint"
        )


def _unsaved(failure: str) -> str:
    return f"{failure}: make room or mend the file system, then run the same command again"


def compute_deterministically() -> None:
    """Take GPU kernels that give the same bits every time, where torch has them; a warning names those it has not."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # the backward of the fast attention kernels adds up in any order; the plain one does not
    for kernel in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)


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
        InputError: the run folder belongs to another config, its last three attempts died at one step, or optimiser
            and launcher do not go together.
    """
    loop = config.loop
    if loop.deterministic and accelerator.device.type == "cuda":
        compute_deterministically()
    optimizer = build_optimizer(module, config.optim, accelerator=accelerator)
    retention = Retention.parse(last=loop.keep_checkpoints, every=loop.keep_every, best=loop.keep_best)
    ranks.on_main(lambda: _claim(run, resolved, loop))
    local_batch = batch_size // ranks.world_size
    loss_scale = configure_deepspeed(accelerator, module, local_batch=local_batch, clip_norm=config.optim.clip_norm)
    prepared, prepared_optimizer = accelerator.prepare(module, optimizer)
    prepared.train()
    if loss_scale is not None:
        loss_scale.attach(prepared_optimizer.optimizer)
    tracker = saver = None
    if ranks.is_main:
        tracker = Tracker(run, backend=loop.tracker, project=loop.project, config=resolved)
        saver = Saver(run.checkpoints, retention, report=report)
    return Training(
        accelerator=accelerator,
        ranks=ranks,
        run=run,
        tracker=tracker,
        saver=saver,
        module=prepared,
        optimizer=prepared_optimizer,
        schedule=build_schedule(
            config.optim, batch_size=batch_size, steps_per_epoch=steps_per_epoch, total_steps=total_steps
        ),
        config=loop,
        total_steps=total_steps,
        batch_size=batch_size,
        clip_norm=config.optim.clip_norm,
        identity=identity,
        extra={},
        report=report if ranks.is_main else silent,
        loss_scale=loss_scale,
    )


def _claim(run: RunFolder, resolved: dict[str, Any], loop: LoopConfig) -> None:
    run.claim(resolved, free=FREE_KEYS)
    clear_leftovers(run.checkpoints)
    steps = [step_of(path) for path in list_checkpoints(run.checkpoints)]
    logged = [line["step"] for line in run.metrics()]
    Attempts(run.path).begin(
        steps[-1] if steps else 0, last_logged=max(logged, default=0), ignore_failures=loop.ignore_failures
    )
