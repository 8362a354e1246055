"""What each option costs or gains in a training step: `python benchmarks/step.py [--device cuda]`.

Every option is timed in pairs with the plain student (eager, contiguous, unfused, no average, no attention) in one run:
the same pixels in memory, forward, loss, backward and optimiser, without the data loader. Memory is the growth of a
fresh process's peak (on a GPU, of the allocator's) during one step over what weights, optimiser and batch take. The
attention arm is measured on a ResNet-50 at 224 pixels, and its share of the floating-point operations is counted as
well.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import environment, ratio_of_pairs, report, time_pairs
from benchmarks.loss import in_fresh_process, peak_growth
from engine.optim import build_optimizer
from engine.passes import Backward
from engine.settings import OptimConfig
from pretrain.assemble import assemble_student
from pretrain.config import Config, DataConfig, ModelConfig
from pretrain.data import Batch
from pretrain.model import Student, input_statistics
from pretrain.objective import Objective

OPTIONS = ("compile", "channels_last", "fused", "gradient_checkpointing", "ema")


@dataclass(frozen=True)
class Size:
    """What a step is measured on; `batch` counts images, two views each."""

    backbone: str
    image_size: int
    batch: int


class Step:
    """One training step of a config on a batch that lies on the device."""

    def __init__(self, config: Config, accelerator: Accelerator, batch: Batch) -> None:
        torch.manual_seed(0)
        student = assemble_student(config, num_classes=10, accelerator=accelerator)
        optimizer = build_optimizer(student, config.optim, accelerator=accelerator)
        self.student, self.module = student, accelerator.prepare_model(student)
        self.optimizer, self.batch = accelerator.prepare_optimizer(optimizer), batch
        self.objective = Objective(self.module, config, input_statistics(student.backbone), accelerator.device)
        self.accelerator, self.step = accelerator, 0

    def __call__(self) -> None:
        """Forward, loss, backward, optimiser, and the average where there is one."""
        if self.student.average is not None:
            self.student.average.update(self.student, step=self.step)
        self.objective(self.batch, step=self.step, backward=Backward(self.accelerator, self.module))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Measure and write `results/step.{json,md}`."""
    options = _options()
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=options.precision)
    on_gpu = options.device == "cuda"
    large = Size("resnet50", 224, options.batch or (128 if on_gpu else 16))
    small = large if on_gpu else Size("resnet18", 64, 32)
    # the processor time of this process on a CPU: other programs disturb it less
    clock = time.perf_counter if on_gpu else time.process_time
    attention = _attention_pairs(accelerator, large, pairs=options.pairs, clock=clock)
    cost = 1 / ratio_of_pairs(*attention) - 1
    share = attention_flops_share(large)
    rows = [_row("attention arm", large, attention)]
    figures = {"attention_step_cost": cost, "attention_flops_share": share}
    for name in OPTIONS:
        pairs = _option_pairs(name, accelerator, small, pairs=options.pairs, clock=clock)
        figures[f"{name}_vs_plain"] = ratio_of_pairs(*pairs)
        rows.append(_row(name, small, pairs))
    # so many images that activations, and not the optimiser's scratch space, make the peak
    memory, memory_rows = _memory(large, large if on_gpu else replace(small, batch=128), options)
    figures |= memory
    report(
        "step",
        figures=figures,
        environment=environment(
            threads=torch.get_num_threads(),
            precision=options.precision, pairs=options.pairs,
        ),
        title="What options cost or gain in a training step",
        notes=(
            "`attention_step_cost`: the attention arm's step time over the contrastive arm's, minus 1 (ResNet-50, 224 "
            "px, one head on the last stage); `attention_flops_share`: the same on paper, forward and backward. "
            "`<option>_vs_plain`: plain step time over the option's, above 1 meaning that the option is faster. All "
            "are medians over pairs in one run; the data loader is left out. `<option>_memory_vs_plain`: what a plain "
            "step adds to the peak of a fresh process (on a GPU: of the allocator) beyond weights, gradients, "
            "optimiser and batch, over what the option's step adds, above 1 meaning that the option needs less; "
            "`attention_memory_cost`: the attention arm's over the contrastive arm's, minus 1. What an option keeps "
            "between steps, as `ema` a copy of the weights, is not in it."
        ),
        table="\n".join(
            [
                "| what | backbone | px | images | s/step with | s/step without |", "|---|---|---|---|---|---|", *rows,
                "",
                "| what | backbone | px | images | MiB with | MiB without |", "|---|---|---|---|---|---|", *memory_rows,
            ]
        ),
    )  # fmt: skip


def _attention_pairs(accelerator: Accelerator, size: Size, **timing: Any) -> tuple[list[float], list[float]]:
    batch = synthetic_batch(size, device=accelerator.device)
    steps = [Step(_config(size, arm=arm), accelerator, batch) for arm in ("contrastive+attention", "contrastive")]
    return _time(steps, **timing)


def _option_pairs(name: str, accelerator: Accelerator, size: Size, **timing: Any) -> tuple[list[float], list[float]]:
    batch = synthetic_batch(size, device=accelerator.device)
    return _time([Step(config, accelerator, batch) for config in _with_and_without(name, size)], **timing)


def _with_and_without(name: str, size: Size) -> list[Config]:
    plain = _config(size, arm="contrastive")
    changed = {
        "compile": replace(plain, compile=True),
        "channels_last": replace(plain, channels_last=True),
        "fused": replace(plain, optim=replace(plain.optim, fused=True)),
        "gradient_checkpointing": replace(plain, model=replace(plain.model, gradient_checkpointing=True)),
        "ema": replace(plain, ema=0.999),
    }
    return [changed[name], plain]


def _memory(large: Size, small: Size, options: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """Figures and rows of the table: what a step adds to the peak of a process of its own, by option."""

    def growth(config: Config, size: Size) -> int:
        # blocks go back to the system as soon as they are freed, and what is resident is what is in use
        with mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
            return int(in_fresh_process(_step_growth, config, size, options.device, options.precision))

    arms = [growth(_config(large, arm=arm), large) for arm in ("contrastive+attention", "contrastive")]
    figures = {"attention_memory_cost": arms[0] / arms[1] - 1}
    rows = [_memory_row("attention arm", large, *arms)]
    plain = growth(_config(small, arm="contrastive"), small)
    for name in OPTIONS:
        if name != "compile":  # the compiler takes more than the step
            found = growth(_with_and_without(name, small)[0], small)
            figures[f"{name}_memory_vs_plain"] = plain / found
            rows.append(_memory_row(name, small, found, plain))
    return figures, rows


def _step_growth(config: Config, size: Size, device: str, precision: str) -> int:
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision)
    # a few images bring gradients, the optimiser's state and the libraries' workspaces; memory that the whole batch
    # left behind in the process would hide what its next step takes
    step = Step(config, accelerator, synthetic_batch(replace(size, batch=2), device=accelerator.device))
    step()
    step.batch = synthetic_batch(size, device=accelerator.device)
    return peak_growth(step, device)


def _time(steps: list[Step], *, pairs: int, clock: Callable[[], float]) -> tuple[list[float], list[float]]:
    times = time_pairs(steps[0], steps[1], num_pairs=pairs, warmup=2, clock=clock)
    steps.clear()
    gc.collect()
    return times


def attention_flops_share(size: Size) -> float:
    """Floating-point operations that the attention head adds to forward and backward, as a share of those without."""
    counts = []
    for arm in ("contrastive", "contrastive+attention"):
        student = Student(_config(size, arm=arm), num_classes=10)
        counter = FlopCounterMode(display=False)
        with counter:
            output = student(torch.zeros(2, 3, size.image_size, size.image_size))
            assert output.embeddings is not None
            sum((one.sum() for one in output.attention), start=output.embeddings.sum()).backward()
        counts.append(counter.get_total_flops())
    return counts[1] / counts[0] - 1


def synthetic_batch(size: Size, *, device: torch.device) -> Batch:
    """Random pixels and maps, with the crops and colours of SimCLR's views."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, size.batch, size.image_size, size.image_size, 3)
    colours = torch.zeros(2, size.batch, 8)
    colours[..., 4] = -1  # no jitter: the same for all that is compared
    batch = Batch(
        images=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        boxes=torch.tensor([0.1, 0.2, 0.6, 0.5]).expand(2, size.batch, 4).contiguous(),
        flips=torch.rand(2, size.batch, generator=generator) < 0.5,
        colours=colours,
        maps=torch.rand(size.batch, 56, 56, generator=generator),
        labels=torch.zeros(size.batch, dtype=torch.int64),
        valid=torch.ones(size.batch, dtype=torch.bool),
        bad=[],
    )
    return batch.to(device)


def _config(size: Size, *, arm: Any) -> Config:
    return Config(
        arm=arm,
        diagnostics_every=0,
        data=DataConfig(batch_size=size.batch, image_size=size.image_size),
        model=ModelConfig(backbone=size.backbone),
        optim=OptimConfig(name="adamw", lr=1e-4, lr_scaling="none"),
    )


def _row(name: str, size: Size, times: tuple[list[float], list[float]]) -> str:
    seconds = [sorted(one)[len(one) // 2] for one in times]
    return f"| {name} | {size.backbone} | {size.image_size} | {size.batch} | {seconds[0]:.4g} | {seconds[1]:.4g} |"


def _memory_row(name: str, size: Size, *peaks: int) -> str:
    mib = " | ".join(f"{peak / 2**20:.4g}" for peak in peaks)
    return f"| {name} | {size.backbone} | {size.image_size} | {size.batch} | {mib} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, help="images a step of the ResNet-50 (default: 16 on a CPU, 128 on a GPU)")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs of each comparison (default: %(default)s)")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="bf16", help="(default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
