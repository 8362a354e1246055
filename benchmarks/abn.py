"""Attention branch network, + mining branch, + maps of a teacher on CUB: `python benchmarks/abn.py --cub SHARDS`.

Trains what is missing (a finished run is taken as it is), `--jobs` runs at a time, each a process of its own with all
arms of one setting and seed; then tabulates, and times the insertion game against one image at a time.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, ratio_of_pairs, report, time_pairs
from downstream.branch.config import BranchConfig
from downstream.branch.evaluate import play, read_evaluation, summarise
from downstream.branch.model import AttentionBranchNetwork
from downstream.branch.pipeline import run_branch
from downstream.branch.table import Row, markdown, tabulate, with_misclassified
from downstream.config import DownstreamConfig
from downstream.stage import stage_folder
from engine.package_weights import PYPI
from engine.program import parse_config

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "downstream" / "abn_cub.yaml"
BEAT_S = 30.0

# epochs of the first and of the second step, image sides seen and stored, first weights, learning rate
SETTINGS: dict[str, dict[str, Any]] = {
    "resnet18": {"epochs": (40, 40), "sizes": (112, 128), "weights": None, "lr": 0.02},
    "resnet50": {"epochs": (20, 20), "sizes": (112, 128), "weights": None, "lr": 0.02},
    "tf_efficientnet_lite0": {
        "epochs": (10, 8),
        "sizes": (160, 184),
        "weights": PYPI,
        "lr": 0.01,
    },
}
NOTES = """Rows: `step1` is the attention branch network (ABN) after its first step; every other arm goes on from it for
equally long: `baseline` as before, `mining` with the attention mining branch (alpha 1e-4, sigma 0.78), `maps` with the
label maps given by `--maps` as supervision (L2 to the map scaled to peak 1, weight 1), `control` the same with the maps
of `--control`, which know nothing of the image. All training is plain SGD with
cosine decay, last weights, no choice of an epoch by the test set. Areas are means over the test images; "misclassified"
those over the images that the baseline of the same seed gets wrong, which is what the mining branch's paper reports.

Published values stand beside for orientation only: they are of the official split of 200 classes, 224 pixels and
600 epochs (ours: see the caption of each table; half of the classes, a fraction of the budget), and `maps` in them are
maps that people edited.

`insertion_vs_one_by_one`: seconds per image of the insertion game played one image and one step at a time, over ours
(batches on the device), the same network and precision, median over pairs. `*_gain`: mining minus baseline, of the
first setting where no setting is named: top-1 in points; area of insertion over the misclassified images."""


def main() -> None:
    """Train what is missing, and write `results/abn.{json,md}`."""
    options = _options()
    seeds = list(range(options.seeds))
    _train_all(options, seeds)
    figures: dict[str, float] = {}
    tables = []
    for setting in options.only:
        config = _config(options, setting, seeds=len(seeds))
        results = with_misclassified(config, run_branch(config))
        if options.control:
            results |= _control(options, setting, config)
        rows = tabulate(results)
        facts = stage_folder(config, arm="baseline", seed=0).read_summary()
        tables.append(f"{_caption(config, setting, facts)}\n\n{markdown(rows, paper='cub')}")
        figures |= _figures(rows, setting, first=setting == options.only[0])
    figures |= _speed(options)
    report(
        "abn",
        by_machine=False,
        figures=figures,
        environment=environment(seeds=seeds, budget=options.budget, precision=options.precision, device=_device_name()),
        title="Attention branch network with mining branch and given maps on CUB-200-2010",
        notes=NOTES,
        table="\n\n".join(tables),
    )


def _arguments(options: argparse.Namespace, setting: str, *, seed: int, seeds: int, control: bool = False) -> list[str]:
    """Command line of the program for some seeds of one setting, or of its arm with the control's maps."""
    values = SETTINGS[setting]
    epochs = [max(1.0, options.budget * number) for number in values["epochs"]]
    split = (options.cub / "train" / "manifest.json").is_file()
    arms = "maps" if control else "baseline,mining" + (",maps" if options.maps else "")
    labels = options.control if control else options.maps
    name = f"abn-{setting}-x{options.budget:g}"
    given: dict[str, Any] = {
        "run": f"{name}-control" if control else name,
        "first": name,
        "runs": options.runs.resolve(),
        "seed": seed,
        "seeds": seeds,
        "arm": arms,
        "epochs": epochs[0],
        "retrain_epochs": epochs[1],
        "precision": options.precision,
        "data.path": (options.cub / "train" if split else options.cub).resolve(),
        "data.val": (options.cub / "test").resolve() if split else "null",
        "data.batch_size": 32,
        "branch.backbone": setting,
        "branch.weights": (options.lite0 if values["weights"] == PYPI else values["weights"]) or "null",
        "branch.size": values["sizes"][0],
        "branch.stored_size": values["sizes"][1],
        "branch.labels": labels.resolve() if labels else "null",
        "branch.insertion_steps": options.insertion_steps,
        "optim.lr": values["lr"],
        "optim.fused": "true" if torch.cuda.is_available() else "false",
        "loop.tracker": "none",
    }
    return ["--config", str(CONFIG), *(f"--{name}={value}" for name, value in given.items())]


def _config(options: argparse.Namespace, setting: str, *, seeds: int, control: bool = False) -> DownstreamConfig:
    argv = _arguments(options, setting, seed=0, seeds=seeds, control=control)
    config, _ = parse_config(DownstreamConfig, argv=argv)
    return config


def _control(options: argparse.Namespace, setting: str, main: DownstreamConfig) -> dict[tuple[str, int], Any]:
    """The control's metrics by (arm, seed), the misclassified images being those of the main table's baseline."""
    config = _config(options, setting, seeds=main.seeds, control=True)
    run_branch(config)
    found = {}
    for seed in range(main.seeds):
        wrong = read_evaluation(stage_folder(main, arm="baseline", seed=seed).path)["top1"] == 0
        mine = read_evaluation(stage_folder(config, arm="maps", seed=seed).path)
        found["control", seed] = summarise(mine, wrong=wrong)
    return found


def _train_all(options: argparse.Namespace, seeds: list[int]) -> None:
    """Every setting and seed as a process, `options.jobs` at a time; what is finished ends at once."""
    tasks = [(setting, seed) for setting in options.only for seed in seeds]
    # the longest first, so that none is left over for the end
    tasks.sort(key=lambda task: list(SETTINGS).index(task[0]) != 1)
    done, began, logs = [0], time.monotonic(), options.runs / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def run(task: tuple[str, int]) -> None:
        setting, seed = task
        log, started = logs / f"{setting}-seed{seed}.log", time.monotonic()
        program = [sys.executable, str(ROOT / "downstream" / "main.py")]
        for control in (False, True) if options.control else (False,):
            command = [*program, *_arguments(options, setting, seed=seed, seeds=1, control=control)]
            with open(log, "a" if control else "w") as file:
                code = subprocess.run(command, stdout=file, stderr=file, env=_environment()).returncode
            if code:
                raise SystemExit(
                    f"{' '.join(command)}\nended with {code}; the end of {log}:\n{log.read_text()[-2000:]}"
                )
        done[0] += 1
        _say(f"[{done[0]}/{len(tasks)}] {setting} seed {seed}: {time.monotonic() - started:.0f} s")

    stop = threading.Event()
    threading.Thread(target=_beat, args=(stop, logs, began), daemon=True).start()
    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(run, tasks):
            pass
    stop.set()
    _say(f"all runs finished after {time.monotonic() - began:.0f} s")


def _beat(stop: threading.Event, logs: Path, began: float) -> None:
    """Now and then the last line of every log that still grows."""
    while not stop.wait(BEAT_S):
        _say(f"--- after {time.monotonic() - began:.0f} s")
        for log in sorted(logs.glob("*.log")):
            if time.time() - log.stat().st_mtime < 2 * BEAT_S and (lines := log.read_text().splitlines()):
                _say(f"{log.stem}: {lines[-1][:160]}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _environment() -> dict[str, str]:
    """One thread a process: the processes are the parallelism. The repository is importable without being installed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def _figures(rows: list[Row], setting: str, *, first: bool) -> dict[str, float]:
    by_arm = {row.arm: row for row in rows}
    figures: dict[str, float] = {}
    for row in rows:
        for name in ("test/top1", "test/top5", "test/insertion", "test/deletion", "misclassified/insertion"):
            if name in row.means:
                key = f"{setting}_{row.arm}_{name.replace('test/', '').replace('/', '_')}"
                figures |= {key: row.means[name], f"{key}_std": row.deviations[name]}
    mining, baseline = by_arm["mining"], by_arm["baseline"]
    key = "misclassified/insertion"
    gains = {"mining_gain": mining.gain or 0.0, "insertion_gain": mining.means[key] - baseline.means[key]}
    if "maps" in by_arm:
        maps = by_arm["maps"]
        gains |= {"maps_gain": maps.gain or 0.0, "maps_insertion_gain": maps.means[key] - baseline.means[key]}
    for name, value in gains.items():
        figures[f"{setting}_{name}"] = value
        if first:
            figures[name if name.endswith("insertion_gain") else f"cub_{name}"] = value
    return figures


def _caption(config: DownstreamConfig, setting: str, summary: dict[str, Any]) -> str:
    sizes, branch = summary["data"]["sizes"], config.branch
    weights = "from scratch" if branch.weights is None else f"pretrained ({Path(branch.weights).name})"
    maps = summary["data"].get("maps", {}).get("teacher", {})
    told = f"; maps of teacher {str(maps['hash'])[:16]} ({maps.get('backbone', '?')})" if maps else ""
    return (
        f"## {setting}, {weights}\n\n{branch.size} pixels, {sizes['train']} training and {sizes['test']} test images "
        f"of {sizes['classes']} classes ({summary['data']['split']}), {config.epochs:g} + {config.retrain_epochs:g} "
        f"epochs, batches of {config.data.batch_size}, {config.seeds} seed(s){told}."
    )


def _speed(options: argparse.Namespace) -> dict[str, float]:
    """Our insertion game against one image and one step at a time, on the same device and in the same precision."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = BranchConfig(backbone="resnet18", size=112, insertion_steps=options.insertion_steps)
    torch.manual_seed(0)
    network = AttentionBranchNetwork(config, num_classes=100).to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    many = 256 if device.type == "cuda" else 16
    images = torch.rand(many, 3, 112, 112, device=device)
    maps, targets = torch.rand(many, 7, 7, device=device), torch.arange(many, device=device) % 100
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision)

    def autocast() -> Any:
        return nullcontext() if kind is None else torch.autocast(device.type, dtype=kind)

    @torch.inference_mode()
    def game(rows: slice) -> None:
        part = images[rows], maps[rows], targets[rows]
        play(network, *part, curves=["insertion"], config=config, autocast=autocast)["insertion"].cpu()

    few = min(many, 4)
    ours, theirs = time_pairs(
        lambda: game(slice(0, many)),
        lambda: [game(slice(i, i + 1)) for i in range(few)],
        num_pairs=3,
    )
    ratio = ratio_of_pairs([one / many for one in ours], [one / few for one in theirs])
    return {"insertion_vs_one_by_one": ratio, "insertion_images_per_s": many / min(ours)}


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cub", type=Path, required=True, help="image shards of all images, or a folder with shards train/ and test/"
    )
    parser.add_argument("--maps", type=Path, help="label set of those (training) images; without it no arm `maps`")
    parser.add_argument("--control", type=Path, help="other labels, such as centre_bias, for one more arm with maps")
    lite0 = "file of EfficientNet-Lite0's weights under timm's names (default: %(default)s, a package)"
    parser.add_argument("--lite0", default=PYPI, help=lite0)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder for runs and logs")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="(default: all)")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on all epochs (default: %(default)s)")
    precision = "bf16" if torch.cuda.is_available() else "no"
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default=precision, help="(default: %(default)s)")
    parser.add_argument("--insertion-steps", type=int, default=28, help="of each game (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
