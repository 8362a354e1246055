"""The teacher beside what needs no model: uniform, centre bias, one human, half of the humans; all metrics."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attention.baselines import MapShape, human_baselines, leave_image_out, uniform
from attention.fixations import pad_fixations, shuffled_negatives
from attention.metrics import evaluate_maps
from shards.gaze import (
    CHUNK,
    METRICS,
    GazeTarget,
    centre_bias_scores,
    resize_density,
    score_densities,
    score_each,
)

MAX_IMAGES = 500
NUM_NEGATIVES = 2000
TEACHER = "attention"
COLUMNS = (*METRICS, "auc_borji", "auc_shuffled", "information_gain")
Scores = dict[str, dict[str, float]]


def compare(targets: Sequence[GazeTarget], densities: Sequence[Tensor], *, stride: int) -> Scores:
    """Score the teacher and the baselines on the same images, on at most `MAX_IMAGES` of them, evenly chosen.

    Where all images have one size, every metric; else the metrics of `shards.gaze`.

    Args:
        targets: images with at least one fixation.
        densities: the teacher's map of each, `(rows, columns)`.
        stride: image pixels a cell of the maps that are scored.

    Returns:
        Row (`attention` is the teacher) to metric to mean; `num_images` is how many were scored.
    """
    chosen = np.unique(np.linspace(0, len(targets) - 1, min(len(targets), MAX_IMAGES)).round().astype(int)).tolist()
    if len(targets) < 2 or len({target.size for target in targets}) > 1:
        return _of_several_sizes([targets[i] for i in chosen], [densities[i] for i in chosen], stride=stride)
    first = targets[0]
    shape = MapShape(first.size, first.sigma, first.grid(stride))
    human = human_baselines(
        [_by_observer(t) for t in targets], shape=shape, evaluated=chosen, num_negatives=NUM_NEGATIVES
    )
    ours = _score_all([targets[i] for i in chosen], [densities[i] for i in chosen], targets, chosen, shape=shape)
    rows = {TEACHER: ours} | {
        row: {name: float(values.nanmean()) for name, values in scores.items() if not bool(values.isnan().all())}
        for row, scores in human.items()
    }
    return {row: scores | {"num_images": float(len(chosen))} for row, scores in rows.items()}


def row_name(row: str) -> str:
    """What a row is called in tables."""
    return "teacher" if row == TEACHER else row.replace("_", " ")


def cells(rows: Scores) -> list[list[str]]:
    """A table of scores as text: its header, then one line a model."""
    columns = [name for name in COLUMNS if any(name in scores for scores in rows.values())]
    header = ["", *("IG (bit)" if name == "information_gain" else name for name in columns)]
    return [header] + [
        [row_name(row), *(f"{scores[c]:.4f}" if c in scores else "-" for c in columns)] for row, scores in rows.items()
    ]


def _by_observer(target: GazeTarget) -> list[np.ndarray]:
    count = int(target.observers.max(initial=-1)) + 1
    return [target.points[target.observers == observer] for observer in range(count)]


def _of_several_sizes(targets: Sequence[GazeTarget], densities: Sequence[Tensor], *, stride: int) -> Scores:
    """Rows as `human_baselines` defines them, each image on a grid of its own."""
    rows = {
        TEACHER: score_densities(targets, densities, stride=stride),
        "uniform": score_densities(targets, [uniform(target.grid(stride)) for target in targets], stride=stride),
    }
    if len(targets) > 1:
        rows["centre_bias"] = centre_bias_scores(targets, stride=stride)
    halves = np.random.default_rng(0)
    orders = [halves.permutation(int(target.observers.max(initial=-1)) + 1) for target in targets]
    single = [[order[i : i + 1] for i in range(len(order))] for order in orders]
    split = [[order[: len(order) // 2], order[len(order) // 2 :]] for order in orders]
    return rows | {
        "one_human": _score_groups(targets, single, stride=stride),
        "split_half": _score_groups(targets, split, stride=stride),
    }


def _score_groups(
    targets: Sequence[GazeTarget], groups: Sequence[Sequence[np.ndarray]], *, stride: int
) -> dict[str, float]:
    """The map of all others against each group of observers: the mean over groups, then over images."""
    images, asked, answers = [], [], []
    for number, (target, members) in enumerate(zip(targets, groups, strict=True)):
        for group in members:
            inside = np.isin(target.observers, group)
            own, rest = (
                replace(target, points=target.points[m], observers=target.observers[m]) for m in (inside, ~inside)
            )
            if own.num_inside and rest.num_inside:
                images.append(number)
                asked.append(own)
                answers.append(rest.density(target.grid(stride)))
    if not images:
        return {"num_images": 0.0}
    counts = np.bincount(images)
    scores = score_each(asked, answers, stride=stride)
    means = {name: np.bincount(images, values)[counts > 0] / counts[counts > 0] for name, values in scores.items()}
    return {name: float(values.mean()) for name, values in means.items()} | {"num_images": float((counts > 0).sum())}


def _score_all(
    targets: Sequence[GazeTarget],
    densities: Sequence[Tensor],
    everyone: Sequence[GazeTarget],
    chosen: list[int],
    *,
    shape: MapShape,
) -> dict[str, float]:
    """Means of every metric of `evaluate_maps`, information gain being over the centre bias of all images."""
    baseline = leave_image_out(torch.stack([shape.density(target.points) for target in everyone]))[chosen]
    points, valid = pad_fixations([target.points for target in targets], size=shape.size, grid=shape.grid)
    generator = torch.Generator().manual_seed(0)
    negatives, usable = shuffled_negatives(points, valid, num=NUM_NEGATIVES, generator=generator)
    sums: dict[str, float] = {}
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        scores = evaluate_maps(
            torch.cat([resize_density(density[None].float(), shape.grid) for density in densities[part]]),
            target=torch.stack([shape.density(target.points) for target in targets[part]]),
            fixations=points[part],
            valid=valid[part],
            baseline=baseline[part],
            negatives=negatives[part],
            negatives_valid=usable[part],
        )
        for name, values in scores.items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    return {name: total / len(targets) for name, total in sums.items()}
