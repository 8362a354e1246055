"""Tiny gaze and image sets, and a teacher trained on them."""

import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from engine.program import parse_config
from shards.pack import pack
from shards.sources.base import Item
from teacher.config import DEFAULT_CONFIG, Config
from teacher.trainer import train

SIZE = (48, 64)
SIGMA = 4.0


class BlobSource:
    """Images with one bright blob that the first observer looks at; the second looks beside the image."""

    classes: tuple[str, ...] = ()

    def __init__(self, count: int, *, edition: str | None = "simulated", looked_at: bool = True, seed: int = 0) -> None:
        self.count, self.looked_at, self.seed = count, looked_at, seed
        self.gaze: dict[str, Any] | None = {"edition": edition, "sigma": SIGMA} if edition else None

    def items(self) -> list[Item]:
        return [Item(f"{number:04d}.png", 1) for number in range(self.count)]

    def place(self, item: Item) -> tuple[int, int, np.random.Generator]:
        rng = np.random.default_rng([self.seed, int(item.name[:4])])
        return int(rng.integers(6, SIZE[1] - 6)), int(rng.integers(6, SIZE[0] - 6)), rng

    def read(self, item: Item) -> bytes:
        x, y, rng = self.place(item)
        image = rng.integers(0, 90, size=(*SIZE, 3), dtype=np.uint8)
        cv2.circle(image, (x, y), 5, (255, 255, 255), -1)
        return cv2.imencode(".png", image)[1].tobytes()

    def fixations(self, item: Item) -> list[list[list[int]]] | None:
        if self.gaze is None:
            return None
        x, y, _ = self.place(item)
        points = [[x, y], [x + 2, y - 1]] if self.looked_at else []
        return [points, [[SIZE[1] + 5, y]]]

    def describe(self) -> dict[str, object]:
        return {"kind": "blobs", "num_images": self.count}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small models gain nothing from threads; programs that the tests start are given one too."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def launcher_forgotten() -> Iterator[None]:
    """accelerate keeps the first precision of a process: the next test may want another."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the gaze sets `train`, `val`, `unlooked` and `mouse`, and `images` without gaze."""
    root = tmp_path_factory.mktemp("data")
    pack(BlobSource(24, seed=1), root / "train", shard_samples=10)
    pack(BlobSource(9, seed=2), root / "val", shard_samples=5)
    pack(BlobSource(22, edition=None, seed=3), root / "images", shard_samples=5)
    pack(BlobSource(4, looked_at=False), root / "unlooked")
    pack(BlobSource(4, edition="mouse"), root / "mouse")
    return root


def training_options(data: Path, runs: Path, **options: object) -> dict[str, object]:
    """Options of a run of three steps; `__` stands for the dot in a key."""
    return {
        "run": "tiny",
        "runs": runs,
        "max_steps": 3,
        "validate_every": 0.3,
        "data__train": data / "train",
        "data__val": data / "val",
        "data__batch_size": 4,
        "data__image_size": "[32,48]",
        "model__backbone": "test_resnet",
        "loop__num_workers": 0,
        "loop__tracker": "none",
        "loop__log_every": 1,
    } | options


def arguments_of(options: dict[str, object]) -> list[str]:
    """Command line of options."""
    return [f"--{key.replace('__', '.')}={value}" for key, value in options.items()]


def run_here(*words: object) -> int:
    """Run a program in this process, which has paid for its imports; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [str(word) for word in words])
        runpy.run_path(str(words[0]), run_name="__main__")
    return int(end.value.code or 0)


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = arguments_of(training_options(data, runs))
    config, _ = parse_config(Config, argv=arguments, default_config=DEFAULT_CONFIG)
    train(config)
    return runs / "tiny"
