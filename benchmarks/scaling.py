"""Bytes that one training step sends, counted against the formula, and what follows for 8 to 1,024 GPUs on paper.

`python benchmarks/scaling.py` trains a student on 1 to 4 ranks of this machine (DDP over gloo) and reads from the
kernel how many bytes each rank's TCP connections have sent. The projection behind it is a model, not a measurement.
"""

import argparse
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.common import environment, report
from engine.launch import build_accelerator
from engine.settings import LoopConfig, OptimConfig
from pretrain.config import Config, DataConfig, ModelConfig
from pretrain.model import Student
from pretrain.trainer import train
from shards.generate import Config as SampleConfig
from shards.generate import generate
from shards.pack import pack
from shards.sources.image_folder import ImageFolder

BYTES_ACKED = (
    120  # offset of tcpi_bytes_acked (u64) in Linux's struct tcp_info: payload that the other side has received
)
SHORT, LONG = 2, 6  # steps of two trainings; start and end of a training cancel in their difference


@dataclass(frozen=True)
class Cluster:
    """Stated inputs of the projection: nothing of it was measured here.

    Attributes:
        gpus_per_node: GPUs that share the fast links.
        peak_tflops: dense bf16 of one GPU (NVIDIA H100 SXM data sheet).
        mfu: share of the peak that the step reaches when it waits for nobody.
        intra_gb_s: what one GPU sends within a node, GB/s (900 GB/s NVLink both ways, 80 % of one way).
        inter_gb_s: what one GPU sends between nodes, GB/s (80 % of the link's rate).
        hop_us: latency of one step of a ring between nodes, microseconds.
        overlap: share of the backward during which gradients travel for free.
    """

    gpus_per_node: int = 8
    peak_tflops: float = 989.0
    mfu: float = 0.35
    intra_gb_s: float = 360.0
    inter_gb_s: float = 40.0
    hop_us: float = 5.0
    overlap: float = 0.7


FAST = Cluster()  # one 400 Gb/s adapter a GPU
SLOW = Cluster(inter_gb_s=1.25, hop_us=15.0)  # one 100 Gb/s adapter a node of eight


@dataclass(frozen=True)
class Load:
    """What a step computes and sends, per rank; defaults: ResNet-50 at 224 with SimCLR's head, counted by hand.

    Attributes:
        parameters: trained numbers (23.5 M backbone, 2048-2048-128 head).
        buffers: bytes of batch-norm buffers, which rank 0 sends to everyone.
        embedding: width of the contrasted embedding.
        forward_gflop: of one view; the backward costs twice that.
    """

    parameters: int = 27_970_000
    buffers: int = 215_000
    embedding: int = 128
    forward_gflop: float = 8.2  # 4.1 G multiply-adds


def bytes_sent(load: Load, *, images: int, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends in one step, mean over ranks, by cause; the control plane is tens of bytes beside them.

    Rings: an all-reduce of n bytes sends 2 (W-1)/W n, an all-gather of n bytes a rank sends (W-1) n.

    Args:
        images: of one rank; each gives two rows of the contrast.
        ranks: W.
    """
    others, rows = ranks - 1, 2 * images
    return {
        "gradients": 2 * others / ranks * 4 * load.parameters,
        "batch-norm buffers": others / ranks * load.buffers,
        "embeddings": others * rows * 4 * load.embedding,
        "validity": others * rows,
        "backward of the contrast": others * rows * 8,  # log-sum-exp and weight of each row
    }


def project(load: Load, cluster: Cluster, *, images: int, gpus: int) -> dict[str, float]:
    """Step time on paper, seconds, and its efficiency: compute alone over compute and what is not hidden behind it."""
    sent = bytes_sent(load, images=images, ranks=gpus)
    rows, columns = 2 * images, 2 * images * gpus
    backbone = 3 * rows * load.forward_gflop * 1e9
    contrast = 4 * 2 * rows * columns * load.embedding  # logits, their recomputation, and two products of the backward
    rate = cluster.peak_tflops * 1e12 * cluster.mfu
    compute = (backbone + contrast) / rate
    nodes = max(1, gpus // cluster.gpus_per_node)
    local = min(gpus, cluster.gpus_per_node)
    # gradients: reduced within a node, then each GPU's share between nodes, then spread within the node again
    size = 4 * load.parameters
    gradients = 2 * (local - 1) / local * size / (cluster.intra_gb_s * 1e9)
    gradients += 2 * (nodes - 1) / nodes * size / local / (cluster.inter_gb_s * 1e9)
    gradients += 2 * (nodes - 1) * cluster.hop_us * 1e-6
    hidden = cluster.overlap * 2 / 3 * compute
    # between nodes, rings run over all adapters of a node at once
    bandwidth = (cluster.intra_gb_s if nodes == 1 else min(cluster.intra_gb_s, local * cluster.inter_gb_s)) * 1e9
    waiting = sum(v for name, v in sent.items() if name != "gradients") / bandwidth
    waiting += 4 * max(nodes - 1, 1) * cluster.hop_us * 1e-6  # four collectives that nothing hides
    exposed = max(0.0, gradients - hidden) + waiting
    return {"compute_s": compute, "exposed_s": exposed, "efficiency": compute / (compute + exposed)}


def main() -> None:
    """Measure, project, and write `results/scaling.{json,md}`."""
    options = _options()
    if options.child is not None:
        _train_and_count(options)
        return
    config = _config(options, Path("unused"), steps=1)
    student = Student(config, num_classes=0)
    load = Load(
        parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        buffers=sum(b.numel() * b.element_size() for b in student.buffers()),
        embedding=config.model.projector_out,
    )
    rows, ratios = [], []
    for ranks in options.ranks:
        counted = statistics.fmean(_measure(options, ranks))
        expected = bytes_sent(load, images=options.batch_size // ranks, ranks=ranks)
        total = sum(expected.values())
        parts = " + ".join(f"{value:,.0f} {name}" for name, value in expected.items() if value)
        ratios += [counted / total] if total else []
        shown = f"{ratios[-1]:.4f}" if total else "-"
        rows.append(f"| {ranks} | {counted:,.0f} | {total:,.0f} | {shown} | {parts or 'nothing'} |")
    worst = max(ratios, key=lambda value: abs(value - 1))
    counts = "\n".join(["| Ranks | Counted | Formula | Ratio | Formula's parts |", "|---|---|---|---|---|", *rows])
    projected, table = _projection()
    report(
        "scaling",
        figures={"bytes_vs_formula": worst, **projected},
        environment=environment(
            backbone=options.backbone, image_size=options.image_size, batch_size=options.batch_size,
            ranks=options.ranks, steps=LONG - SHORT, load=asdict(load),
        ),
        title="Bytes of a step against the formula, and the projection to many GPUs",
        notes=(
            "`bytes_vs_formula` is the ratio furthest from 1 over the numbers of ranks. Counted are the bytes that "
            "left each rank per step: the kernel's `tcpi_bytes_acked` of every TCP connection of the process (DDP over "
            f"gloo), a training of {LONG} steps minus one of {SHORT}, mean over ranks. What the formula leaves out is "
            "gloo's message headers, the step's agreement on stopping, and DDP's padding.\n\n"
            "**The `projected_...` figures are a model on paper, not measurements**: no cluster was used."
        ),
        table=f"## Bytes a rank sends in a step\n\n{counts}\n\n{table}",
    )  # fmt: skip


def _projection() -> tuple[dict[str, float], str]:
    """Projected efficiencies, and their table with every input."""
    load, figures = Load(), {}
    lines = ["| GPUs | 400 Gb/s a GPU | 100 Gb/s a node | 400 Gb/s a GPU, batch 8,192 in all |", "|---|---|---|---|"]
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        weak = [project(load, cluster, images=128, gpus=gpus)["efficiency"] for cluster in (FAST, SLOW)]
        strong = project(load, FAST, images=8192 // gpus, gpus=gpus)["efficiency"]
        lines.append(f"| {gpus} | {weak[0]:.3f} | {weak[1]:.3f} | {strong:.3f} |")
        if gpus in (8, 64, 1024):
            figures[f"projected_efficiency_{gpus}"] = weak[0]
    inputs = "\n".join(f"- {name}: {json.dumps(asdict(value))}" for name, value in _inputs(load).items())
    text = (
        "## Projection (a model, not measured)\n\n"
        "Efficiency is computing alone over computing plus what the network does not hide; ResNet-50 student at 224, "
        "128 images a GPU in the first two columns. The gradients' all-reduce runs in rings, within nodes and then "
        "between them over all adapters of a node, and hides behind the stated share of the backward; batch-norm "
        "buffers, embeddings and the contrast's backward hide behind nothing. No data wait, no checkpoints, no "
        "synchronised batch norm.\n\n"
    )
    return figures, f"{text}{chr(10).join(lines)}\n\nInputs (units in `benchmarks/scaling.py`):\n\n{inputs}"


def _inputs(load: Load) -> dict[str, Any]:
    return {"ResNet-50 student": load, "400 Gb/s a GPU": FAST, "100 Gb/s a node": SLOW}


def _measure(options: argparse.Namespace, ranks: int) -> list[float]:
    """Bytes that each rank sent per step."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        sizes = {"num_train": 96, "num_val": 1, "num_gaze_train": 1, "num_gaze_val": 1, "image_size": 64}
        generate(SampleConfig(output=images, num_workers=1, **sizes))
        pack(ImageFolder(images / "images" / "train"), Path(folder) / "shards", shard_samples=24)
        same = [f"--backbone={options.backbone}", f"--image_size={options.image_size}"]
        same += [f"--batch_size={options.batch_size}", f"--child={folder}"]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
        subprocess.run([sys.executable, *launcher, __file__, *same], check=True, stdout=subprocess.DEVNULL)
        return [float((Path(folder) / f"rank{rank}").read_text()) for rank in range(ranks)]


def _train_and_count(options: argparse.Namespace) -> None:
    """One rank: two trainings of different length in one process group; writes bytes per step of their difference."""
    build_accelerator()
    totals = [_sent()]
    for steps in (SHORT, LONG):
        train(_config(options, options.child, steps=steps))
        if dist.is_initialized():
            dist.barrier()
        time.sleep(0.5)  # acknowledgements come a little later
        totals.append(_sent())
    first, second = totals[1] - totals[0], totals[2] - totals[1]
    (options.child / f"rank{os.environ['RANK']}").write_text(str((second - first) / (LONG - SHORT)))


def _sent() -> int:
    """Payload bytes that this process's open TCP connections have sent and the other side has received."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + 8)
                    total += struct.unpack_from("<Q", facts, BYTES_ACKED)[0]
        except OSError:  # the descriptor of the listing itself, or a connection that has just ended
            continue
    return total


def _config(options: argparse.Namespace, folder: Path, *, steps: int) -> Config:
    return Config(
        run=f"steps{steps}",
        runs=folder / "runs",
        arm="contrastive",
        max_steps=steps,
        data=DataConfig(
            shards=folder / "shards", labels=None, batch_size=options.batch_size, image_size=options.image_size
        ),
        model=ModelConfig(backbone=options.backbone, projector_hidden=512),
        optim=OptimConfig(name="sgd", lr=0.01, warmup_epochs=0.0),
        loop=LoopConfig(log_every=1000, checkpoint_every=1000, tracker="none", num_workers=0),
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[1, 2, 3, 4], help="ranks to try (default: %(default)s)"
    )
    parser.add_argument("--backbone", default="resnet18", help="of the measured student (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=48, help="images over all ranks (default: %(default)s)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
