"""The tables of a report: what stands in which row and column, and the published values beside."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.page import Grey
from pretrain.evaluators.corruptions import ALL, COMMON, GROUPS, SEVERITIES
from pretrain.evaluators.registry import OWN
from pretrain.report_runs import Group

# Top-1 in percent on ImageNet, mean and deviation (Yao et al., CVPR 2023): linear on a frozen ResNet-50, and supervised.
PUBLISHED = {
    ("contrastive", "resnet50"): "67.61 ± 0.04",
    ("contrastive+attention", "resnet50"): "68.23 ± 0.08",
    ("co-train", "resnet50"): "66.35 ± 0.12",
    ("supervised", "resnet50"): "75.91 ± 0.10",
    ("supervised+attention", "resnet50"): "76.02 ± 0.04",
    ("supervised", "resnet18"): "69.17 ± 0.07",
    ("supervised+attention", "resnet18"): "69.30 ± 0.04",
}
PUBLISHED_IMAGENET_C = (
    "Published for ResNet-50 on ImageNet-C (Yao et al., 2023), accuracy in four columns whose names are not known: "
    "contrastive 28.23, 26.16, 43.08, 60.42; with the attention teacher 29.15, 27.10, 44.04, 60.50."
)
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
}
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

    def text(self, cell: Cell | str | None) -> str:
        """A cell as page and text show it."""
        if not isinstance(cell, Cell):
            return "" if cell is None else cell
        text = f"{self.metrics[cell.key]:.{cell.digits}f}"
        deviation = self.metrics.get(f"{cell.key}/deviation")
        if deviation is not None:
            text += f" ± {deviation:.{cell.digits}f}"
        return f"{text} ({cell.note})" if cell.note else text


def group_cell(group: Group, name: str, *, digits: int = 2, note: str = "") -> Cell | None:
    """A group's number, with a note where some of its runs lack it; None where all do."""
    value = group.values.get(name)
    if value is None:
        return None
    lacking = f"{value.num_runs} of {len(group.runs)} runs" if value.num_runs < len(group.runs) else ""
    return Cell(f"{group.label}/{name}", digits, ", ".join(part for part in (note, lacking) if part))


def plain_table(
    groups: Sequence[Group], columns: Mapping[str, str], *, name: str, title: str, caption: str, digits: int = 2
) -> TableOf | None:
    """One row a group, one column a metric (metric to heading); None if no group has any of them."""
    used = {metric: heading for metric, heading in columns.items() if any(metric in g.values for g in groups)}
    rows = [[g.label, *(group_cell(g, metric, digits=digits) for metric in used)] for g in groups]
    return TableOf(name, title, caption, ["", *used.values()], rows) if used else None  # type: ignore[arg-type]


def published(group: Group) -> Grey | None:
    """The paper's top-1 of the group's arm, where the paper has that arm."""
    attention, data = group.config.get("attention", {}), group.config.get("data", {})
    changed = data.get("control", "none") != "none" or not attention.get("kld", 1) or not attention.get("nss", 1)
    if "attention" in group.arm and changed:
        return None
    backbone = "resnet18" if group.config.get("model", {}).get("backbone") == "resnet18" else "resnet50"
    if (group.arm, backbone) not in PUBLISHED:
        backbone = "resnet50"
    value = PUBLISHED.get((group.arm, backbone))
    return Grey(f"{value}{', ResNet-18' if backbone == 'resnet18' else ''}") if value else None


def imagenet_c_by_group(groups: Sequence[Group]) -> TableOf | None:
    """Accuracy by group of corruptions, their mean, mCE; partial results carry the number of gaps."""
    measured = [group for group in groups if "imagenet_c/clean_top1" in group.values]
    if not measured:
        return None
    wanted = ["clean_top1", *(f"{name}/top1" for name in (*GROUPS, "extra")), "mean_top1", "mce", "relative_mce"]
    rows: list[list[Cell | str | None]] = []
    for group in measured:
        row = {name: group_cell(group, f"imagenet_c/{name}") for name in wanted}
        if "imagenet_c/partial_mean_top1" in group.values:
            row["mean_top1"] = group_cell(group, "imagenet_c/partial_mean_top1", note=_partial(group))
            row["mce"] = row["relative_mce"] = None
        rows.append([group.label, *row.values()])
    reference = Grey("published: supervised ResNet-50, ImageNet")
    rows.append([reference, Grey("76.15"), *[None] * (len(GROUPS) + 2), Grey("76.7"), None])
    headings = ["", "clean %", *(f"{name} %" for name in (*GROUPS, "extra")), "mean of 15 %", "mCE", "relative mCE"]
    caption = (
        "Top-1 of a linear probe trained on clean images; mean of five severities. mCE: lower is better, by AlexNet's "
        "errors on ImageNet, comparable on ImageNet alone. A partial result has no mCE."
    )
    return TableOf("imagenet_c", "Corrupted images, by group", caption, headings, rows, PUBLISHED_IMAGENET_C)


def imagenet_c_by_corruption(groups: Sequence[Group], *, ce: bool = False) -> TableOf | None:
    """Accuracy, or the error relative to AlexNet's, of each corruption; one column a group."""

    def cell(group: Group, corruption: str) -> Cell | None:
        whole = group_cell(group, f"imagenet_c/{corruption}/{'ce' if ce else 'top1'}")
        if whole is not None or ce:
            return whole
        found = sum(f"imagenet_c/{corruption}/{severity}" in group.values for severity in SEVERITIES)
        return group_cell(group, f"imagenet_c/{corruption}/partial_top1", note=f"partial, {found} of 5 severities")

    measured = [group for group in groups if "imagenet_c/clean_top1" in group.values]
    rows = [[name, *(cell(group, name) for group in measured)] for name in ALL]
    kept = [row for row in rows if any(each is not None for each in row[1:])]
    what = "CE, percent of AlexNet's error" if ce else "top-1 in percent, mean of five severities"
    name = "imagenet_c_ce" if ce else "imagenet_c_corruptions"
    title = "Corruption errors" if ce else "Corrupted images, by corruption"
    columns = ["", *(group.label for group in measured)]
    return TableOf(name, title, f"{title}: {what}.", columns, kept) if kept else None  # type: ignore[arg-type]


def by_severity(groups: Sequence[Group]) -> TableOf | None:
    """Mean accuracy over the 15 corruptions at each severity."""
    rows: list[list[Cell | str | None]] = []
    for group in groups:
        cells: list[Cell | None] = []
        for severity in SEVERITIES:
            found = sum(f"imagenet_c/{name}/{severity}" in group.values for name in COMMON)
            note = "" if found == len(COMMON) else f"partial, {found} of 15"
            cells.append(group_cell(group, f"imagenet_c/severity/{severity}", note=note))
        if any(cells):
            rows.append([group.label, *cells])
    columns = ["", *(f"severity {severity} %" for severity in SEVERITIES)]
    caption = "Top-1 in percent, mean over the 15 corruptions at each severity."
    return TableOf("by_severity", "Robustness by severity", caption, columns, rows) if rows else None


def alignment(groups: Sequence[Group], numbers: Numbers, teacher: Mapping[str, float]) -> TableOf | None:
    """Attention against human gaze: the arms' heads, other maps of the same encoders, teacher, and what needs no model."""
    rows: list[list[Cell | str | None]] = []

    def add(label: str, key: Callable[[str], str], cell: Callable[[str], Cell | None]) -> None:
        cells = [cell(key(metric)) for metric in METRIC_NAMES]
        if any(cells):
            rows.append([label, *cells])

    for group in groups:
        add(group.label, lambda metric: f"attention/{metric}", lambda key, g=group: group_cell(g, key, digits=3))
    for group in groups:
        for kind, text in (("feature_norm", "feature norm"), ("grad_cam", "Grad-CAM")):
            add(
                f"{group.label}: {text}",
                lambda metric, k=kind: f"attention/{k}/{metric}",
                lambda key, g=group: group_cell(g, key, digits=3),
            )
    others = {"teacher": "teacher", **NO_MODEL}
    _add_others(groups, numbers, teacher)
    for name, text in others.items():
        prefix = f"{name}/attention" if name == "teacher" else name
        add(
            text,
            lambda metric, p=prefix: f"{p}/{metric}",
            lambda key: Cell(key, 3) if key in numbers.metrics else None,
        )
    kept = [i for i in range(1, len(METRIC_NAMES) + 1) if any(row[i] is not None for row in rows)]
    rows = [[row[0], *(row[i] for i in kept)] for row in rows]
    columns = ["", *(list(METRIC_NAMES.values())[i - 1] for i in kept)]
    caption = "Predicted attention against human gaze. KLD: lower is better; the rest: higher."
    return TableOf("alignment", "Alignment with people", caption, columns, rows) if rows else None


def _add_others(groups: Sequence[Group], numbers: Numbers, teacher: Mapping[str, float]) -> None:
    """The teacher's scores, and those that need no model: from the first group that has them, else the teacher's run."""
    for name, value in teacher.items():
        if name.startswith("attention/"):
            numbers.metrics[f"teacher/{name}"] = value
    for baseline in NO_MODEL:
        for metric in METRIC_NAMES:
            found = (g.values[key].mean for g in groups if (key := f"attention/{baseline}/{metric}") in g.values)
            value = next(found, teacher.get(f"{baseline}/{metric}"))
            if value is not None:
                numbers.metrics[f"{baseline}/{metric}"] = value


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


def _partial(group: Group) -> str:
    missing = sum(len(severities) for severities in group.gaps.values())
    return f"partial, {missing} of 75 missing" if missing else "partial"
