"""The drawings of a report: training, robustness by severity, retrieval."""

import json
import math
from collections.abc import Mapping, Sequence

from engine.page import Page, curves_svg
from engine.runs import RunFolder
from pretrain.evaluators.corruptions import COMMON, SEVERITIES
from pretrain.report_runs import Group

Curve = tuple[list[float], list[float]]
TRAINING = {
    "train/nt_xent": "NT-Xent",
    "train/attention": "attention loss",
    "train/cross_entropy": "cross entropy",
    "train/loss": "loss",
    "time/data_wait": "share of time spent waiting for data",
    "time/images_per_s": "images per second",
}
MOST_POINTS = 400


def add_training_curves(page: Page, groups: Sequence[Group], teacher: RunFolder | None) -> None:
    """Losses, data-wait and speed by step: one run of each group."""
    for key, title in TRAINING.items():
        _add(page, {g.label: curve(g.runs[0], key) for g in groups}, title, what="Students, one run of each row")
    if teacher is not None:
        _add(page, {"teacher": curve(teacher, "train/loss")}, "teacher's loss", what="Teacher")


def add_severity_curves(page: Page, groups: Sequence[Group]) -> None:
    """Accuracy and movement of the attention by severity; a curve over fewer than 15 corruptions says so."""
    for name, ending, title in (
        ("imagenet_c", "", "top-1, %"),
        ("robust_gaze", "/kld", "KLD to the clean image's map"),
    ):
        curves = {}
        for group in groups:
            points = [
                (s, group.values[key].mean)
                for s in SEVERITIES
                if (key := f"{name}/severity/{s}{ending}") in group.values
            ]
            whole = all(f"{name}/{c}/{s}{ending}" in group.values for c in COMMON for s, _ in points)
            label = group.label if whole else f"{group.label} (partial)"
            curves[label] = ([float(s) for s, _ in points], [value for _, value in points])
        _add(page, curves, title, what="Mean over the corruptions", x_label="severity")


def add_retrieval_curves(page: Page, groups: Sequence[Group]) -> None:
    """Precision at each recall level, mean over a group's runs."""
    curves = {group.label: precision_recall(group) for group in groups}
    _add(page, curves, "precision", what="Retrieval, mean over queries", x_label="recall")


def precision_recall(group: Group) -> Curve:
    """Recall levels and mean precision over the runs that have the first one's levels; empty without any."""
    found = list[Curve]()
    for run in group.runs:
        try:
            table = json.loads((run.path / "probe" / "retrieval.json").read_text())["precision_recall"]
            found.append((table["recall"], table["precision"]))
        except (OSError, ValueError, KeyError):
            continue
    alike = [precision for recall, precision in found if recall == found[0][0]]
    return (found[0][0], [sum(each) / len(alike) for each in zip(*alike, strict=True)]) if found else ([], [])


def curve(run: RunFolder, key: str) -> Curve:
    """Steps and finite values of a logged metric, thinned evenly to what a drawing can show."""
    points = [(line["step"], float(line[key])) for line in run.metrics() if key in line]
    points = [point for point in points if math.isfinite(point[1])]
    stride = -(-len(points) // MOST_POINTS) if points else 1
    kept = points[::stride] + ([points[-1]] if points and (len(points) - 1) % stride else [])
    return [float(step) for step, _ in kept], [value for _, value in kept]


def _add(page: Page, curves: Mapping[str, Curve], title: str, *, what: str, x_label: str = "step") -> None:
    drawn = {label: found for label, found in curves.items() if found[0]}
    if drawn:
        svg = curves_svg(drawn, x_label=x_label, y_label=title)
        page.plot(svg, alt=f"{title} by {x_label} of {', '.join(drawn)}", caption=f"{what}: {title}")
