"""Memory and time of NT-Xent against the full matrix and lightly's loss: `python benchmarks/loss.py`.

One process plays one rank of many: the other ranks' normalised embeddings lie in memory as if just gathered, for both
losses. Each loss's memory is the growth of a fresh process's peak during one forward and backward (on a GPU, of the
allocator's); time is measured in pairs in one process.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightly.loss import NTXentLoss
from torch import Tensor
from torch.nn import functional

from benchmarks.common import environment, ratio_of_pairs, report, time_pairs
from pretrain.contrast import Exchange, nt_xent

TEMPERATURE = 0.1


class OtherRanks(Exchange):
    """An exchange whose other ranks' rows are there already; lse and gradient weights of theirs are made up."""

    others: Tensor

    def gather(self, rows: Tensor) -> Tensor:
        """Embeddings as given; every other quantity as if all ranks had this rank's."""
        if rows.shape[1:] == self.others.shape[1:]:
            self.others[: len(rows)] = rows
            return self.others
        return rows.repeat(len(self.counts), *[1] * (rows.ndim - 1))


class _OtherParts(torch.autograd.Function):
    """lightly's gather without its communication: this rank's part and the others', gradient to this rank's."""

    @staticmethod
    def forward(context: Any, mine: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        context.num_others = len(others)
        return (mine.clone(), *(part.view_as(part) for part in others))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], *[None] * context.num_others


def main() -> None:
    """Measure and write `results/loss.{json,md}`."""
    options = _options()
    shape = (options.rows, options.columns, options.dim, options.device)
    full = 4 * options.rows * options.columns
    memory = {name: in_fresh_process(_extra_memory, name, shape) for name in ("ours", "lightly")}
    steps = _steps(*shape)
    agreement = abs(steps["ours"]() / steps["lightly"]() - 1)
    ours, theirs = time_pairs(steps["ours"], steps["lightly"], num_pairs=options.pairs)
    report(
        "loss",
        figures={
            "memory_vs_full": full / memory["ours"],
            "memory_vs_lightly": memory["lightly"] / memory["ours"],
            "time_vs_lightly": ratio_of_pairs(ours, theirs),
            "extra_mib": memory["ours"] / 2**20,
            "full_matrix_mib": full / 2**20,
            "lightly_extra_mib": memory["lightly"] / 2**20,
            "seconds": min(ours),
            "lightly_seconds": min(theirs),
            "loss_relative_difference": agreement,
        },
        environment=environment(
            rows=options.rows, columns=options.columns, dim=options.dim, pairs=options.pairs,
            temperature=TEMPERATURE,
        ),
        title="NT-Xent by tiles",
        notes=(
            "`memory_vs_full` is the size of one fp32 matrix of all logits (local rows x global columns), held once, "
            "over the extra memory of our forward and backward; `memory_vs_lightly` compares with the measured extra "
            "memory of lightly's `NTXentLoss(gather_distributed=True)`; `time_vs_lightly` is the median over pairs of "
            "lightly's seconds over ours, forward and backward. The gathered embeddings of the other ranks are inputs "
            "of both and count in neither; nothing is sent, and lightly's all-reduce of the columns' gradients, which "
            "ours does not need, is left out of its time and memory."
        ),
    )  # fmt: skip


def _steps(rows: int, columns: int, dim: int, device: str) -> dict[str, Callable[[], float]]:
    """Forward and backward of one rank under each loss; each returns its loss."""
    generator = torch.Generator().manual_seed(0)
    batch, world = rows // 2, columns // rows
    views = [torch.randn(batch, dim, generator=generator).to(device).requires_grad_() for _ in range(2)]
    others = functional.normalize(torch.randn(columns, dim, generator=generator).to(device), dim=1)
    exchange = OtherRanks((rows,) * world)
    object.__setattr__(exchange, "others", others)
    parts = [torch.stack(list(others.view(world, 2, batch, dim)[1:, view])).unbind() for view in range(2)]
    theirs = NTXentLoss(temperature=TEMPERATURE, gather_distributed=True)

    def finish(loss: Tensor) -> float:
        loss.backward()  # type: ignore[no-untyped-call]
        for view in views:
            view.grad = None
        return loss.item()

    def lightly() -> float:
        turn = iter(parts)
        with (
            mock.patch("lightly.utils.dist.world_size", lambda: world),
            mock.patch("lightly.utils.dist.gather", lambda mine: _OtherParts.apply(mine, *next(turn))),
        ):
            return finish(theirs(*views))

    return {
        "ours": lambda: finish(nt_xent(views[0], views[1], temperature=TEMPERATURE, exchange=exchange)),
        "lightly": lightly,
    }


def _extra_memory(name: str, shape: tuple[int, int, int, str]) -> int:
    rows, _, dim, device = shape
    _steps(rows, 2 * rows, dim, device)[name]()  # libraries allocate their workspaces at first use
    return peak_growth(_steps(*shape)[name], device)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own, whose memory nothing else has touched."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_growth(step: Callable[[], object], device: str) -> int:
    """Bytes by which the peak during `step` exceeds what was held before: of the GPU's allocator, or of the process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512, help="local rows, two per image (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=131072, help="rows of all ranks (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="of an embedding (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device, help="(default: %(default)s)")
    options = parser.parse_args()
    if options.rows % 2 or options.columns % options.rows:
        parser.error("--rows must be even and divide --columns: all ranks hold equally many")
    return options


if __name__ == "__main__":
    main()
