"""The gallery of a report: image, people, teacher, students; the worst and the best cases by NSS."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from safetensors.numpy import load_file

from engine.page import Page, Picture, blending_row, overlay
from engine.runs import RunFolder
from pretrain.report_config import ReportConfig
from pretrain.report_curves import first_rows
from pretrain.report_runs import Group
from shards.decode import decode_rgb
from shards.gaze import GazeTarget, load_targets
from shards.reader import ShardSet

THUMBNAIL = 160
Maps = Mapping[str, Mapping[str, np.ndarray]]


def add_gallery(
    page: Page, config: ReportConfig, groups: Sequence[Group], teacher: RunFolder | None, *, most_bytes: int
) -> None:
    """Add up to `config.num_pictures` rows, as many as fit into `most_bytes` of the page, the cases in proportion."""
    assert config.gaze is not None
    gaze = ShardSet(config.gaze)
    groups, note = first_rows(groups)
    maps = _all_maps(groups, teacher)
    every = load_targets(gaze)
    targets = [t for t in every if maps and all(t.key in found for found in maps.values())]
    if not targets:
        page.paragraph("No pictures: no image of the gaze set has predicted maps of every run shown here.")
        return
    scores = {g.label: nss_by_image(g.runs[0], every) for g in groups}
    judge = _judge(groups, scores)
    by_key = {target.key: target for target in targets}
    one_row = len(blending_row(_row(gaze, targets[0], maps, scores)))
    wanted = min(config.num_pictures, len(targets))
    cases = choose_cases(list(by_key), scores.get(judge, {}), count=min(wanted, max(0, most_bytes) // one_row))
    columns = ["image", "people", *maps]
    size, num_shown = 0, 0
    for title, keys in cases.items():
        rows = []
        for key in keys:
            row = _row(gaze, by_key[key], maps, scores)
            size += len(blending_row(row))
            if size <= most_bytes:
                rows.append(row)
        num_shown += len(rows)
        if rows:
            page.blending_gallery(columns, rows, caption=title.format(judge=judge))
    if note:
        page.paragraph(note)
    if num_shown < wanted:
        page.paragraph(f"{num_shown} of {wanted} pictures: more would make the page too large.")


def choose_cases(keys: Sequence[str], scores: Mapping[str, float], *, count: int) -> dict[str, list[str]]:
    """Caption (with `{judge}` for the student's name) to the keys of its rows, no key twice.

    Args:
        keys: images to choose from.
        scores: NSS by key; without it for every key, all cases are spread over the set.
        count: at most this many in all; a quarter each are the worst and the best, the rest spread evenly.
    """
    worst, best = list[str](), list[str]()
    if count >= 4 and len(keys) >= 2 * (count // 4) and all(key in scores for key in keys):
        ranked = sorted(keys, key=lambda key: scores[key])
        worst, best = ranked[: count // 4], ranked[::-1][: count // 4]
    rest = [key for key in keys if key not in worst and key not in best]
    wanted = min(count - len(worst) - len(best), len(rest))
    spread = [rest[i * len(rest) // wanted] for i in range(wanted)]
    cases = {
        "Held-out images, spread over the set, brightest where most attention is": spread,
        "Worst cases: where {judge} agrees least with people, by NSS": worst,
        "Best cases: where {judge} agrees most with people, by NSS": best,
    }
    return {title: chosen for title, chosen in cases.items() if chosen}


def nss_by_image(run: RunFolder, targets: Sequence[GazeTarget]) -> dict[str, float]:
    """NSS of the run's map by image, as `alignment` measured it; empty where that does not fit the maps."""
    folder = run.path / "probe"
    try:
        values = json.loads((folder / "alignment.json").read_text())["by_image"]["nss"]
    except (OSError, ValueError, KeyError):
        return {}
    known = _load_maps(folder / "alignment.safetensors")
    keys = [target.key for target in targets if target.key in known]
    return dict(zip(keys, values, strict=True)) if len(keys) == len(values) else {}


def _judge(groups: Sequence[Group], scores: Mapping[str, Mapping[str, float]]) -> str:
    """The student whose cases are shown: the first one that learned from attention, else the last."""
    scored = [group for group in groups if scores[group.label]]
    taught = [group.label for group in scored if "attention" in group.arm]
    return taught[0] if taught else scored[-1].label if scored else ""


def _all_maps(groups: Sequence[Group], teacher: RunFolder | None) -> dict[str, dict[str, np.ndarray]]:
    """Maps by column: the teacher, the students that learned from attention, the others."""
    ordered = sorted(groups, key=lambda group: "attention" not in group.arm)
    maps = {group.label: _load_maps(group.runs[0].path / "probe" / "alignment.safetensors") for group in ordered}
    if teacher is not None:
        maps = {"teacher": _load_maps(teacher.path / "maps.safetensors"), **maps}
    return {label: found for label, found in maps.items() if found}


def _row(gaze: ShardSet, target: GazeTarget, maps: Maps, scores: Mapping[str, Mapping[str, float]]) -> list[Picture]:
    image = decode_rgb(gaze.read(target.shard, target.row).image)
    scale = THUMBNAIL / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    human = target.density((max(1, target.size[0] // 4), max(1, target.size[1] // 4)))
    row = [
        Picture(image, f"image {target.key}"),
        Picture(overlay(image, human), f"where people looked on {target.key}"),
    ]
    for label, found in maps.items():
        score = scores.get(label, {}).get(target.key)
        note = f"NSS {score:.2f}" if score is not None else ""
        row.append(Picture(overlay(image, found[target.key]), f"attention of {label} on {target.key}", note))
    return row


def _load_maps(path: Path) -> dict[str, np.ndarray]:
    return load_file(path) if path.is_file() else {}
