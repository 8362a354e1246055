"""The comparing report: a table, curves and a gallery from what teacher, students and probes left behind."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from engine.errors import InputError
from engine.files import atomic_write
from engine.page import Page, curves_svg, overlay
from engine.progress import report
from engine.runs import RunFolder, check_run_name
from pretrain.report_config import ReportConfig
from shards.decode import decode_rgb
from shards.gaze import GazeTarget, load_targets
from shards.reader import ShardSet

COLUMNS = {
    "linear_probe/top1": "linear top-1 %",
    "attention/nss": "NSS",
    "attention/kld": "KLD",
    "attention/cc": "CC",
}
THUMBNAIL = 160


def compare(config: ReportConfig) -> None:
    """Write the report of `config`.

    Raises:
        InputError: a run that is missing or was not probed.
    """
    check_run_name(config.name)
    students = {_label(run, config): run for run in (RunFolder(config.runs / name) for name in config.students)}
    teacher = RunFolder(config.runs / config.teacher) if config.teacher else None
    rows = {label: _metrics(run) for label, run in students.items()}
    for values in list(rows.values()):
        if "linear_probe/random_init_top1" in values:
            rows["random init"] = {"linear_probe/top1": values["linear_probe/random_init_top1"]}
    if teacher is not None:
        found = _metrics(teacher)
        rows["teacher"] = {k: v for k, v in found.items() if not k.startswith("centre_bias/")}
        rows["centre bias"] = {
            k.replace("centre_bias/", "attention/"): v for k, v in found.items() if k.startswith("centre_bias/")
        }
    folder = RunFolder(config.runs / config.name)
    _write_summary(folder, rows, students)
    table = [[label, *(_cell(metrics, key) for key in COLUMNS)] for label, metrics in rows.items()]
    columns = ["", *COLUMNS.values()]
    page = _page(config, students, teacher, columns, table)
    page.write(folder.path / "report" / "index.html")
    _write_markdown(folder.path / "report" / "summary.md", config.name, columns, table)
    _print(config.name, columns, table)
    report(f"report: {folder.path / 'report' / 'index.html'}")


def _label(run: RunFolder, config: ReportConfig) -> str:
    """The run's arm, or its name where two compared runs share an arm."""
    arms = [str(RunFolder(config.runs / name).read_config().get("arm", name)) for name in config.students]
    own = str(run.read_config().get("arm", run.name))
    return own if arms.count(own) == 1 else run.name


def _metrics(run: RunFolder) -> dict[str, float]:
    metrics = run.read_summary().get("metrics")
    if not metrics:
        raise InputError(f"{run.path} has no summary.json with metrics: finish the run and probe it first")
    return metrics


def _write_summary(folder: RunFolder, rows: dict[str, dict[str, float]], students: dict[str, RunFolder]) -> None:
    metrics: dict[str, float] = {}
    for label, values in rows.items():
        if label == "centre bias":
            metrics |= {key.replace("attention/", "centre_bias/"): v for key, v in values.items()}
            continue
        keep = ("linear_probe/", "attention/")
        metrics |= {f"{label}/{key}": v for key, v in values.items() if key.startswith(keep)}
    sources = {label: run.read_summary() for label, run in students.items()}
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_summary(
        metrics,
        step=max(int(s.get("step", 0)) for s in sources.values()),
        protocols={label: s.get("protocols", {}) for label, s in sources.items()},
        runs={label: run.name for label, run in students.items()},
    )


def _page(
    config: ReportConfig,
    students: dict[str, RunFolder],
    teacher: RunFolder | None,
    columns: list[str],
    table: list[list[str]],
) -> Page:
    page = Page(f"Saccade: {config.name}")
    page.table(columns, table, caption=_table_caption(students))
    page.heading("Training")
    for key, title in (("train/nt_xent", "NT-Xent"), ("train/attention", "attention loss"), ("train/loss", "loss")):
        curves = {label: _curve(run, key) for label, run in students.items()}
        if teacher is not None and key == "train/loss":
            page.plot(_svg({"teacher": _curve(teacher, key)}, title), alt="teacher's loss by step", caption="Teacher")
        curves = {label: curve for label, curve in curves.items() if curve[0]}
        if curves:
            page.plot(_svg(curves, title), alt=f"{title} by step", caption=f"Students: {title}")
    if config.gaze is not None and config.num_pictures:
        page.heading("Where they look")
        _gallery(page, config, students, teacher)
    page.heading("Where the runs came from")
    for label, run in students.items():
        summary = run.read_summary()
        origin = {key: summary.get(key) for key in ("data", "protocols", "environment")}
        page.paragraph(f"{label}: {run.name}, {summary.get('step')} steps")
        page.code(yaml.safe_dump(origin | {"config": run.read_config()}, sort_keys=False))
    return page


def _table_caption(students: dict[str, RunFolder]) -> str:
    """What the numbers were measured on, in one sentence; the details stand at the end of the page."""
    protocols = next(iter(students.values())).read_summary().get("protocols", {})
    linear, gaze = protocols.get("linear_probe", {}), protocols.get("alignment", {})
    parts = []
    if linear:
        parts.append(f"linear probe on {linear['val']['samples']} validation images, seed {linear['seed']}")
    if gaze:
        parts.append(f"attention against human gaze on {gaze['gaze']['scored']} images, 1/{gaze['stride']} resolution")
    return "; ".join(parts) + ". KLD: lower is better; the rest: higher." if parts else "Not probed yet."


def _svg(curves: dict[str, Any], title: str) -> bytes:
    return curves_svg(curves, x_label="step", y_label=title)


def _curve(run: RunFolder, key: str) -> tuple[list[float], list[float]]:
    points = [(line["step"], float(line[key])) for line in run.metrics() if key in line]
    return [p[0] for p in points], [p[1] for p in points]


def _gallery(page: Page, config: ReportConfig, students: dict[str, RunFolder], teacher: RunFolder | None) -> None:
    assert config.gaze is not None
    gaze = ShardSet(config.gaze)
    maps = {label: _load_maps(run.path / "probe" / "alignment.safetensors") for label, run in students.items()}
    if teacher is not None:
        maps = {"teacher": _load_maps(teacher.path / "maps.safetensors"), **maps}
    maps = {label: found for label, found in maps.items() if found}
    targets = [t for t in load_targets(gaze) if all(t.key in found for found in maps.values())]
    step = max(1, len(targets) // config.num_pictures)
    rows = [_gallery_row(gaze, target, maps) for target in targets[::step][: config.num_pictures]]
    page.gallery(["image", "human", *maps], rows, caption="Attention maps on held-out images, brightest where highest")


def _gallery_row(
    gaze: ShardSet, target: GazeTarget, maps: dict[str, dict[str, np.ndarray]]
) -> list[tuple[np.ndarray, str]]:
    image = decode_rgb(gaze.read(target.shard, target.row).image)
    scale = THUMBNAIL / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    human = target.density((image.shape[0] // 4, image.shape[1] // 4))
    row = [(image, f"image {target.key}"), (overlay(image, human), f"human attention on {target.key}")]
    return row + [(overlay(image, found[target.key]), f"{label} on {target.key}") for label, found in maps.items()]


def _load_maps(path: Path) -> dict[str, np.ndarray]:
    return load_file(path) if path.is_file() else {}


def _cell(metrics: dict[str, float], key: str) -> str:
    if key not in metrics:
        return ""
    return f"{metrics[key]:.1f}" if key.endswith("top1") else f"{metrics[key]:.3f}"


def _write_markdown(path: Path, name: str, columns: list[str], table: list[list[str]]) -> None:
    lines = [f"# {name}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in table]
    atomic_write(path, ("\n".join(lines) + "\n").encode())


def _print(name: str, columns: list[str], table: list[list[str]]) -> None:
    shown = Table(title=name)
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in table:
        shown.add_row(*row)
    Console().print(shown)
