"""Every evaluator on real encoders: `python benchmarks/evaluators.py --runs RUN ... --shards FOLDER --gaze FOLDER`.

Encoders: the given runs, the first one's architecture with random weights, and EfficientNet-Lite0 with ImageNet's
weights (from PyPI) as an upper anchor; on the images that the runs learned from (`--shards`, with train/ and val/) and,
with `--cifar` (train/ and test/), on CIFAR-10, enlarged to the encoder's input. First the corrupted images of each set
are made once, by all cores; then `--jobs` encoders are evaluated side by side, each in a process of its own. The given
runs are copied into `--work`, and nothing is written into them. What is finished is not done again: it may be stopped
and started at any time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import environment
from evaluators_tables import write_results

from engine.package_weights import PYPI_BACKBONE, package_weights
from engine.program import config_to_dict
from engine.progress import silent
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.config import Config
from pretrain.encoder import load_heads, write_encoder
from pretrain.evaluators.checkpoints import fit_state
from pretrain.evaluators.corruptions import ALL
from pretrain.evaluators.imagenet_c import CorruptedSets
from pretrain.evaluators.reading import Ahead, Job
from pretrain.evaluators.shared_work import run_share
from pretrain.evaluators.sources import val_images
from pretrain.evaluators.subjects import open_subject, read_run_config
from pretrain.model import build_backbone
from pretrain.probe_array_config import ProbeArrayConfig
from pretrain.probe_config import CorruptionConfig, FinetuneConfig, GazeConfig, KnnConfig, ProbeConfig, RetrievalConfig

CLEAN = ("linear_probe", "knn", "retrieval", "alignment", "finetune")
CORRUPTED = ("imagenet_c", "robust_gaze")
MAPS = ("alignment", "robust_gaze")
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Images:
    """A labelled data set."""

    name: str
    title: str
    train: Path
    val: Path
    crop: float
    finetune_epochs: int


@dataclass(frozen=True)
class Encoder:
    """A run folder under `--work` and the images that it is measured on."""

    images: Images
    path: Path
    size: int

    @property
    def name(self) -> str:
        return f"{self.images.name}/{self.path.name}"


def main() -> None:
    """Make what is missing, evaluate what is missing, write `results/evaluators.{json,md}`."""
    options = _options()
    encoders = prepare(options)
    if options.only is not None:
        (chosen,) = [encoder for encoder in encoders if encoder.name == options.only]
        (make_images if options.images_only else evaluate)(chosen, options)
        return
    if not options.tables:
        if set(CORRUPTED) & set(options.evaluators):
            _run_self([each.name for each in {(e.images.name, e.size): e for e in encoders}.values()], images_only=True)
        _run_self([encoder.name for encoder in encoders], jobs=options.jobs)
    write_results(
        {encoder.name: encoder.path for encoder in encoders},
        sets={each.images.name: each.images.title for each in encoders},
        sizes={each.name: each.size for each in encoders},
        notes=_notes(options),
        environment=environment(limit=options.limit, jobs=options.jobs),
    )


def prepare(options: argparse.Namespace) -> list[Encoder]:
    """The encoders as run folders under `--work`: copies of the runs, random weights, and the anchor."""
    train, val = options.shards / "train", options.shards / "val"
    main_set = Images(options.name, options.title, train, val, 0.875, options.finetune_epochs)
    base = read_run_config(RunFolder(options.runs[0]))
    encoders = _encoders_of(main_set, options.runs, base, options.anchor_sizes, options)
    if options.cifar is not None:
        train, val = options.cifar / "train", options.cifar / "test"
        cifar = Images("cifar10", "CIFAR-10", train, val, 1.0, options.cifar_finetune_epochs)
        runs = options.cifar_runs or options.runs
        base = read_run_config(RunFolder(runs[0]))
        encoders += _encoders_of(cifar, runs, base, options.cifar_anchor_sizes, options)
    return encoders


def _encoders_of(
    images: Images, runs: list[Path], base: Config, sizes: list[int], options: argparse.Namespace
) -> list[Encoder]:
    folder = options.work / images.name
    encoders = [_copied(run, folder / run.name, images, options) for run in runs]
    encoders.append(_built(base, folder / "random-init", images, options))
    for size in sizes:
        model = replace(base.model, backbone=PYPI_BACKBONE, cifar_stem=False, backbone_options={})
        config = replace(base, model=model, data=replace(base.data, image_size=size))
        encoders.append(_built(config, folder / f"efficientnet-lite0-{size}px", images, options))
    return encoders


def _copied(run: Path, path: Path, images: Images, options: argparse.Namespace) -> Encoder:
    """A copy of what evaluators and the report read of a run, without what was measured on it before."""
    config = read_run_config(RunFolder(run))
    if not (path / "config.yaml").exists():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        shutil.copytree(run / "encoder", path / "encoder")
        shutil.copy(run / "metrics.jsonl", path)
        summary = RunFolder(run).read_summary()
        kept = {k: v for k, v in summary["metrics"].items() if k.split("/")[0] not in {*CLEAN, *CORRUPTED, "attention"}}
        more = {k: v for k, v in summary.items() if k in ("data", "started", "parts")}
        RunFolder(path).write_summary(kept, step=summary["step"], **more)
        _write_config(path, config, options)
    return Encoder(images, path, config.data.image_size)


def _built(base: Config, path: Path, images: Images, options: argparse.Namespace) -> Encoder:
    """A run folder of no steps: random weights, or for EfficientNet-Lite0 those of its package."""
    config = replace(base, arm="contrastive", run=path.name)
    if not (path / "config.yaml").exists():
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            backbone = build_backbone(config)
        if config.model.backbone == PYPI_BACKBONE:
            fit_state(backbone, package_weights("the anchor"), where="the anchor")
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        write_encoder(path / "encoder", backbone, config=config, student=state)
        _write_config(path, config, options)
    return Encoder(images, path, config.data.image_size)


def _write_config(path: Path, config: Config, options: argparse.Namespace) -> None:
    """The run's config; a read-out is trained on the images that there are labels of."""
    data = replace(config.data, shards=options.shards / "train", labels=options.labels, teacher=None)
    config = replace(config, run=path.name, runs=path.parent, data=data)
    plain = json.loads(json.dumps(config_to_dict(config)))  # numbers of a checked type are none that YAML knows
    RunFolder(path).claim(plain)


def evaluate(encoder: Encoder, options: argparse.Namespace) -> None:
    """All evaluators on one encoder; those of corruptions on `--limit` images."""
    config = probe_config(encoder, options)
    maps = options.labels is not None or bool(load_heads(encoder.path / "encoder"))
    for names, limit in ((CLEAN, options.limit_clean), (CORRUPTED, options.limit)):
        chosen = [name for name in names if name in options.evaluators and (maps or name not in MAPS)]
        if chosen:
            run_share(replace(config, evaluators=",".join(chosen), max_val=limit))


def probe_config(encoder: Encoder, options: argparse.Namespace) -> ProbeArrayConfig:
    """Options of the probes, the same for all encoders of a set."""
    steps = int(RunFolder(options.runs[0]).read_summary()["step"])
    return ProbeArrayConfig(
        runs=[encoder.path],
        task=0,
        num_tasks=1,
        train=encoder.images.train,
        val=encoder.images.val,
        gaze=options.gaze,
        labels=options.labels,
        max_train=options.limit_train,
        max_gaze=options.limit_gaze,
        crop=encoder.images.crop,
        num_workers=options.workers,
        seed=options.seed,
        cache=options.work / "cache",
        knn=KnnConfig(k=min(200, options.limit_train or 200)),
        corruptions=CorruptionConfig(names=options.corruptions, cache_images=True),
        retrieval=RetrievalConfig(ranks=[1, 5, 10]),
        finetune=FinetuneConfig(epochs=encoder.images.finetune_epochs),
        gaze_options=GazeConfig(readout_steps=options.readout_steps or steps),
    )


def make_images(encoder: Encoder, options: argparse.Namespace) -> None:
    """Bring every corrupted image of a set and size into the cache, with all reading processes at work."""
    config = replace(probe_config(encoder, options), run=encoder.path, max_val=options.limit)
    probe = ProbeConfig(**{name: getattr(config, name) for name in ProbeConfig.__dataclass_fields__})
    subject = open_subject(probe, ranks=Ranks(), device=torch.device("cpu"))
    subject = replace(subject, cache=probe.cache, report=silent)
    sets = CorruptedSets(subject, probe, val_images(probe))
    conditions = sets.conditions()

    def unused(images: torch.Tensor) -> dict[str, torch.Tensor]:
        raise AssertionError("images are made without an encoder")

    jobs = (Job(source, prepare, unused, "images", "") for source, prepare in sets.open_each(conditions))
    ahead = Ahead(subject, probe, jobs, part=1024)
    for number, plan in enumerate(ahead.plans()):
        for part in plan.ordered:
            for _ in ahead.read(plan, part):
                pass
        if plan.ordered and (number + 1) % 5 == 0:
            print(f"{number + 1} of {len(conditions)} conditions", flush=True)
    ahead.close()


def _run_self(names: list[str], *, jobs: int = 0, images_only: bool = False) -> None:
    """This program once per encoder, `jobs` at a time; images are made for all at once, as their writing is serial."""
    jobs = len(names) if images_only else max(1, min(jobs, len(names)))
    workers = CORES if images_only else max(1, CORES // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(_one, name, workers=workers, images_only=images_only) for name in names]
        failed = [name for task in as_completed(done) if (name := task.result())]
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed, see above; the same command goes on with what is missing")


def _one(name: str, *, workers: int, images_only: bool) -> str:
    """Evaluate one encoder in a process; returns its name if that failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--workers", str(workers)]
    command += ["--images_only"] if images_only else []
    threads = {"OMP_NUM_THREADS": str(1 if images_only else max(1, workers))}
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **threads}
    )
    last: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        last = [*last[-20:], line]
        if line.rstrip().endswith((" s]", " conditions")):  # the line of a finished evaluator
            print(f"{name}: {line.rstrip()[:200]}", flush=True)
    code = process.wait()
    what = "corrupted images" if images_only else "evaluated"
    print(f"{name}: {what}, exit code {code}, {time.monotonic() - started:.0f} s", flush=True)
    if code:
        print("".join(last), flush=True)
    return name if code else ""


def _notes(options: argparse.Namespace) -> str:
    """What is not in the tables and why."""
    lines = []
    if options.cifar is None:
        lines.append("CIFAR-10 is left out: no --cifar was given.")
    elif not options.cifar_runs:
        lines.append(f"The students on CIFAR-10 are those of {options.title}: its images are new to them.")
    if options.labels is None:
        lines.append("Encoders without attention heads have no maps: no --labels was given to train read-outs from.")
    if options.limit:
        lines.append(f"Corruptions are measured on {options.limit} validation images, evenly spaced.")
    for name, value in (("training", options.limit_train), ("validation", options.limit_clean)):
        lines += [f"A trial: of the {name} images only {value} were used."] if value else []
    return " ".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--runs", type=Path, nargs="+", required=True, help="finished pretraining runs on the images of --shards")
    add("--shards", type=Path, required=True, help="folder of the labelled image shards train/ and val/")
    add("--gaze", type=Path, required=True, help="shards with human gaze, held out")
    add("--labels", type=Path, help="a teacher's labels of --shards' train/, for read-outs of encoders without heads")
    add("--name", default="imagenette", help="of the images, for folders (default: %(default)s)")
    add("--title", default="Imagenette", help="of the images, for tables (default: %(default)s)")
    add("--cifar", type=Path, help="folder of CIFAR-10's shards train/ and test/; absent leaves CIFAR-10 out")
    add("--cifar_runs", type=Path, nargs="*", default=[], help="runs on CIFAR-10 (default: --runs)")
    add("--anchor_sizes", type=int, nargs="*", default=[64, 128], help="EfficientNet-Lite0's input (default: 64 128)")
    add("--cifar_anchor_sizes", type=int, nargs="*", default=[64], help="the same for CIFAR-10 (default: 64)")
    add("--evaluators", nargs="*", default=[*CLEAN, *CORRUPTED], help="default: all")
    add("--corruptions", nargs="*", default=list(ALL), help="default: all 15 + 4")
    add("--limit", type=int, default=0, help="validation images per corruption and severity; 0: all")
    add("--limit_clean", type=int, default=0, help="validation images of the others; 0: all (smaller: a trial)")
    add("--limit_train", type=int, default=0, help="training images; 0: all (smaller: a trial)")
    add("--limit_gaze", type=int, default=0, help="images with gaze; 0: all (smaller: a trial)")
    add("--finetune_epochs", type=int, default=60, help="passes over the 1 %% and the 10 %% (default: %(default)s)")
    add("--cifar_finetune_epochs", type=int, default=60, help="the same on CIFAR-10 (default: %(default)s)")
    add("--readout_steps", type=int, default=0, help="of read-outs; 0: as many as the first run had")
    add("--jobs", type=int, default=max(1, CORES // 2), help="encoders side by side (default: half the cores)")
    add("--workers", type=int, default=1, help=argparse.SUPPRESS)
    add("--work", type=Path, default=Path("runs/evaluators"), help="copies, caches, results (default: %(default)s)")
    add("--seed", type=int, default=0, help="of probes, read-outs, corruptions, random weights")
    add("--tables", action="store_true", help="write the tables of what is there, evaluate nothing")
    add("--only", help=argparse.SUPPRESS)
    add("--images_only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
