"""The report: tables, curves and a gallery from what teacher, students and probes left behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.environment import environment
from engine.errors import InputError
from engine.files import atomic_write, write_json
from engine.progress import report
from engine.runs import RunFolder, check_run_name
from engine.tracking import Tracker
from pretrain.report_config import ReportConfig
from pretrain.report_curves import drawn_tables
from pretrain.report_origin import origin_tables, unlike
from pretrain.report_page import make_tables, report_page
from pretrain.report_runs import Group, metrics_of, open_groups, runs_of
from pretrain.report_tables import Cell, Numbers, TableOf


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
    page = report_page(config, groups, teacher, numbers)
    (folder.path / "report").mkdir(parents=True, exist_ok=True)
    _write_summary(folder, config, groups, tables, numbers)
    page.write(folder.path / "report" / "index.html")
    _write_markdown(folder.path / "report" / "summary.md", config.name, runs_of(groups), tables, numbers)
    _track(config, folder, tables, numbers, groups)
    _print(config.name, tables[0], numbers)
    report(f"report: {folder.path / 'report' / 'index.html'}")


def summary_path(folder: RunFolder, config: ReportConfig) -> Path:
    """A report in a student's own folder leaves that run's summary alone."""
    own = config.name in config.students
    return folder.path / "report" / "summary.json" if own else folder.summary_file


def _write_summary(
    folder: RunFolder, config: ReportConfig, groups: Sequence[Group], tables: Sequence[TableOf], numbers: Numbers
) -> None:
    """Replace the summary as a whole: what an earlier report said of other runs is gone."""
    summaries = {run.name: run.read_summary() for group in groups for run in group.runs}
    labels = {group.label: [run.name for run in group.runs] for group in groups}
    shown = [{"name": t.name, "title": t.title, "columns": t.columns, "rows": numbers.texts(t)} for t in tables]
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
        lines += _markdown_table(table.columns, numbers.texts(table))
        lines += ["", table.after] if table.after else []
    for number, table in enumerate(origin_tables(runs)):
        lines += ["", f"## {table.title}", ""]
        lines += [f"{sentence}\n" for sentence in (unlike(runs) if number == 0 else ())]
        lines += _markdown_table(table.columns, numbers.texts(table)) if table.rows else ["Nothing."]
    atomic_write(path, ("\n".join(lines) + "\n").encode())


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *body)]


def _track(
    config: ReportConfig, folder: RunFolder, tables: Sequence[TableOf], numbers: Numbers, groups: Sequence[Group]
) -> None:
    """Send what the page shows to W&B: a column of numbers, and one of deviations where there are any."""
    if config.tracker == "none":
        return
    step = max((int(run.read_summary().get("step", 0)) for group in groups for run in group.runs), default=0)
    tracker = Tracker(folder, backend=config.tracker, project=config.project, config={"students": config.students})
    for table in (*tables, *(table for table in origin_tables(runs_of(groups)) if table.rows)):
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
    for row in numbers.texts(table):
        shown.add_row(*row)
    Console().print(shown)
