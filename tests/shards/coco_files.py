"""Small COCO files: masks in each of COCO's forms, in COCO's layout and as a bare list of results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 10, "name": "traffic light"}, {"id": 18, "name": "dog"}]


def mask_of(seed: int, *, height: int, width: int) -> np.ndarray:
    """A rectangle with holes."""
    rng = np.random.default_rng(seed)
    top, left = int(rng.integers(0, height - 4)), int(rng.integers(0, width - 4))
    mask = np.zeros((height, width), dtype=bool)
    mask[top : top + 1 + int(rng.integers(3, height)), left : left + 1 + int(rng.integers(3, width))] = True
    return mask & (rng.random((height, width)) < 0.9)


def compressed(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths as detectors write them."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def plain(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths as COCO's own files hold them for crowds: by columns, background first."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, flat.size]).tolist()}


def write_coco(path: Path, names: list[str], *, size: tuple[int, int], **more: Any) -> Path:
    """A file in COCO's layout: image number i has i modulo 3 objects, with scores 0.9, 0.6, ..., compressed.

    Args:
        more: other entries of the file, or those in place of its own.
    """
    height, width = size
    images = [{"id": 100 + i, "file_name": name, "height": height, "width": width} for i, name in enumerate(names)]
    annotations = [
        {
            "image_id": 100 + i,
            "category_id": CATEGORIES[(i + j) % 3]["id"],
            "score": 0.6 + 0.3 * j,
            "segmentation": compressed(mask_of(10 * i + j, height=height, width=width)),
        }
        for i in range(len(names))
        for j in range(i % 3)
    ]
    content = {"images": images, "categories": CATEGORIES, "annotations": annotations} | more
    path.write_text(json.dumps(content))
    return path
