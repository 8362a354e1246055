"""The teacher beside what needs no model: uniform, centre bias, one human, half of the humans; all metrics."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attention.baselines import MapShape, human_baselines, leave_image_out
from attention.fixations import pad_fixations, shuffled_negatives
from attention.metrics import evaluate_maps
from shards.gaze import CHUNK, METRICS, GazeTarget, centre_bias_scores, resize_density, score_densities

MAX_IMAGES = 500
NUM_NEGATIVES = 2000
TEACHER = "attention"
COLUMNS = (*METRICS, "auc_borji", "auc_shuffled", "information_gain")
Scores = dict[str, dict[str, float]]


def compare(targets: Sequence[GazeTarget], densities: Sequence[Tensor], *, stride: int) -> Scores:
    """Score the teacher and the baselines on the same images.

    Where all images have one size, every metric and every baseline, on at most `MAX_IMAGES` of them, evenly chosen;
    else the metrics of `shards.gaze` and the centre bias alone.

    Args:
        targets: images with at least one fixation.
        densities: the teacher's map of each, `(rows, columns)`.
        stride: image pixels a cell of the maps that are scored.

    Returns:
        Row (`attention` is the teacher) to metric to mean; `num_images` is how many were scored.
    """
    if len(targets) < 2 or len({target.size for target in targets}) > 1:
        rows = {TEACHER: score_densities(targets, densities, stride=stride)}
        if len(targets) > 1:
            rows["centre_bias"] = centre_bias_scores(targets, stride=stride)
        return rows
    first = targets[0]
    shape = MapShape(first.size, first.sigma, first.grid(stride))
    chosen = np.unique(np.linspace(0, len(targets) - 1, min(len(targets), MAX_IMAGES)).round().astype(int)).tolist()
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
