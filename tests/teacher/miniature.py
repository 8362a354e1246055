"""Small releases in their true layouts: SALICON of 2017 (.mat) and 2015 (COCO-style JSON), and OSIE."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.io import savemat
from scipy.ndimage import gaussian_filter

HEIGHT, WIDTH = 96, 128
SPLITS = {"train": 17, "val": 3}
NUM_OBSERVERS = 3
# OSIE's split is fixed: the last 200 images by name are held out
NUM_OSIE = 216


def write_image(path: Path, *, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC))


def gaze_of(seed: int) -> list[np.ndarray]:
    """Per observer `(9, 2)` x, y counted from 0, off-centre and wider than high."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform((24, 16), (104, 48))
    points = [np.rint(rng.normal(centre, (12, 5), (9, 2))).astype(int) for _ in range(NUM_OBSERVERS)]
    return [np.clip(one, 0, (WIDTH - 1, HEIGHT - 1)) for one in points]


def write_map(path: Path, points: list[np.ndarray]) -> None:
    counts = np.zeros((HEIGHT, WIDTH))
    for x, y in np.concatenate(points):
        counts[y, x] += 1
    blurred = gaussian_filter(counts, 19 / 640 * WIDTH, mode="constant")
    cv2.imwrite(str(path), np.rint(255 * blurred / blurred.max()).astype(np.uint8))


def write_mat(path: Path, observers: list[np.ndarray]) -> None:
    """The 2017 layout; positions `(num, 2)` x, y counted from 1."""
    gaze = np.zeros((len(observers), 1), dtype=[("location", "O"), ("timestamp", "O"), ("fixations", "O")])
    for number, points in enumerate(observers):
        gaze[number, 0] = (points + 0.25, np.arange(len(points))[:, None], points)
    savemat(path, {"image": path.stem, "resolution": np.array([[HEIGHT, WIDTH]]), "gaze": gaze})


def write_salicon(root: Path, *, edition: str) -> None:
    """`images/`, `maps/`, and the gaze of the edition."""
    for split, count in SPLITS.items():
        for folder in ("images", "maps", "fixations"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        for number in range(count):
            name, points = f"COCO_{split}2014_{number:012d}", gaze_of(number)
            write_image(root / "images" / split / f"{name}.jpg", seed=number)
            write_map(root / "maps" / split / f"{name}.png", points)
            if edition == "2017":
                write_mat(root / "fixations" / split / f"{name}.mat", [one + 1 for one in points])
            content["images"].append({"id": number, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
            content["annotations"] += [
                {"image_id": number, "worker_id": worker, "fixations": (one + 1)[:, ::-1].tolist()}
                for worker, one in enumerate(points)
            ]
        if edition == "2015":
            (root / f"fixations_{split}2014.json").write_text(json.dumps(content))


def write_osie(root: Path) -> None:
    """Stimuli, eye tracking, and mouse tracking as row and column."""
    for folder in ("stimuli", "eye", "mouse_lab"):
        (root / "data" / folder).mkdir(parents=True)
    fixations = np.zeros((NUM_OSIE, 1), dtype=object)
    for number in range(NUM_OSIE):
        write_image(root / f"data/stimuli/{1001 + number}.jpg", seed=number, size=(24, 32))
        subjects = np.zeros((2, 1), dtype=object)
        for observer in range(2):
            subjects[observer, 0] = {"fix_x": np.array([[10.2, 3.0 + observer]]), "fix_y": np.array([[5.0, 7.6]])}
        fixations[number, 0] = {"img": f"{1001 + number}.jpg", "subjects": subjects}
        mouse = {"subj": np.array([[1], [1], [4]]), "coord": np.array([[2, 9], [3, 8], [24, 32]])}
        savemat(root / f"data/mouse_lab/{1001 + number}.mat", {"fixations": mouse})
    savemat(root / "data/eye/fixations.mat", {"fixations": fixations})
