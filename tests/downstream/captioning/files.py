"""Miniature captioned sets in the layouts of Flickr8k, COCO and Karpathy, with object masks."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_masks

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
CLASSES = {"red": "dog", "green": "traffic light", "blue": "car"}
SIDE = 96


def box_of(number: int) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the square in an image: left or right half."""
    left = 8 if number % 2 else 48
    return 28, left, 68, left + 40


def colour_of(number: int) -> str:
    return sorted(COLOURS)[number % 3]


def sentences(number: int) -> list[str]:
    """Two captions that the image determines."""
    name, side = CLASSES[colour_of(number)], "left" if number % 2 else "right"
    return [f"A {name} on the {side} .", f"there is one {name} to the {side}"]


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        image = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
        top, left, bottom, right = box_of(number)
        image[top:bottom, left:right] = COLOURS[colour_of(number)]
        names.append(f"{number:04d}.jpg")
        cv2.imwrite(str(folder / names[-1]), image[..., ::-1])
    return names


def write_flickr8k(root: Path, count: int = 30) -> Path:
    """`images/`, `captions.txt`, and `detections.json` of all images."""
    names = write_images(root / "images", count)
    lines = ["image,caption", *(f"{name},{text}" for i, name in enumerate(names) for text in sentences(i))]
    (root / "captions.txt").write_text("\n".join(lines) + "\n")
    (root / "detections.json").write_text(json.dumps(detections(names)))
    return root


def write_coco(root: Path, count: int = 20) -> Path:
    """`images/`, `captions.json`, `instances.json`."""
    names = write_images(root / "images", count)
    images = [{"id": i + 1, "file_name": name, "height": SIDE, "width": SIDE} for i, name in enumerate(names)]
    texts = [
        {"id": 10 * i + j, "image_id": i + 1, "caption": text}
        for i in range(count)
        for j, text in enumerate(sentences(i))
    ]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": texts}))
    (root / "instances.json").write_text(json.dumps(detections(names)))
    return root


def mask_of(number: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    top, left, bottom, right = box_of(number)
    mask[top:bottom, left:right] = True
    return mask


def detections(names: list[str]) -> dict[str, Any]:
    """COCO's JSON with one object each: compressed run lengths, run lengths and polygons by turns."""
    classes = sorted(CLASSES.values())
    return {
        "images": [{"id": i + 1, "file_name": name, "height": SIDE, "width": SIDE} for i, name in enumerate(names)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i + 1,
                "category_id": classes.index(CLASSES[colour_of(i)]) + 1,
                "score": 0.9,
                "segmentation": segmentation(i, kind=("compressed", "runs", "polygon")[i // 2 % 3]),
            }
            for i in range(len(names))
        ],
    }


def segmentation(number: int, *, kind: str) -> Any:
    mask = mask_of(number)
    if kind == "polygon":
        top, left, bottom, right = box_of(number)
        return [[left, top, right, top, right, bottom, left, bottom]]
    if kind == "compressed":
        found = coco_masks.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": [SIDE, SIDE], "counts": found["counts"].decode()}
    flat = mask.T.flatten()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)])
    return {"size": [SIDE, SIDE], "counts": runs.tolist()}
