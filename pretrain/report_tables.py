"""The tables of a report: what stands in which row and column, and the published values beside."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.page import Grey, Page
from pretrain.evaluators.registry import OWN
from pretrain.report_runs import Group

# Top-1 in percent on ImageNet, mean and deviation (Yao et al., CVPR 2023): linear on frozen weights, and supervised.
PUBLISHED = {
    ("contrastive", "resnet50"): "67.61 ± 0.04",
    ("contrastive+attention", "resnet50"): "68.23 ± 0.08",
    ("co-train", "resnet50"): "66.35 ± 0.12",
    ("supervised", "resnet50"): "75.91 ± 0.10",
    ("supervised+attention", "resnet50"): "76.02 ± 0.04",
    ("supervised", "resnet18"): "69.17 ± 0.07",
    ("supervised+attention", "resnet18"): "69.30 ± 0.04",
}
NONE_PUBLISHED = (
    "No published values (Yao et al., 2023; ResNet-50, ImageNet) stand beside: no row is of their architecture, images "
    "and size."
)
ONE_RUN = "One run a row: no deviation over seeds is known, so small differences may be chance."
METRIC_NAMES = {
    "nss": "NSS",
    "kld": "KLD",
    "cc": "CC",
    "sim": "SIM",
    "auc_judd": "AUC-Judd",
    "auc_borji": "AUC-Borji",
    "auc_shuffled": "sAUC",
    "information_gain": "IG, bits",
    "spearman": "Spearman",
    "emd": "EMD",
}
LOWER_IS_BETTER = ("KLD", "EMD")
NO_MODEL = {
    "centre_bias": "centre bias",
    "one_human": "one human",
    "split_half": "half of the humans",
    "uniform": "flat",
}


@dataclass(frozen=True)
class Cell:
    """A number of a table, by its name in the report's metrics, so that page, text and JSON cannot differ.

    Attributes:
        digits: behind the point.
        note: what the reader must know of it, e.g. that it is partial.
    """

    key: str
    digits: int = 2
    note: str = ""


@dataclass(frozen=True)
class TableOf:
    """A table of a report; a cell without a number is None, text stands for itself.

    Attributes:
        name: for W&B.
        rows: first the label, then one cell per further column.
        after: a sentence below.
    """

    name: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[Cell | str | None]]
    after: str = ""


@dataclass
class Numbers:
    """Collects the report's metrics as tables ask for them.

    Attributes:
        metrics: name to mean; for several runs the deviation is `<name>/deviation`.
    """

    metrics: dict[str, float] = field(default_factory=dict)

    def add_groups(self, groups: Sequence[Group]) -> None:
        """Take in all that evaluators and trainings measured."""
        for group in groups:
            for name, value in group.values.items():
                self.metrics[f"{group.label}/{name}"] = value.mean
                if value.deviation is not None:
                    self.metrics[f"{group.label}/{name}/deviation"] = value.deviation

    def add_references(self, groups: Sequence[Group], teacher: Mapping[str, float]) -> None:
        """Take in the teacher's alignment, and what needs no model: of the first group that has it, else its."""
        for name, value in teacher.items():
            if name.startswith("attention/"):
                self.metrics[f"teacher/{name}"] = value
        for baseline in NO_MODEL:
            for metric in METRIC_NAMES:
                key = f"attention/{baseline}/{metric}"
                found = [group.values[key].mean for group in groups if key in group.values]
                found += [teacher[name] for name in (f"{baseline}/{metric}",) if name in teacher]
                if found:
                    self.metrics[f"{baseline}/{metric}"] = found[0]
        for group in groups:  # the linear probe of untrained weights, from the last group that measured it
            floor = group.values.get("linear_probe/random_init_top1")
            if floor is not None:
                self.metrics["random init/linear_probe/top1"] = floor.mean

    def text(self, cell: Cell | str | None) -> str:
        """A cell as page and text show it."""
        if not isinstance(cell, Cell):
            return "" if cell is None else cell
        text = f"{self.metrics[cell.key]:.{cell.digits}f}"
        deviation = self.metrics.get(f"{cell.key}/deviation")
        if deviation is not None:
            text += f" ± {deviation:.{cell.digits}f}"
        return f"{text} ({cell.note})" if cell.note else text

    def texts(self, table: TableOf) -> list[list[str]]:
        """A table's rows as page and text show them."""
        return [[self.text(cell) for cell in row] for row in table.rows]


def add_table(page: Page, table: TableOf, numbers: Numbers, *, before: Sequence[str] = ()) -> None:
    """Add a table under its own heading, behind the paragraphs `before`."""
    page.heading(table.title)
    for paragraph in before:
        page.paragraph(paragraph)
    page.table(table.columns, numbers.texts(table), caption=table.caption if table.rows else "Nothing.")


def group_cell(group: Group, name: str, *, digits: int = 2, note: str = "") -> Cell | None:
    """A group's number, with a note where some of its runs lack it; None where all do."""
    value = group.values.get(name)
    if value is None:
        return None
    lacking = f"{value.num_runs} of {len(group.runs)} runs" if value.num_runs < len(group.runs) else ""
    return Cell(f"{group.label}/{name}", digits, ", ".join(part for part in (note, lacking) if part))


def plain_table(
    groups: Sequence[Group],
    columns: Mapping[str, str],
    *,
    name: str,
    title: str,
    caption: str,
    digits: int | Mapping[str, int] = 2,
    note: Callable[[Group], str] = lambda group: "",
) -> TableOf | None:
    """One row a group, one column a metric (metric to heading), without those that have no number; None without any.

    Args:
        digits: behind the point; by metric where they differ, the others 3.
        note: what stands behind a row's first number, e.g. that it is partial.
    """
    used = {metric: heading for metric, heading in columns.items() if any(metric in g.values for g in groups)}
    rows: list[list[Cell | str | None]] = []
    for group in groups:
        places = {metric: digits if isinstance(digits, int) else digits.get(metric, 3) for metric in used}
        cells = [
            group_cell(group, metric, digits=places[metric], note="" if i else note(group))
            for i, metric in enumerate(used)
        ]
        rows += [[group.label, *cells]] if any(cells) else []
    return TableOf(name, title, caption, ["", *used.values()], rows) if used else None


def published(group: Group) -> Grey | None:
    """The paper's top-1 of the group's arm and architecture, where they were measured on what the paper was."""
    attention, data = group.config.get("attention", {}), group.config.get("data", {})
    changed = data.get("control", "none") != "none" or not attention.get("kld", 1) or not attention.get("nss", 1)
    if not group.on_imagenet or ("attention" in group.arm and changed):
        return None
    backbone = str(group.config.get("model", {}).get("backbone", ""))
    value = PUBLISHED.get((group.arm, backbone))
    return Grey(f"{value}{', ResNet-18' if backbone == 'resnet18' else ''}") if value else None


def overview(groups: Sequence[Group], numbers: Numbers) -> TableOf:
    """Arms by what matters most; untrained weights, teacher and centre bias beside."""
    wanted = {
        "linear_probe/top1": ("linear top-1 %", 2),
        "published": (Grey("published top-1 %"), 0),
        "knn/top1": ("kNN top-1 %", 2),
        "imagenet_c/mean_top1": ("corrupted top-1 %", 2),
        "imagenet_c/mce": ("mCE", 1),
        "attention/nss": ("NSS", 3),
        "attention/kld": ("KLD", 3),
        "attention/cc": ("CC", 3),
    }
    rows: list[dict[str, Cell | str | None]] = []
    for group in groups:
        row: dict[str, Cell | str | None] = {"": group.label, "runs": _num_runs(group)}
        row |= {name: group_cell(group, name, digits=digits) for name, (_, digits) in wanted.items()}
        row["imagenet_c/mce"] = row["imagenet_c/mce"] if group.on_imagenet else None
        rows.append(row | {"published": published(group)})
    for label, prefix in (("random init", "random init/"), ("teacher", "teacher/"), ("centre bias", "centre_bias/")):
        keys = {name: prefix + name.removeprefix("attention/" if label == "centre bias" else "") for name in wanted}
        found = {name: Cell(key, wanted[name][1]) for name, key in keys.items() if key in numbers.metrics}
        rows += [{"": label, **found}] if found else []
    kept = [name for name in wanted if any(row.get(name) is not None for row in rows)]
    columns = ["", "runs", *(wanted[name][0] for name in kept)]
    body = [[row.get(name) for name in ("", "runs", *kept)] for row in rows]
    several = any(len(group.runs) > 1 for group in groups)
    caption = "Mean ± deviation over runs that differ in their seed alone." if several else ONE_RUN
    caption += f" KLD{' and mCE' if 'imagenet_c/mce' in kept else ''}: lower is better; the rest: higher."
    if "published" in kept:
        caption += " Published: Yao et al. (2023), on ImageNet with ResNet-50 unless it says otherwise."
    after = "" if "published" in kept else NONE_PUBLISHED
    return TableOf("overview", "Results", caption, columns, body, after)


def alignment(groups: Sequence[Group], numbers: Numbers) -> TableOf | None:
    """Attention against human gaze: the arms' heads, other maps of their encoders, teacher, and what needs no model."""
    kinds = {"": "", "feature_norm/": ": feature norm", "grad_cam/": ": Grad-CAM"}
    rows: list[list[Cell | str | None]] = [
        [f"{g.label}{text}", *(group_cell(g, f"attention/{kind}{metric}", digits=3) for metric in METRIC_NAMES)]
        for kind, text in kinds.items()
        for g in groups
    ]
    for prefix, label in {"teacher/attention": "teacher", **NO_MODEL}.items():
        keys = [f"{prefix}/{metric}" for metric in METRIC_NAMES]
        rows.append([label, *(Cell(key, 3) if key in numbers.metrics else None for key in keys)])
    rows = [row for row in rows if any(cell is not None for cell in row[1:])]
    kept = [i for i in range(1, len(METRIC_NAMES) + 1) if any(row[i] is not None for row in rows)]
    names = list(METRIC_NAMES.values())
    columns = ["", *(names[i - 1] for i in kept)]
    lower = " and ".join(name for name in LOWER_IS_BETTER if name in columns)
    caption = "Predicted attention against human gaze. "
    caption += f"{lower}: lower is better; the rest: higher." if lower else "Higher is better."
    body = [[row[0], *(row[i] for i in kept)] for row in rows]
    return TableOf("alignment", "Alignment with people", caption, columns, body) if rows else None


def others(groups: Sequence[Group]) -> list[TableOf]:
    """One table for each evaluator of another package: its first eight metrics."""
    names = dict.fromkeys(
        name for g in groups for run in g.runs for name in run.read_summary().get("protocols", {}) if name not in OWN
    )
    tables = []
    for name in names:
        metrics = dict.fromkeys(key for g in groups for key in g.values if key.startswith(f"{name}/"))
        columns = {key: key.removeprefix(f"{name}/") for key in list(metrics)[:8]}
        table = plain_table(groups, columns, name=name, title=name, caption=f"Evaluator {name}.", digits=3)
        tables += [table] if table else []
    return tables


def _num_runs(group: Group) -> str:
    lacking = sum(not run.summary_file.is_file() for run in group.runs)
    return f"{len(group.runs)}{f' ({lacking} not finished)' if lacking else ''}"
