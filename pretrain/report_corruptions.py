"""The tables of a report on corrupted images, complete or not."""

from collections.abc import Sequence

from engine.page import Grey
from pretrain.evaluators.corruptions import ALL, COMMON, GROUPS, SEVERITIES
from pretrain.report_runs import Group
from pretrain.report_tables import Cell, TableOf, group_cell, plain_table, published

PUBLISHED_IMAGENET_C = (
    "Published for ResNet-50 on ImageNet-C (Yao et al., 2023), accuracy in four columns whose names are not known: "
    "contrastive 28.23, 26.16, 43.08, 60.42; with the attention teacher 29.15, 27.10, 44.04, 60.50."
)

NOT_IMAGENET = (
    "No mCE and no published values: AlexNet's errors, by which mCE is counted, and those of papers are of ImageNet's "
    "1000 classes."
)
REFERENCE = Grey("published: supervised ResNet-50, ImageNet")
TITLE = "Corrupted images, by group"


def imagenet_c_by_group(groups: Sequence[Group]) -> TableOf | None:
    """Accuracy by group of corruptions, their mean, mCE; partial results carry the number of gaps."""
    measured = [group for group in groups if "imagenet_c/clean_top1" in group.values]
    if not measured:
        return None
    comparable = any(group.on_imagenet for group in measured)
    wanted = ["clean_top1", *(f"{name}/top1" for name in (*GROUPS, "extra")), "mean_top1"]
    wanted += ["mce", "relative_mce"] if comparable else []
    rows: list[list[Cell | str | None]] = []
    for group in measured:
        row = {name: group_cell(group, f"imagenet_c/{name}") for name in wanted}
        if "imagenet_c/partial_mean_top1" in group.values:
            row["mean_top1"] = group_cell(group, "imagenet_c/partial_mean_top1", note=_partial(group))
        if comparable and ("imagenet_c/partial_mean_top1" in group.values or not group.on_imagenet):
            row["mce"] = row["relative_mce"] = None
        rows.append([group.label, *row.values()])
    headings = ["", "clean %", *(f"{name} %" for name in (*GROUPS, "extra")), "mean of 15 %"]
    caption = "Top-1 of a linear probe trained on clean images; mean of five severities."
    if not comparable:
        used = [i for i in range(len(headings)) if i == 0 or any(row[i] is not None for row in rows)]
        headings, rows = [headings[i] for i in used], [[row[i] for i in used] for row in rows]
        return TableOf("imagenet_c", TITLE, caption, headings, rows, NOT_IMAGENET)
    rows.append([REFERENCE, Grey("76.15"), *[None] * (len(GROUPS) + 2), Grey("76.7"), None])
    caption += " mCE: lower is better, by AlexNet's errors on ImageNet. A partial result has none."
    headings += ["mCE", "relative mCE"]
    after = PUBLISHED_IMAGENET_C if any(published(group) for group in measured) else ""
    return TableOf("imagenet_c", TITLE, caption, headings, rows, after)


def imagenet_c_by_corruption(groups: Sequence[Group], *, ce: bool = False) -> TableOf | None:
    """Accuracy, or the error relative to AlexNet's, of each corruption; one column a group."""

    def cell(group: Group, corruption: str) -> Cell | None:
        if ce and not group.on_imagenet:
            return None
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


def moved(groups: Sequence[Group]) -> TableOf | None:
    """How far predicted attention moves under corruption, beside the accuracy lost."""
    columns = {"robust_gaze/kld": "KLD, nats", "robust_gaze/lost": "top-1 lost, points"}
    columns |= {f"robust_gaze/{name}/kld": f"{name}, nats" for name in GROUPS}
    columns["robust_gaze/correlation"] = "correlation of the two"

    def gaps(group: Group) -> str:
        found = sum(f"robust_gaze/{name}/{severity}/kld" in group.values for name in COMMON for severity in SEVERITIES)
        return "" if found == len(COMMON) * len(SEVERITIES) else f"partial, {found} of 75"

    return plain_table(
        groups, columns, name="robust_gaze", title="How far attention moves under corruption",
        caption="KLD from the map on the corrupted image to the map on the clean one, beside the accuracy lost.",
        digits={key: 2 if key.endswith("lost") else 4 if key.endswith("kld") else 3 for key in columns}, note=gaps,
    )  # fmt: skip


def _partial(group: Group) -> str:
    missing = sum(len(severities) for severities in group.gaps.values())
    return f"partial, {missing} of 75 missing" if missing else "partial"
