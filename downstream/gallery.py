"""What attention looks like before and after: words shaded, image maps side by side, and what masks are worth."""

from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from downstream.analysis import score_by_num_masks, score_by_num_tokens
from downstream.config import DownstreamConfig
from downstream.protocol import AttentionModel, Examples, Task
from downstream.stage import FIRST_STEP, best_weights, stage_folder
from downstream.surrogates import SurrogateStore
from engine.page import Page, curves_svg, overlay
from engine.runs import RunFolder

NUM_SHOWN = 8
NUM_ANALYSED = 64
THUMBNAIL = 96


def add_gallery(page: Page, config: DownstreamConfig, task: Task, *, seed: int, arms: list[str]) -> None:
    """Maps of the first step, of the surrogates' own effect on scores, and of every arm, for one seed."""
    for modality in task.modalities:
        store = SurrogateStore(stage_folder(config, arm=FIRST_STEP, seed=seed).path / "surrogates" / modality)
        if store.complete:
            found = store.load(task.train.keys)
            better = found.best > 0
            page.paragraph(
                f"{modality}: a mask beats the whole input on {100 * float(better.float().mean()):.1f} % of the "
                f"training examples; mean true-class score {float(found.unmasked.mean()):.3f} without masks, "
                f"{float(found.scores.mean()):.3f} with the best."
            )
    _add_analysis(page, config, task, seed=seed)
    shown = np.arange(min(NUM_SHOWN, len(task.test)))
    maps = {arm: _maps(task, stage_folder(config, arm=arm, seed=seed), task.test, shown) for arm in (FIRST_STEP, *arms)}
    if "text" in task.modalities:
        page.heading("Words, shaded by attention")
        for i in shown.tolist():
            words = getattr(task.test, "words", None)
            if words is None:
                break
            for arm, found_maps in maps.items():
                page.words(words[i], found_maps["text"][i, : len(words[i])].tolist(), label=arm)
    if "image" in task.modalities and hasattr(task.test, "images"):
        page.heading("Where the network looks")
        rows = [_image_row(task.test, i, maps) for i in shown.tolist()]
        page.gallery(["image", *maps], rows, caption="Attention of the first step and of every arm, on test images")


def _add_analysis(page: Page, config: DownstreamConfig, task: Task, *, seed: int) -> None:
    """True-class score against the number of masks and of tokens kept, on training examples, of the first step."""
    model = _model(task, stage_folder(config, arm=FIRST_STEP, seed=seed), examples=task.train)
    rows = np.linspace(0, len(task.train) - 1, min(NUM_ANALYSED, len(task.train))).astype(int)
    for modality in task.modalities:
        curve = score_by_num_masks(model, task.train, rows, modality=modality, masks=partial(task.masks, modality))
        if len(curve) > 1:
            title = f"{modality}: best true-class score by number of masks"
            page.plot(_curve(curve, "masks tried"), alt=title, caption=f"{title}, {len(rows)} training examples")
        if modality == "text":
            kept = score_by_num_tokens(model, task.train, rows)
            if kept:
                title = "text: best true-class score with only k tokens kept"
                page.plot(_curve(kept, "tokens kept"), alt=title, caption=f"{title}, every choice of k tried")


def _curve(points: dict[int, float], label: str) -> bytes:
    return curves_svg({"score": (list(points), list(points.values()))}, x_label=label, y_label="true-class score")


@torch.inference_mode()
def _maps(task: Task, run: RunFolder, examples: Examples, rows: np.ndarray) -> dict[str, Tensor]:
    model = _model(task, run, examples=examples)
    device = next(model.parameters()).device
    found = model({name: value.to(device) for name, value in examples.inputs(rows).items()}).maps
    return {name: maps.cpu() for name, maps in found.items()}


def _model(task: Task, run: RunFolder, *, examples: Examples) -> AttentionModel:
    """A stage's model, where the examples are."""
    model = task.build_model()
    assert isinstance(model, AttentionModel)
    model.load_state_dict(best_weights(run))
    return model.to(getattr(examples, "device", "cpu")).eval()


def _image_row(examples: Any, i: int, maps: dict[str, dict[str, Tensor]]) -> list[tuple[np.ndarray, str]]:
    image = cv2.resize(examples.images[i].cpu().numpy(), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_CUBIC)
    key = examples.keys[i]
    row = [(image, f"image {key}")]
    return row + [(overlay(image, found["image"][i].numpy()), f"{arm} on {key}") for arm, found in maps.items()]
