"""Test images with the map of every arm and the curve of the insertion game, as part of a table's page."""

import cv2
import numpy as np
import torch
from torch import Tensor

from downstream.branch.data import FineGrained
from downstream.branch.evaluate import read_evaluation
from downstream.branch.pictures import cut
from downstream.config import DownstreamConfig
from downstream.stage import stage_folder
from engine.page import Page, Picture, curves_svg, overlay

NUM_SHOWN = 12
NUM_CURVES = 4
THUMBNAIL = 144
NOTE = 20  # characters that fit under a picture


def add_gallery(page: Page, config: DownstreamConfig, data: FineGrained, *, seed: int, arms: list[str]) -> None:
    """Half of the images shown are ones that the first arm gets wrong, where there are as many."""
    found = {arm: read_evaluation(stage_folder(config, arm=arm, seed=seed).path) for arm in arms}
    shown = choose(found[arms[0]]["top1"], count=NUM_SHOWN)
    page.heading("Where the network looks")
    batch = data.test.central(shown, share=config.branch.test_crop)
    images = cut(data.test.pixels[batch.rows], batch.boxes, batch.flips, size=THUMBNAIL)
    pixels = (255 * images.permute(0, 2, 3, 1)).round().clamp(0, 255).to(torch.uint8).numpy()
    rows = [_row(data, pixels[i], int(row), found) for i, row in enumerate(shown)]
    caption = (
        f"Maps of seed {seed} on test images, each relative to its maximum; under them the true class's probability "
        f"and the area of insertion. Point at one to see the image."
    )
    page.blending_gallery(["image", *arms], rows, caption=caption)
    for number, name in enumerate(config.branch.curves):
        _add_curves(page, data, name, found, shown if number == 0 else shown[:0])


def choose(top1: Tensor, *, count: int) -> np.ndarray:
    """Up to `count` rows spread over the set, half of them wrong ones where there are as many of each."""
    right, wrong = (np.flatnonzero(top1.numpy() == value) for value in (1, 0))
    share = max(count // 2, count - len(right))
    chosen = [part[np.linspace(0, len(part) - 1, min(n, len(part))).astype(int)] for part, n in
              ((wrong, share), (right, count - min(share, len(wrong)))) if len(part)]  # fmt: skip
    return np.sort(np.unique(np.concatenate(chosen)))


def _row(data: FineGrained, image: np.ndarray, row: int, found: dict[str, dict[str, Tensor]]) -> list[Picture]:
    name = data.classes[int(data.test.targets[row])]
    pictures = [Picture(np.ascontiguousarray(image), f"{name}: {data.test.keys[row]}", name[:NOTE])]
    for arm, values in found.items():
        said = data.classes[int(values["predicted"][row])]
        area = f", area {float(values['insertion'][row]):.2f}" if "insertion" in values else ""
        note = f"{'right' if bool(values['top1'][row]) else 'wrong'} {float(values['score'][row]):.2f}{area}"
        heat = cv2.resize(values["map"][row].float().numpy(), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        pictures.append(Picture(overlay(image, heat), f"{arm} on {data.test.keys[row]}: {said}", note))
    return pictures


def _add_curves(
    page: Page, data: FineGrained, name: str, found: dict[str, dict[str, Tensor]], shown: np.ndarray
) -> None:
    """The mean curve of a game over the test set, and those of a few of the images shown."""
    with_curve = {arm: values[f"{name}_scores"].float() for arm, values in found.items() if f"{name}_scores" in values}
    if not with_curve:
        return
    what = name.replace("_", " from ")
    page.heading(f"The game of {what}")
    changed = "hidden" if name == "deletion" else "revealed"
    places = [("all test images", np.arange(len(data.test)))]
    few = shown[:: max(1, len(shown) // NUM_CURVES)][:NUM_CURVES]
    places += [(data.test.keys[row], np.array([row])) for row in few.tolist()]
    for title, rows in places:
        index = torch.from_numpy(rows)
        curves = {}
        for arm, scores in with_curve.items():
            mean = scores[index].mean(0)
            curves[arm] = (torch.linspace(0, 1, len(mean)).tolist(), mean.tolist())
        svg = curves_svg(curves, x_label=f"share of pixels {changed}", y_label="true-class score")
        page.plot(svg, alt=f"{what}: {title}", caption=f"{what}, {title}")
