"""The drawings of a report: training, robustness by severity, retrieval."""

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.dashboard import CURVES, EVERYTHING
from engine.page import LineStyle, Page, curves_svg, line_styles
from engine.runs import RunFolder
from pretrain.evaluators.corruptions import COMMON, SEVERITIES
from pretrain.report_runs import Group

Curve = tuple[list[float], list[float]]
MOST_POINTS = 400  # of a curve
MOST_POINTS_DRAWN = 1600  # of all curves of a drawing, which has to fit into the page with some thirty others
MOST_ROWS = 30  # drawn: as many lines can be told apart, and as many pictures stand in a row of the gallery
MOST_PARTS = 3  # of a metric's name: online/<evaluator>/<metric>, not a drawing for each corruption and severity
PARTIAL = " (partial)"


@dataclass
class Room:
    """Bytes that the drawings of a page may still take."""

    num_bytes: int

    def take(self, num_bytes: int) -> bool:
        """Whether so many bytes found room."""
        fits = num_bytes <= self.num_bytes
        self.num_bytes -= num_bytes if fits else 0
        return fits


def first_rows(groups: Sequence[Group]) -> tuple[Sequence[Group], str]:
    """The rows that are drawn, and a sentence where they are not all."""
    if len(groups) <= MOST_ROWS:
        return groups, ""
    note = f"The first {MOST_ROWS} of {len(groups)} rows: to see others here, name their runs first."
    return groups[:MOST_ROWS], note


def add_training_curves(page: Page, groups: Sequence[Group], teacher: RunFolder | None, room: Room) -> None:
    """What one run of each group logged, in the sections that the W&B workspace has."""
    drawn, note = first_rows(groups)
    notes = [note, "The first run of each row." if any(len(group.runs) > 1 for group in drawn) else ""]
    students = {group.label: logged_curves(group.runs[0]) for group in drawn}
    for section, panels in CURVES.items():
        if section != "Teacher":
            _add_section(page, section, panels, students, notes=notes, room=room)
        elif teacher is not None:
            panels = {"loss": ["train/loss"], **panels}
            _add_section(page, section, panels, {"teacher": logged_curves(teacher)}, notes=(), room=room)


def _add_section(
    page: Page,
    section: str,
    panels: Mapping[str, Sequence[str] | str],
    runs: Mapping[str, Mapping[str, Curve]],
    *,
    notes: Sequence[str],
    room: Room,
) -> None:
    """The panels' metrics, as far as a run logged them; what no panel names for itself is folded."""
    named = _titles({title: metrics for title, metrics in panels.items() if title != EVERYTHING}, runs)
    rest = {key: title for key, title in _titles(panels, runs).items() if key not in named}
    if named or rest:
        page.heading(f"During training: {section.lower()}")
        for note in filter(None, notes):
            page.paragraph(note)
    for titles, folded in ((named, ""), (rest, "More of the evaluators")):
        curves = {t: {run: logged[key] for run, logged in runs.items() if key in logged} for key, t in titles.items()}
        _add(page, curves, styles=line_styles(list(runs)), x_label="step", room=room, folded=folded)


def add_severity_curves(page: Page, groups: Sequence[Group], room: Room) -> None:
    """Accuracy and movement of the attention by severity; a curve over fewer than 15 corruptions says so."""
    drawn, note = first_rows(groups)
    found = {
        "top-1, %, mean over the corruptions": severity_curves(drawn, "imagenet_c", ""),
        "KLD to the clean image's map, nats, mean over the corruptions": severity_curves(drawn, "robust_gaze", "/kld"),
    }
    _add(page, found, styles=line_styles([group.label for group in drawn]), x_label="severity", room=room, note=note)


def add_retrieval_curves(page: Page, groups: Sequence[Group], room: Room) -> None:
    """Precision at each recall level, mean over a group's runs."""
    drawn, note = first_rows(groups)
    found = {"precision, mean over queries": {group.label: precision_recall(group) for group in drawn}}
    _add(page, found, styles=line_styles([group.label for group in drawn]), x_label="recall", room=room, note=note)


def drawn_tables(groups: Sequence[Group]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows, by name, of what the page draws and no table and no run's own history holds."""
    retrieval = {group.label: precision_recall(group) for group in groups}
    moved = severity_curves(groups, "robust_gaze", "/kld")
    found = {
        "precision_recall": (["row", "recall", "precision"], retrieval),
        "robust_gaze_severity": (["row", "severity", "KLD, nats"], moved),
    }
    tables = {
        name: (columns, [[label, x, y] for label, curve in curves.items() for x, y in zip(*curve, strict=True)])
        for name, (columns, curves) in found.items()
    }
    return {name: table for name, table in tables.items() if table[1]}


def severity_curves(groups: Sequence[Group], evaluator: str, ending: str) -> dict[str, Curve]:
    """Mean over the 15 corruptions by severity, by group; the label says where some are missing."""
    curves = {}
    for group in groups:
        keys = {s: f"{evaluator}/severity/{s}{ending}" for s in SEVERITIES}
        points = {s: group.values[key].mean for s, key in keys.items() if key in group.values}
        whole = all(f"{evaluator}/{c}/{s}{ending}" in group.values for c in COMMON for s in points)
        curves[group.label if whole else group.label + PARTIAL] = [float(s) for s in points], [*points.values()]
    return curves


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


def logged_curves(run: RunFolder) -> dict[str, Curve]:
    """Steps and finite values of every metric that the run logged."""
    points: dict[str, Curve] = {}
    for line in run.metrics():
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                steps, values = points.setdefault(key, ([], []))
                steps.append(float(line["step"]))
                values.append(float(value))
    return points


def thinned(curve: Curve, *, most: int) -> Curve:
    """Every so many points of a curve, and its last one; at most `most` and one."""
    x, y = curve
    stride = -(-len(x) // most) if x else 1
    rest = len(x) - 1 if x and (len(x) - 1) % stride else len(x)
    return x[::stride] + x[rest:], y[::stride] + y[rest:]


def _titles(panels: Mapping[str, Sequence[str] | str], runs: Mapping[str, Mapping[str, Curve]]) -> dict[str, str]:
    """Metric to title of what the panels show and a run logged; of a pattern, each metric stands for itself."""
    logged = list(dict.fromkeys(key for curves in runs.values() for key in curves))
    found: dict[str, str] = {}
    for title, metrics in panels.items():
        if isinstance(metrics, str):
            keys = [key for key in logged if re.fullmatch(metrics, key) and key.count("/") < MOST_PARTS]
            found |= {key: key.removeprefix("online/").replace("/", ", ") for key in keys if key not in found}
        else:
            found |= {key: title for key in metrics if key in logged}
    return found


def _add(
    page: Page,
    drawings: Mapping[str, Mapping[str, Curve]],
    *,
    styles: Mapping[str, LineStyle],
    x_label: str,
    room: Room,
    folded: str = "",
    note: str = "",
) -> None:
    """Add a drawing for each title that has a curve and finds room; a label's line is that of its group."""
    shown, legend, left_out = [], dict[str, LineStyle](), []
    for title, curves in drawings.items():
        drawn = {label: curve for label, curve in curves.items() if curve[0]}
        own = {label: styles[label.removesuffix(PARTIAL)] for label in drawn}
        thin = {
            label: thinned(curve, most=min(MOST_POINTS, max(20, MOST_POINTS_DRAWN // len(drawn))))
            for label, curve in drawn.items()
        }
        if drawn:
            svg = curves_svg(thin, x_label=x_label, y_label="", styles=own)
            alt = f"{title} by {x_label} of {', '.join(drawn)}"
            if room.take(len(base64.b64encode(svg)) + len(alt)):
                shown.append((svg, alt, title))
                legend |= own
            else:
                left_out.append(title)
    if note and (shown or left_out):
        page.paragraph(note)
    if shown:
        page.plots(shown, legend=legend, folded=folded)
    if left_out:
        page.paragraph(f"Not drawn, as the page would be too large: {', '.join(left_out)}.")
