"""The page of a report: tables, curves, gallery and origins, as much of them as one file can well hold."""

from collections.abc import Sequence

from engine.page import Page
from engine.runs import RunFolder
from pretrain.report_config import ReportConfig
from pretrain.report_corruptions import by_severity, imagenet_c_by_corruption, imagenet_c_by_group, moved
from pretrain.report_curves import Room, add_retrieval_curves, add_severity_curves, add_training_curves
from pretrain.report_gallery import add_gallery
from pretrain.report_origin import add_details, add_origin, origin_tables, unlike
from pretrain.report_runs import Group, runs_of
from pretrain.report_tables import Numbers, TableOf, add_table, alignment, others, overview, plain_table

MOST_BYTES = 4_800_000  # of the page: it still opens on a phone, and from a mail


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


def report_page(config: ReportConfig, groups: Sequence[Group], teacher: RunFolder | None, numbers: Numbers) -> Page:
    """The page, which stays under `MOST_BYTES`, and says what it leaves out of many runs.

    Tables show all runs, or the first ones that fit into half of the page; drawings and pictures show the first rows,
    and share what is left with the contents of the run folders.
    """
    every, page = runs_of(groups), Page(f"Saccade: {config.name}")
    runs, shown, tables, size = _fitting(groups, numbers)
    if len(runs) < len(every):
        page.paragraph(
            f"Of {len(every)} runs, the first {len(runs)} are on this page, in {len(shown)} of {len(groups)} rows: "
            "more would make it too large. summary.md and summary.json have the tables of all."
        )
    room = Room(MOST_BYTES - size)
    gallery_place = None
    drawings = {"by_severity": add_severity_curves, "retrieval": add_retrieval_curves}
    for table in tables:
        add_table(page, table, numbers)
        if table.after:
            page.note(table.after)
        if table.name in drawings:
            drawings[table.name](page, shown, room)
        if table.name == tables[0].name and config.gaze is not None and config.num_pictures:
            page.heading("Where they look")
            gallery_place = len(page.parts)
    add_training_curves(page, shown, teacher, room)
    add_origin(page, runs, unlike(every), numbers)
    left = MOST_BYTES - len(page.text().encode())
    add_details(page, runs, most_bytes=left // 2 if gallery_place is not None else left)
    if gallery_place is not None:  # last, with what room the rest has left
        gallery = Page("")
        add_gallery(gallery, config, shown, teacher, most_bytes=MOST_BYTES - len(page.text().encode()))
        page.parts[gallery_place:gallery_place] = gallery.parts
    return page


def _fitting(groups: Sequence[Group], numbers: Numbers) -> tuple[list[RunFolder], list[Group], list[TableOf], int]:
    """The first runs, their rows and tables that take at most half of the page, and how many bytes that is."""
    every = runs_of(groups)
    num_runs = len(every)
    while True:
        runs = every[:num_runs]
        names = {run.name for run in runs}
        shown = [group for group in groups if group.runs[0].name in names]
        tables = make_tables(shown, numbers)
        page = Page("")
        for table in (*tables, *origin_tables(runs)):
            add_table(page, table, numbers)
        size = len(page.text().encode())
        if size <= MOST_BYTES // 2 or num_runs == 1:
            return runs, shown, tables, size
        num_runs = max(1, min(num_runs - 1, num_runs * (MOST_BYTES // 2) // size))
