"""Run folders as trainings and probes leave them, written by hand, and the tables of the page that a report makes."""

import html.parser
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from pretrain.evaluators.corruptions import ALL, COMMON, SEVERITIES, summarise
from shards.gaze import load_targets
from shards.reader import ShardSet

# What the meter, the diagnostics and the evaluators of a training log beside losses and times, every so many steps.
WATCHED = {
    50: ["train/gradient_ratio", "train/alignment", "train/uniformity", "train/embedding_rank"],
    10: ["train/kld", "train/nss", "train/attention_views", "train/skipped", "lr", "memory/peak_gib"],
    20: ["time/images_per_s_device", "time/step_s"],
    200: [f"online/{name}" for name in ("knn/top1", "linear_probe/top1", "attention/nss", "attention/cc")],
    250: ["online/retrieval/map", "online/attention/sim", "online/elsewhere/score", "online/robust_gaze/fog/3/kld"],
}
ENVIRONMENT = {"commit": "0123456789ab", "device": "a processor", "num_devices": 1, "torch": "2.6", "timm": "1.0"}


class Tables(html.parser.HTMLParser):
    """Rows of all tables of a page, each a list of (text, class)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, str]]]] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append(("", dict(attrs).get("class") or ""))
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._open:
            text, kind = self.tables[-1][-1].pop()
            self.tables[-1][-1].append((text + data, kind))

    def rows(self, *, heading: str) -> dict[str, dict[str, tuple[str, str]]]:
        """Of the first table with that column: row label to column to cell."""
        table = next(t for t in self.tables if heading in [text for text, _ in t[0]])
        columns = [text for text, _ in table[0]]
        return {row[0][0]: dict(zip(columns[1:], row[1:], strict=True)) for row in table[1:]}


def write_student(
    runs: Path,
    name: str,
    *,
    arm: str = "contrastive",
    seed: int = 0,
    top1: float = 60.0,
    corruptions: tuple[str, ...] = COMMON,
    gaze: Path | None = None,
    imagenet: bool = True,
    watched: bool = False,
    **config: Any,
) -> Path:
    """A finished, probed student; numbers follow from `top1` and `seed`.

    Args:
        corruptions: those that imagenet_c has measured.
        gaze: shards with human gaze; with them there are maps and NSS by image.
        imagenet: whether the sets that it was measured on have ImageNet's sizes.
        watched: whether it logged all that a training logs, or losses and speed alone.
        config: changes of its config, by top-level key.
    """
    folder = runs / name
    (folder / "probe").mkdir(parents=True)
    whole = {
        "run": name,
        "runs": str(runs),
        "arm": arm,
        "seed": seed,
        "data": {"shards": "shards", "control": "none"},
        "model": {"backbone": "resnet50"},
        "attention": {"kld": 1.0, "nss": 0.1},
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    lines = [
        {
            "step": step, "train/loss": 9 / step, "train/nt_xent": 8 / step, "train/attention": 1 / step,
            "time/images_per_s": 100.0 + step, "time/data_wait": 0.01,
            **{key: step / 7 for every, keys in WATCHED.items() if watched and step % every == 0 for key in keys},
        }
        for step in range(1, 1001)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"train/loss": 0.009, "time/images_per_s": 600.0, "time/data_wait": 0.01, **_scores(top1)}
    protocols = {
        name: _protocol(name, seed, imagenet=imagenet) for name in ("linear_probe", "knn", "alignment", "retrieval")
    }
    if corruptions:
        errors = {c: {s: 0.3 + 0.01 * ALL.index(c) + 0.05 * s for s in SEVERITIES} for c in corruptions}
        found, state = summarise(errors, clean=1 - top1 / 100, alexnet=True)
        metrics |= {f"imagenet_c/{key}": value for key, value in found.items()}
        protocols["imagenet_c"] = _protocol("imagenet_c", seed, imagenet=imagenet) | state
    if gaze is not None:
        _write_maps(folder / "probe", gaze, strength=top1)
    curve = {"recall": [0.0, 0.5, 1.0], "precision": [0.9, top1 / 100, 0.1]}
    (folder / "probe" / "retrieval.json").write_text(json.dumps({"precision_recall": curve}))
    data = {"num_samples": 1000, "shards": "ab" * 32, "teacher": {"hash": "cd" * 32}}
    summary = {"run": name, "step": 1000, "metrics": metrics, "environment": ENVIRONMENT, "data": data}
    (folder / "summary.json").write_text(json.dumps(summary | {"protocols": protocols}))
    return folder


def write_teacher(runs: Path, name: str, gaze: Path) -> Path:
    """A finished teacher with its maps."""
    folder = runs / name
    folder.mkdir(parents=True)
    keys = [target.key for target in load_targets(ShardSet(gaze))]
    maps = {key: np.full((8, 8), 1 / 64, dtype=np.float32) for key in keys}
    save_file(maps, folder / "maps.safetensors")
    metrics = {f"{row}/{m}": v for row, v in (("attention", 2.0), ("centre_bias", 0.8)) for m in ("nss", "kld", "cc")}
    (folder / "summary.json").write_text(json.dumps({"run": name, "step": 10, "metrics": metrics}))
    (folder / "config.yaml").write_text("run: teacher\n")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 1.0}) + "\n")
    return folder


def _scores(top1: float) -> dict[str, float]:
    alignment = {"nss": top1 / 50, "kld": 1.25, "cc": 0.4, "emd": 0.125, "feature_norm/nss": 0.5, "grad_cam/nss": 0.25}
    moved = {f"{c}/{s}/kld": 0.01 * s for c in COMMON for s in SEVERITIES}
    return {
        "linear_probe/top1": top1,
        "linear_probe/random_init_top1": 20.0,
        "knn/top1": top1 - 5,
        "retrieval/map": top1 / 100,
        "retrieval/p_at_1": top1 / 90,
        "finetune/1%/top1": top1 / 2,
        "finetune/scratch/1%/top1": top1 / 3,
        "robust_gaze/kld": 0.03,
        "robust_gaze/lost": 4.5,
        **{f"attention/{key}": value for key, value in alignment.items()},
        **{f"robust_gaze/{key}": value for key, value in moved.items()},
    }


def _protocol(name: str, seed: int, *, imagenet: bool) -> dict[str, Any]:
    sizes = {"train": 1_281_166, "val": 50_000} if imagenet else {"train": 9469, "val": 3925}
    sets = {} if name == "alignment" else {k: {"samples": v, "digest": "ef" * 32} for k, v in sizes.items()}
    return {"encoder": f"{seed:02d}" * 32, "commit": "0123456789ab", "seed": 0, **sets} | (
        {"k": 200, "temperature": 0.1} if name == "knn" else {}
    )


def _write_maps(folder: Path, gaze: Path, *, strength: float) -> None:
    targets = [target for target in load_targets(ShardSet(gaze)) if target.num_inside]
    generator = np.random.default_rng(int(strength))
    maps = {target.key: generator.random((8, 8), dtype=np.float32) for target in targets}
    save_file(maps, folder / "alignment.safetensors")
    nss = [float(number) / len(targets) for number in range(len(targets))]
    (folder / "alignment.json").write_text(json.dumps({"by_image": {"nss": nss, "kld": nss}}))
