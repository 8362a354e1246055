"""What a finished teacher leaves for people: pictures, its maps of the validation images, and a page with both."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import yaml
from safetensors.numpy import save
from torch import Tensor

from engine.files import atomic_write
from engine.page import Page, curves_svg, overlay
from engine.runs import RunFolder
from shards.decode import decode_rgb
from shards.gaze import GazeTarget
from shards.reader import ShardSet
from teacher.comparison import MAX_IMAGES, Scores, cells, row_name

WIDTH = 240
GAP = 6
NUM_PICTURES = 12
COLUMNS = ("image", "human", "teacher")
Predictions = list[tuple[GazeTarget, Tensor]]


def evenly(predictions: Predictions, count: int) -> Predictions:
    """At most `count` of them, spread over the set."""
    return predictions[:: max(1, -(-len(predictions) // count))]


def pictures(shards: ShardSet, target: GazeTarget, density: Tensor) -> list[np.ndarray]:
    """An image alone, with the human map over it, with the teacher's: uint8 `(height, 240, 3)` each, RGB.

    Raises:
        ValueError: the image cannot be read.
    """
    image = decode_rgb(shards.read(target.shard, target.row).image)
    height = max(1, round(WIDTH * image.shape[0] / image.shape[1]))
    scaled = cv2.resize(image, (WIDTH, height), interpolation=cv2.INTER_AREA)
    human = target.density((max(1, height // 4), WIDTH // 4))
    return [scaled, overlay(scaled, human), overlay(scaled, density.float().numpy())]


def side_by_side(shards: ShardSet, target: GazeTarget, density: Tensor) -> np.ndarray:
    """`pictures` as one."""
    image, human, ours = pictures(shards, target, density)
    gap = np.full((image.shape[0], GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([image, gap, human, gap, ours], axis=1)


def write_maps(path: Path, predictions: Predictions) -> None:
    """The teacher's densities by key, float32 `(rows, columns)`, of at most `MAX_IMAGES` images, as safetensors."""
    maps = {target.key: density.float().contiguous().numpy() for target, density in evenly(predictions, MAX_IMAGES)}
    atomic_write(path, save(maps))


def write_page(run: RunFolder, shards: ShardSet, predictions: Predictions, rows: Scores) -> Path:
    """`report/index.html`: the table of scores, the course of the training, a gallery, and where it came from."""
    page = Page(f"Saccade teacher: {run.name}")
    header, *lines = cells(rows)
    num_images = int(rows["attention"]["num_images"])
    page.table(header, lines, caption=f"{num_images} validation images; KLD: lower is better; the rest: higher.")
    page.heading("Training")
    lines_of = list(run.metrics())
    for name, title in (("kld", "KLD"), ("nss", "NSS")):
        curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
        for part in ("train", "val"):
            points = [(line["step"], float(line[f"{part}/{name}"])) for line in lines_of if f"{part}/{name}" in line]
            if points:
                curves[part] = [p[0] for p in points], [p[1] for p in points]
        if curves:
            page.plot(curves_svg(curves, x_label="step", y_label=title), alt=f"{title} by step", caption=title)
    page.heading("Where people look, and where the teacher says they do")
    gallery = []
    for target, density in evenly(predictions, NUM_PICTURES):
        names = [f"{column} {target.key}" for column in COLUMNS]
        gallery.append(list(zip(pictures(shards, target, density), names, strict=True)))
    page.gallery(COLUMNS, gallery, caption="Held-out images, brightest where most attention is")
    page.heading("Where it came from")
    origin = {key: value for key, value in run.read_summary().items() if key in ("teacher", "data", "environment")}
    page.code(yaml.safe_dump(origin | {"config": run.read_config()}, sort_keys=False))
    path = run.path / "report" / "index.html"
    page.write(path)
    return path


def table_lines(rows: Scores) -> list[str]:
    """The table of scores for a terminal."""
    header, *body = cells(rows)
    left = max(len(row_name(row)) for row in rows)
    widths = [left, *(max(14, len(name) + 2) for name in header[1:])]
    lines = [
        line[0].ljust(left) + "".join(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))
        for line in (header, *body)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
