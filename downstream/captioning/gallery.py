"""Captions word by word: the image, the mask of the object that a word names, and where each arm looked."""

from typing import Any

import cv2
import numpy as np
import torch

from downstream.captioning.data import CaptionTask
from downstream.captioning.models.base import Captioner
from downstream.captioning.scoring import read_captions_of
from downstream.config import DownstreamConfig
from downstream.stage import BEST, best_weights, stage_folder
from downstream.tasks.pictures import read_square
from engine.page import Page, Picture, overlay

NUM_CAPTIONS = 8
THUMBNAIL = 136


def add_word_gallery(page: Page, config: DownstreamConfig, task: CaptionTask, *, arms: list[str], seed: int) -> None:
    """Add the test images' captions of every arm, and the words that name objects with mask and maps; of one seed."""
    page.heading("Captions")
    written = {arm: read_captions_of(stage_folder(config, arm=arm, seed=seed))[0] for arm in arms}
    lines = []
    for image in task.test.images[:NUM_CAPTIONS]:
        lines += [[image.name, "reference", image.captions[0]]]
        lines += [["", arm, written[arm][image.name]] for arm in arms]
    page.table(["image", "by", "caption"], lines, caption=f"Test images, seed {seed}")
    chosen = _with_most_objects(task)
    if not chosen:
        return
    page.heading("Word by word")
    gone = [arm for arm in arms if not (stage_folder(config, arm=arm, seed=seed).path / BEST).is_file()]
    if gone:
        page.note(f"No maps: {BEST} of {', '.join(gone)}, seed {seed}, is no longer in the run folder.")
        return
    models = {arm: _model(config, task, arm=arm, seed=seed) for arm in arms}
    for row in chosen:
        maps = {arm: _maps(model, task, row) for arm, model in models.items()}
        words = " ".join(task.test.captions.words[row])
        rows = _rows(task, row, maps)
        columns = ["image", "mask", *arms]
        page.blending_gallery(columns, rows, caption=f"{words}: where each arm looks for the word named below")


def _with_most_objects(task: CaptionTask) -> list[int]:
    """The caption that names the most objects, of each of the first images that have one."""
    counts = (task.test.captions.positions >= 0).sum(1).tolist()
    best: dict[int, int] = {}
    most: dict[int, int] = {}
    for row, image in enumerate(task.test.captions.image_rows.tolist()):
        if counts[row] > most.get(image, 0):
            best[image], most[image] = row, counts[row]
    return list(best.values())[:NUM_CAPTIONS]


def _model(config: DownstreamConfig, task: CaptionTask, *, arm: str, seed: int) -> Captioner:
    model = task.build_model()
    model.load_state_dict(best_weights(stage_folder(config, arm=arm, seed=seed)))
    return model.to("cpu").eval()


@torch.inference_mode()
def _maps(model: Captioner, task: CaptionTask, row: int) -> np.ndarray:
    inputs = task.test.captions.inputs(np.array([row]))
    found: Any = model({name: value.cpu() for name, value in inputs.items()})
    return found.maps[0].float().numpy()


def _rows(task: CaptionTask, row: int, maps: dict[str, np.ndarray]) -> list[list[Picture]]:
    captions = task.test.captions
    image = task.test.images[int(captions.image_rows[row])]
    pixels = read_square(image.path, size=THUMBNAIL)
    rows = []
    for position, grid in zip(captions.positions[row].tolist(), captions.grids[row].tolist(), strict=True):
        if position < 0:
            continue
        word = captions.words[row][position]
        mask = cv2.resize(captions.coverage[grid].numpy(), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_NEAREST)
        shaded = (pixels * (0.25 + 0.75 * mask[..., None])).astype(np.uint8)
        found = [Picture(pixels, f"{image.name}", word), Picture(shaded, f"mask of {word} in {image.name}")]
        inside = {arm: float((m[position] * captions.coverage[grid].numpy()).sum()) for arm, m in maps.items()}
        found += [
            Picture(overlay(pixels, m[position]), f"{arm} for {word} on {image.name}", f"{inside[arm]:.0%} inside")
            for arm, m in maps.items()
        ]
        rows.append(found)
    return rows
