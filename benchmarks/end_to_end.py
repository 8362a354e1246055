"""Training from JPEGs against lightly's documented SimCLR loop:

    python benchmarks/end_to_end.py --source FOLDER [--epochs 4] [--size 64] [--batch 256]
    python benchmarks/end_to_end.py --source FOLDER --size 224 --backbone resnet50 --batch 512 --num_workers 16 \
        --compile --warmup 20                                   where a GPU is at hand

FOLDER holds train/<class>/*.jpg and val/<class>/*.jpg, e.g. Imagenette at 128 pixels; without val/ nothing is probed.
By turns in one run, the same machine and number of loader processes: lightly's loop (torchvision's ImageFolder,
SimCLRTransform, a DataLoader, SimCLRProjectionHead, NTXentLoss) and `pretrain/` on shards of the same images. Both
train the same timm backbone from the same weights, with the same batch, views, steps and optimiser. lightly's loop runs
in fp32, as its documentation has it, or with `--lightly_precision bf16`; ours in the precision of its recipe. Images
per second count everything from the file to the optimiser's step, after `--warmup` steps in which compilers and loaders
start. The probe is a logistic regression on frozen, standardised features of the centre crop, the same for both.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from common import add_source, environment, report
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

from engine.settings import LoopConfig, OptimConfig
from pretrain.config import Config, DataConfig, ModelConfig
from pretrain.encoder import load_encoder
from pretrain.trainer import train
from shards.pack import pack
from shards.sources.image_folder import ImageFolder as FolderSource

TEMPERATURE, HIDDEN, OUT = 0.5, 512, 128  # lightly's example
LOG_EVERY = 5  # steps; every report of ours waits for the device
MOMENTUM, DECAY = 0.9, 5e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Run:
    """What one training gave."""

    images_per_s: float
    data_wait: float
    encoder: nn.Module


@dataclass
class Side:
    """All trainings of one side."""

    runs: list[Run] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)


def main() -> None:
    """Measure and write `results/end_to_end.{json,md}`."""
    options = _options()
    ours, theirs = Side(), Side()
    probe = Probe(options) if (options.source / "val").is_dir() else None
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        source = options.source / "train"
        pack(FolderSource(source), shards, shard_samples=1000)
        count = len(ImageFolder(str(source)))
        steps = options.warmup + max(1, round(options.epochs * (count // options.batch)))
        for turn in range(options.turns):
            theirs.runs.append(train_lightly(options, steps=steps, seed=turn))
            ours.runs.append(train_ours(options, shards, Path(folder) / "runs", steps=steps, seed=turn))
            print(f"turn {turn}: {ours.runs[-1].images_per_s:.0f}, lightly {theirs.runs[-1].images_per_s:.0f} images/s")
            if probe:
                for side in (theirs, ours):
                    side.top1.append(probe.top1(side.runs[-1].encoder))
    floor = probe.top1(make_backbone(options, seed=0)) if probe else None
    _report(options, ours, theirs, floor=floor, steps=steps, num_images=count)


def make_backbone(options: argparse.Namespace, *, seed: int) -> nn.Module:
    """The backbone that both train, random."""
    torch.manual_seed(seed)
    return timm.create_model(options.backbone, num_classes=0)


def train_lightly(options: argparse.Namespace, *, steps: int, seed: int) -> Run:
    """SimCLR as lightly's documentation writes it, for the given number of steps."""
    device = torch.device(options.device)
    backbone = make_backbone(options, seed=seed)
    model = nn.Sequential(backbone, SimCLRProjectionHead(backbone.num_features, HIDDEN, OUT)).to(device).train()
    dataset = ImageFolder(str(options.source / "train"), transform=SimCLRTransform(input_size=options.size))
    loader = DataLoader(
        dataset, batch_size=options.batch, shuffle=True, drop_last=True, num_workers=options.num_workers
    )
    criterion = NTXentLoss(temperature=TEMPERATURE)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=MOMENTUM, weight_decay=DECAY)
    waited, started = 0.0, 0.0
    batches = _endless(loader)
    for step in range(steps):
        if step == options.warmup:
            waited, started = 0.0, _clock(device)
        asked = time.perf_counter()
        (first, second), _ = next(batches)
        waited += time.perf_counter() - asked
        with torch.autocast(device.type, torch.bfloat16, enabled=options.lightly_precision == "bf16"):
            embeddings = [model(view.to(device)) for view in (first, second)]
        loss = criterion(*(embedding.float() for embedding in embeddings))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = _clock(device) - started
    return Run((steps - options.warmup) * options.batch / seconds, waited / seconds, backbone.cpu())


def train_ours(options: argparse.Namespace, shards: Path, runs: Path, *, steps: int, seed: int) -> Run:
    """The same by `pretrain/`; its own clocks, which count the wait for data and all of the step."""
    config = Config(
        run=f"turn-{seed}",
        runs=runs,
        arm="contrastive",
        max_steps=steps,
        temperature=TEMPERATURE,
        precision=options.precision,
        seed=seed,
        channels_last=True,
        compile=options.compile,
        diagnostics_every=0,
        data=DataConfig(shards=shards, labels=None, batch_size=options.batch, image_size=options.size),
        model=ModelConfig(backbone=options.backbone, projector_hidden=HIDDEN, projector_out=OUT),
        optim=OptimConfig(
            name="sgd",
            lr=options.lr,
            lr_scaling="none",
            momentum=MOMENTUM,
            weight_decay=DECAY,
            warmup_epochs=0.0,
            schedule="constant",
            fused=options.device == "cuda",
        ),
        loop=LoopConfig(log_every=LOG_EVERY, checkpoint_every=10**9, num_workers=options.num_workers, tracker="none"),
    )
    run = train(config)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").open()]
    lines = [line for line in lines if "time/step_s" in line and line["step"] > options.warmup]
    step_s = statistics.mean(line["time/step_s"] for line in lines)
    waited = statistics.mean(line["time/data_wait"] * line["time/step_s"] for line in lines)
    return Run(options.batch / step_s, waited / step_s, load_encoder(run.path / "encoder"))


class Probe:
    """Top-1 of a logistic regression on frozen features."""

    def __init__(self, options: argparse.Namespace) -> None:
        crop = transforms.Compose(
            [
                transforms.Resize(round(options.size / 0.875)),
                transforms.CenterCrop(options.size),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        self.device, self.workers = torch.device(options.device), options.num_workers
        self.sets = []
        for split in ("train", "val"):
            images: Any = ImageFolder(str(options.source / split), transform=crop)
            if len(images) > options.probe_images:
                images = Subset(
                    images, np.linspace(0, len(images) - 1, options.probe_images).round().astype(int).tolist()
                )
            loader = DataLoader(images, batch_size=256, num_workers=self.workers)
            parts = list(loader)
            self.sets.append((torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts]).numpy()))

    @torch.no_grad()
    def top1(self, encoder: nn.Module) -> float:
        """Per cent of the validation images."""
        encoder = encoder.to(self.device).eval()
        features = [
            torch.cat([encoder(part.to(self.device)).float().cpu() for part in images.split(256)]).numpy()
            for images, _ in self.sets
        ]
        scale = StandardScaler().fit(features[0])
        model = LogisticRegression(C=0.01, max_iter=300).fit(scale.transform(features[0]), self.sets[0][1])
        return 100 * float(model.score(scale.transform(features[1]), self.sets[1][1]))


def flops_per_image(options: argparse.Namespace) -> float:
    """Forward and backward of both views of an image, without the heads."""
    backbone = make_backbone(options, seed=0)
    counter = FlopCounterMode(display=False)
    with counter:
        backbone(torch.zeros(2, 3, options.size, options.size)).sum().backward()
    return float(counter.get_total_flops())


def _endless(loader: DataLoader[Any]) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    return itertools.chain.from_iterable(loader for _ in itertools.count())


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _report(
    options: argparse.Namespace, ours: Side, theirs: Side, *, floor: float | None, steps: int, num_images: int
) -> None:
    pairs = list(zip(ours.runs, theirs.runs, strict=True))
    speed = statistics.median(one.images_per_s for one in ours.runs)
    figures = {
        "throughput_vs_lightly": statistics.median(one.images_per_s / other.images_per_s for one, other in pairs),
        "images_per_s": speed,
        "lightly_images_per_s": statistics.median(other.images_per_s for _, other in pairs),
        "data_wait": statistics.median(one.data_wait for one, _ in pairs),
        "lightly_data_wait": statistics.median(other.data_wait for _, other in pairs),
    }
    if floor is not None:
        figures["probe_minus_lightly"] = statistics.mean(ours.top1) - statistics.mean(theirs.top1)
        figures["probe_top1"] = statistics.mean(ours.top1)
        figures["lightly_probe_top1"] = statistics.mean(theirs.top1)
        figures["random_probe_top1"] = floor
        if len(pairs) > 1:
            differences = [own - peer for own, peer in zip(ours.top1, theirs.top1, strict=True)]
            figures["probe_minus_lightly_deviation"] = statistics.stdev(differences)
    if options.peak_tflops:
        figures["mfu"] = speed * flops_per_image(options) / (options.peak_tflops * 1e12)
    rows = []
    for turn, ((one, other), own, peer) in enumerate(itertools.zip_longest(pairs, ours.top1, theirs.top1)):
        probes = f"{own:.2f} | {peer:.2f}" if floor is not None else "- | -"
        rows.append(f"| {turn} | {one.images_per_s:.0f} | {other.images_per_s:.0f} | {probes} |")
    names = ("backbone", "size", "batch", "precision", "lightly_precision", "compile", "num_workers", "warmup")
    given = {name: getattr(options, name) for name in names}
    report(
        "end_to_end" if options.lightly_precision == "no" else "end_to_end_bf16",
        figures=figures,
        environment=environment(**given, num_images=num_images, steps=steps, turns=options.turns, lr=options.lr),
        title="Training from JPEGs against lightly's documented SimCLR loop",
        notes=(
            "`throughput_vs_lightly`: images per second of `pretrain/` over lightly's loop, median over turns, from "
            "file to optimiser step, on the same number of loader processes. `probe_minus_lightly`: difference of the "
            "means of linear top-1 (logistic regression on standardised frozen features), percentage points. Both: "
            "the same backbone and starting weights, batch, views (SimCLR's, as lightly's transform has them by "
            "default), steps, SGD. lightly's loop runs as documented, in fp32 unless told otherwise; ours in bf16"
            f"{', compiled,' if options.compile else ''} and channels-last memory order (the page whose name ends in "
            "_bf16 has both sides in bf16). `..._deviation`: over the turns, each with a seed of its own. Packing "
            "the shards, once, is left out. `data_wait`: share of the time in which the training waited for a batch."
        ),
        table="\n".join(
            ["| turn | images/s | lightly | top-1 | lightly |", "|---|---|---|---|---|", *rows]
        ),
    )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add_source(parser, holds="train/ and val/ image folders", below="imagenette128")
    parser.add_argument("--epochs", type=float, default=4, help="passes of each training (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="trainings of each side (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of a view, pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images a step (default: %(default)s)")
    parser.add_argument("--backbone", default="resnet18", help="timm model (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.06, help="SGD, constant; lightly's (default: %(default)s)")
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16", help="ours (default: %(default)s)")
    parser.add_argument("--lightly_precision", choices=["no", "bf16"], default="no", help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps first (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device, help="(default: %(default)s)")
    parser.add_argument("--probe_images", type=int, default=10000, help="of each split (default: %(default)s)")
    parser.add_argument(
        "--peak_tflops", type=float, default=0, help="of the device, dense, for the MFU; 0: leave it out"
    )
    options = parser.parse_args()
    if options.warmup % LOG_EVERY:
        parser.error(f"--warmup must be a multiple of {LOG_EVERY}")
    return options


if __name__ == "__main__":
    main()
