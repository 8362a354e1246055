"""Write the generated sample: an image folder and a gaze set in the layout of SALICON's 2017 release.

    OUTPUT/images/{train,val}/<class>/*.jpg          an ordinary image folder
    OUTPUT/gaze/images/{train,val}/*.jpg             other scenes, with simulated observers
    OUTPUT/gaze/fixations/{train,val}/*.mat          `image`, `resolution`, `gaze`: one struct per observer, from 1
    OUTPUT/gaze/maps/{train,val}/*.png               blurred fixations, 8 bit, brightest = 255
    OUTPUT/sample.json                               the settings, written last

Every image is a pure function of (seed, part, number): the files are the same byte for byte for any number of
processes, and a larger sample holds the smaller one.
"""

import io
import json
import multiprocessing
import os
import shutil
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt
from numpy.typing import NDArray
from scipy.io import savemat

from engine.errors import InputError
from engine.files import write_json
from engine.forking import end_opencv_threads
from engine.program import run_program
from engine.progress import ProgressBar
from shards.scenes import CLASS_NAMES, Scene, observe, render_scene

# Raise it with every change to what the scenes look like: an older sample is then refused, not taken for this one.
SCHEMA = 2
JPEG_QUALITY = 92
# SALICON's published blur: 19 pixels on images 640 pixels wide.
SIGMA_PER_WIDTH = 19 / 640
SAMPLES_PER_FIXATION = 3
MAT_TEXT_BYTES = 116
# A part's place here is its key in the random streams: never reorder.
PARTS = ("images/train", "images/val", "gaze/train", "gaze/val")


@dataclass
class Config:
    """Write a sample of generated scenes with simulated gaze."""

    output: Path = Path("data/demo/sample")
    """Folder to write; a complete sample of the same settings there is left as it is."""
    num_train: PositiveInt = 2000
    """Training images with a class."""
    num_val: PositiveInt = 500
    """Validation images with a class."""
    num_gaze_train: PositiveInt = 500
    """Training images with fixations."""
    num_gaze_val: PositiveInt = 150
    """Validation images with fixations."""
    image_size: PositiveInt = 96
    """Height and width of all images, pixels; at least 32."""
    num_observers: PositiveInt = 12
    """Simulated observers of each image of the gaze set, each making 5 to 10 fixations."""
    seed: NonNegativeInt = 0
    """Seed of everything."""
    num_workers: NonNegativeInt = 0
    """Processes; 0 uses every core. The result does not depend on it."""


def settings_of(config: Config) -> dict[str, Any]:
    """What the files of a sample depend on, as `sample.json` holds it."""
    names = ("num_train", "num_val", "num_gaze_train", "num_gaze_val", "image_size", "num_observers", "seed")
    return {"schema": SCHEMA, "kind": "generated"} | {name: int(getattr(config, name)) for name in names}


def is_complete(config: Config) -> bool:
    """Whether `config.output` already holds this very sample.

    Raises:
        InputError: something else is there, or the settings make no sense.
    """
    if config.image_size < 32:
        raise InputError(f"image_size is {config.image_size}: give at least 32 pixels")
    marker = config.output / "sample.json"
    if not config.output.exists():
        return False
    if not config.output.is_dir():
        raise InputError(f"{config.output} is a file: choose another --output")
    if not any(config.output.iterdir()):
        return False
    try:
        found = json.loads(marker.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("kind") != "generated":
        raise InputError(f"{config.output} holds other files: choose another --output or empty it")
    wanted = settings_of(config)
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise InputError(
            f"{config.output} holds a sample with {key} {found.get(key)}, not {wanted[key]}: "
            "choose another --output or remove that folder"
        )
    return True


def generate(config: Config) -> bool:
    """Write the sample, unless it is complete already. It appears under its name only when it is whole.

    Returns:
        True when files were written, False when the sample was there.
    """
    if is_complete(config):
        return False
    jobs = [(part, number) for part, count in zip(PARTS, _counts(config), strict=True) for number in range(count)]
    output = config.output.absolute()
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}.tmp")
    try:
        _make_folders(temporary)
        _write_all(jobs, temporary, config)
        write_json(temporary / "sample.json", settings_of(config))
        if output.exists():  # an empty folder, as is_complete() made sure
            output.rmdir()
        os.rename(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return True


def _counts(config: Config) -> tuple[int, int, int, int]:
    return config.num_train, config.num_val, config.num_gaze_train, config.num_gaze_val


def _make_folders(root: Path) -> None:
    try:
        for split in ("train", "val"):
            for name in CLASS_NAMES:
                (root / "images" / split / name).mkdir(parents=True)
            for kind in ("images", "fixations", "maps"):
                (root / "gaze" / kind / split).mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write in {root.parent}: {error.strerror}: choose another --output") from error


def _write_all(jobs: list[tuple[str, int]], root: Path, config: Config) -> None:
    work = partial(write_item, root=root, seed=config.seed, size=config.image_size, num_observers=config.num_observers)
    workers = min(config.num_workers or os.cpu_count() or 1, len(jobs))
    if workers == 1:
        with ProgressBar(len(jobs), "generate") as bar:
            for job in jobs:
                work(job)
                bar.update()
        return
    end_opencv_threads()
    # The pool is made before the bar: a forked process must not inherit the bar's thread.
    with (
        multiprocessing.Pool(workers) as pool,
        ProgressBar(len(jobs), "generate") as bar,
    ):
        for _ in pool.imap_unordered(work, jobs, chunksize=16):
            bar.update()


def write_item(job: tuple[str, int], *, root: Path, seed: int, size: int, num_observers: int) -> None:
    """Render and write one image, and for the gaze set its fixations and map.

    Args:
        job: part of the sample (one of `PARTS`) and number of the image in it; the class is the number modulo ten.
        root: folder of the sample, with all its subfolders.
    """
    part, number = job
    kind, split = part.split("/")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(PARTS.index(part), number)))
    scene = render_scene(rng, size=size, class_id=number % len(CLASS_NAMES))
    if kind == "images":
        _write_jpeg(root / part / CLASS_NAMES[scene.class_id] / f"{number:07d}.jpg", scene)
        return
    stem = f"GENERATED_{split}_{number:012d}"
    observers = [to_pixels(points, size=size) for points in observe(rng, scene, num_observers=num_observers)]
    _write_jpeg(root / "gaze" / "images" / split / f"{stem}.jpg", scene)
    mat = encode_gaze(rng, observers, name=stem, size=size)
    (root / "gaze" / "fixations" / split / f"{stem}.mat").write_bytes(mat)
    _, png = cv2.imencode(".png", fixation_map(np.concatenate(observers), size=size))
    (root / "gaze" / "maps" / split / f"{stem}.png").write_bytes(png.tobytes())


def to_pixels(points: NDArray[np.float32], *, size: int) -> NDArray[np.uint16]:
    """Points `(num, 2)` in 0-based pixels to SALICON's 1-based whole pixels, inside the image."""
    return np.clip(np.rint(points) + 1, 1, size).astype(np.uint16)


def encode_gaze(rng: np.random.Generator, observers: list[NDArray[np.uint16]], *, name: str, size: int) -> bytes:
    """Bytes of a SALICON 2017 `.mat` file.

    Variables: `image` (name without extension), `resolution` (height, width), and `gaze`, a column of structs, one per
    observer, with `location` (raw samples, x and y, double), `timestamp` (their time, ms) and `fixations` (x and y,
    counted from 1).
    """
    gaze = np.empty((len(observers), 1), dtype=[("location", "O"), ("timestamp", "O"), ("fixations", "O")])
    for row, fixations in enumerate(observers):
        samples = np.repeat(fixations.astype(np.float64), SAMPLES_PER_FIXATION, axis=0)
        samples = np.clip(samples + rng.normal(0, 0.5, samples.shape), 1, size)
        steps = rng.integers(50, 130, size=(len(samples), 1))
        gaze[row, 0] = (samples, np.cumsum(steps, axis=0).astype(np.float64), fixations)
    file = io.BytesIO()
    resolution = np.array([[size, size]], dtype=np.uint16)
    savemat(file, {"image": name, "resolution": resolution, "gaze": gaze}, do_compression=True)
    # The header's free text holds the time of writing: the same sample must have the same bytes.
    text = b"MATLAB 5.0 MAT-file, generated sample"
    return text.ljust(MAT_TEXT_BYTES) + file.getvalue()[MAT_TEXT_BYTES:]


def fixation_map(points: NDArray[np.uint16], *, size: int) -> NDArray[np.uint8]:
    """Blurred fixations `(size, size)`, brightest 255, from 1-based points `(num, 2)` of x, y."""
    counts = np.zeros((size, size), dtype=np.float32)
    np.add.at(counts, (points[:, 1].astype(int) - 1, points[:, 0].astype(int) - 1), 1.0)
    blurred = cv2.GaussianBlur(counts, (0, 0), SIGMA_PER_WIDTH * size, borderType=cv2.BORDER_CONSTANT)
    return np.rint(255 * blurred / blurred.max()).astype(np.uint8)


def _write_jpeg(path: Path, scene: Scene) -> None:
    bgr = np.ascontiguousarray(scene.image[..., ::-1])
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    path.write_bytes(data.tobytes())


def check(config: Config) -> list[str]:
    """Say what is there and what would be written."""
    if is_complete(config):
        return [f"{config.output} holds this sample already"]
    train, val, gaze_train, gaze_val = _counts(config)
    images = f"{train} + {val} images in {len(CLASS_NAMES)} classes, {gaze_train} + {gaze_val} with gaze"
    return [f"{config.output} is free for {images}, {config.image_size} x {config.image_size} pixels"]


def main(config: Config) -> None:
    """Write the sample."""
    generate(config)


if __name__ == "__main__":
    run_program(main, Config, description="Write the generated sample.", check=check)
