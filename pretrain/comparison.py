"""The report: tables, curves and a gallery from what teacher, students and probes left behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.environment import environment
from engine.errors import InputError
from engine.files import atomic_write, write_json
from engine.page import Page
from engine.progress import report
from engine.runs import RunFolder, check_run_name
from engine.tracking import Tracker
from pretrain.report_config import ReportConfig
from pretrain.report_corruptions import by_severity, imagenet_c_by_corruption, imagenet_c_by_group, moved
from pretrain.report_curves import add_retrieval_curves, add_severity_curves, add_training_curves, drawn_tables
from pretrain.report_gallery import add_gallery
from pretrain.report_origin import add_origin, origin_tables, unlike
from pretrain.report_runs import Group, metrics_of, open_groups
from pretrain.report_tables import Cell, Numbers, TableOf, alignment, others, overview, plain_table

MOST_BYTES = 4_800_000  # of the page: it still opens on a phone, and from a mail


def compare(config: ReportConfig) -> None:
    """Write `report/index.html`, its plain twin `report/summary.md` and `summary.json`, and print the first table.

    Raises:
        InputError: a run that is missing, none that was probed, or a name that belongs to another training.
    """
    check_run_name(config.name)
    folder = RunFolder(config.runs / config.name)
    if folder.config_file.is_file() and config.name not in config.students:
        raise InputError(f"{folder.path} is a training's own folder: choose another --name for the report")
    groups = open_groups([RunFolder(config.runs / name) for name in config.students])
    teacher = RunFolder(config.runs / config.teacher) if config.teacher else None
    scores = metrics_of(teacher) if teacher is not None else {}
    if teacher is not None and not scores:
        raise InputError(f"{teacher.path} has no summary.json with metrics: finish the teacher first, or give none")
    numbers = Numbers()
    numbers.add_groups(groups)
    numbers.add_references(groups, scores)
    tables = make_tables(groups, numbers)
    page = _page(config, groups, teacher, tables, numbers)
    (folder.path / "report").mkdir(parents=True, exist_ok=True)
    _write_summary(folder, config, groups, tables, numbers)
    page.write(folder.path / "report" / "index.html")
    _write_markdown(folder.path / "report" / "summary.md", config.name, _runs(groups), tables, numbers)
    _track(config, folder, tables, numbers, groups)
    _print(config.name, tables[0], numbers)
    report(f"report: {folder.path / 'report' / 'index.html'}")


def summary_path(folder: RunFolder, config: ReportConfig) -> Path:
    """A report in a student's own folder leaves that run's summary alone."""
    own = config.name in config.students
    return folder.path / "report" / "summary.json" if own else folder.summary_file


def make_tables(groups: Sequence[Group], numbers: Numbers) -> list[TableOf]:
    """All tables that have a number, the overview first."""
    ranks = dict.fromkeys(key for g in groups for key in g.values if key.startswith("retrieval/p_at_"))
    precision = {key: f"P@{key.removeprefix('retrieval/p_at_')}" for key in ranks}
    shares = dict.fromkeys(
        key for g in groups for key in g.values if key.startswith("finetune/") and key.endswith("/top1")
    )
    tuned = {
        key: key.removeprefix("finetune/").removesuffix("/top1").replace("scratch/", "scratch, ") for key in shares
    }
    speed = {"train/loss": "last loss", "train/nt_xent": "NT-Xent", "train/attention": "attention loss"}
    speed |= {"time/images_per_s": "images/s", "time/images_per_s_device": "images/s and device"}
    speed |= {"time/data_wait": "share of time waiting for data", "memory/peak_gib": "peak memory, GiB"}
    places = {"time/images_per_s": 0, "time/images_per_s_device": 0}
    found = [
        overview(groups, numbers),
        alignment(groups, numbers),
        imagenet_c_by_group(groups),
        imagenet_c_by_corruption(groups),
        imagenet_c_by_corruption(groups, ce=True),
        by_severity(groups),
        moved(groups),
        plain_table(
            groups, {"retrieval/map": "mAP", **precision}, name="retrieval", title="Retrieval", digits=3,
            caption="Images of the query's class among the nearest by cosine similarity, 0 to 1.",
        ),
        plain_table(
            groups, tuned, name="finetune", title="Fine-tuning on few labels",
            caption="Top-1 in percent by share of labels; scratch: from random weights.",
        ),
        *others(groups),
        plain_table(
            groups, speed, name="training", title="Training", digits=places,
            caption="At the end of training; times are medians over the run.",
        ),
    ]  # fmt: skip
    return [table for table in found if table is not None]


def _page(
    config: ReportConfig,
    groups: Sequence[Group],
    teacher: RunFolder | None,
    tables: Sequence[TableOf],
    numbers: Numbers,
) -> Page:
    page = Page(f"Saccade: {config.name}")
    gallery_place = None
    drawings = {"by_severity": add_severity_curves, "retrieval": add_retrieval_curves}
    for table in tables:
        page.heading(table.title)
        page.table(table.columns, _texts(table, numbers), caption=table.caption)
        if table.after:
            page.note(table.after)
        if table.name in drawings:
            drawings[table.name](page, groups)
        if table.name == tables[0].name and config.gaze is not None and config.num_pictures:
            page.heading("Where they look")
            gallery_place = len(page.parts)
    add_training_curves(page, groups, teacher)
    add_origin(page, _runs(groups))
    if gallery_place is not None:  # last, with what room the rest has left
        gallery = Page("")
        add_gallery(gallery, config, groups, teacher, most_bytes=MOST_BYTES - len(page.text().encode()))
        page.parts[gallery_place:gallery_place] = gallery.parts
    return page


def _texts(table: TableOf, numbers: Numbers) -> list[list[str]]:
    return [[numbers.text(cell) for cell in row] for row in table.rows]


def _write_summary(
    folder: RunFolder, config: ReportConfig, groups: Sequence[Group], tables: Sequence[TableOf], numbers: Numbers
) -> None:
    """Replace the summary as a whole: what an earlier report said of other runs is gone."""
    summaries = {run.name: run.read_summary() for group in groups for run in group.runs}
    labels = {group.label: [run.name for run in group.runs] for group in groups}
    shown = [{"name": t.name, "title": t.title, "columns": t.columns, "rows": _texts(t, numbers)} for t in tables]
    content: dict[str, Any] = {
        "run": config.name,
        "step": max(int(summary.get("step", 0)) for summary in summaries.values()),
        "metrics": numbers.metrics,
        "environment": environment(),
        "protocols": {name: summary.get("protocols", {}) for name, summary in summaries.items()},
        "runs": labels,
        "partial": {group.label: group.gaps for group in groups if group.gaps},
        "tables": shown,
    }
    write_json(summary_path(folder, config), content)


def _write_markdown(
    path: Path, name: str, runs: Sequence[RunFolder], tables: Sequence[TableOf], numbers: Numbers
) -> None:
    """What the page says, as text: everything but drawings and pictures."""
    lines = [f"# {name}"]
    for table in tables:
        lines += ["", f"## {table.title}", "", table.caption, ""]
        lines += _markdown_table(table.columns, _texts(table, numbers))
        lines += ["", table.after] if table.after else []
    for number, table in enumerate(origin_tables(runs)):
        lines += ["", f"## {table.title}", ""]
        lines += [f"{sentence}\n" for sentence in (unlike(runs) if number == 0 else ())]
        lines += _markdown_table(table.columns, _texts(table, numbers)) if table.rows else ["Nothing."]
    atomic_write(path, ("\n".join(lines) + "\n").encode())


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *body)]


def _runs(groups: Sequence[Group]) -> list[RunFolder]:
    return [run for group in groups for run in group.runs]


def _track(
    config: ReportConfig, folder: RunFolder, tables: Sequence[TableOf], numbers: Numbers, groups: Sequence[Group]
) -> None:
    """Send what the page shows to W&B: a column of numbers, and one of deviations where there are any."""
    if config.tracker == "none":
        return
    step = max((int(run.read_summary().get("step", 0)) for group in groups for run in group.runs), default=0)
    tracker = Tracker(folder, backend=config.tracker, project=config.project, config={"students": config.students})
    for table in (*tables, *(table for table in origin_tables(_runs(groups)) if table.rows)):
        tracker.table(f"report/{table.name}", *_columns_and_rows(table, numbers), step=step)
    for name, (columns, rows) in drawn_tables(groups).items():
        tracker.table(f"report/{name}", columns, rows, step=step)
    tracker.finish()


def _columns_and_rows(table: TableOf, numbers: Numbers) -> tuple[list[str], list[list[Any]]]:
    found: dict[str, list[Any]] = {}
    columns = [table.columns[0] or "row", *map(str, table.columns[1:])]
    for column, cells in zip(columns, zip(*table.rows, strict=True), strict=True):
        keys = [cell.key if isinstance(cell, Cell) else "" for cell in cells]
        deviations = [numbers.metrics.get(f"{key}/deviation") for key in keys]
        if any(isinstance(cell, str) for cell in cells):  # W&B wants one kind of value in a column
            found[column] = [str(numbers.text(cell)) for cell in cells]
            continue
        found[column] = [numbers.metrics.get(key) for key in keys]
        if any(value is not None for value in deviations):
            found[f"{column}, deviation"] = deviations
    return list(found), [list(row) for row in zip(*found.values(), strict=True)]


def _print(name: str, table: TableOf, numbers: Numbers) -> None:
    shown = Table(title=name)
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in _texts(table, numbers):
        shown.add_row(*row)
    Console().print(shown)
