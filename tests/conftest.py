"""Data and configs that several rooms' tests share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from attention.maps import fixation_density
from shards.generate import Config as SampleConfig
from shards.generate import main as generate
from shards.labels import encode_label, label_directory, seal_labels, write_label_shard
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.base import SourceConfig, make_source

TEACHER = "5accade0" * 8


@dataclass(frozen=True)
class TinySample:
    """A generated sample, packed: labelled images, gaze, and labels made from a fixed map per image."""

    root: Path

    @property
    def train(self) -> Path:
        """72 labelled images in three shards."""
        return self.root / "train"

    @property
    def val(self) -> Path:
        """40 labelled images."""
        return self.root / "val"

    @property
    def gaze(self) -> Path:
        """20 images with fixations."""
        return self.root / "gaze"

    @property
    def labels(self) -> Path:
        """Folder that holds the one label set of `train`."""
        return self.root / "labels"


@pytest.fixture(scope="session")
def tiny_sample(tmp_path_factory: pytest.TempPathFactory) -> TinySample:
    """Generate and pack a small sample once per session."""
    root = tmp_path_factory.mktemp("tiny")
    sample = root / "sample"
    generate(
        SampleConfig(
            output=sample, num_train=72, num_val=40, num_gaze_train=20, num_gaze_val=20, image_size=64, num_workers=1
        )
    )
    tiny = TinySample(root)
    for split, folder in (("train", tiny.train), ("val", tiny.val)):
        source = make_source(SourceConfig(kind="image_folder", path=str(sample / "images" / split)))
        pack(source, folder, shard_samples=24, workers=1)
    source = make_source(SourceConfig(kind="salicon", path=str(sample / "gaze"), split="val"))
    pack(source, tiny.gaze, workers=1)
    write_labels(tiny.train, tiny.labels)
    return tiny


def write_labels(images: Path, root: Path, *, teacher: str = TEACHER) -> Path:
    """A sealed label set for `images`: a blob whose place depends on the key alone."""
    shards = ShardSet(images)
    folder = label_directory(root, teacher)
    for shard in range(len(shards.shard_sizes)):
        maps = []
        for key in shards.keys(shard):
            place = sum(key.encode()) % 40 + 12
            density = fixation_density([[place, 64 - place]], size=(64, 64), sigma=8, grid=(56, 56))
            maps.append((key, encode_label(density)))
        write_label_shard(folder, shards, shard, maps)
    seal_labels(folder, shards, teacher={"hash": teacher}, settings={"size": [56, 56]})
    return folder


@pytest.fixture
def student_config(tiny_sample: TinySample, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small student's YAML; keyword arguments `section__key` override it."""

    def write(**overrides: Any) -> Path:
        config: dict[str, Any] = {
            "run": "student",
            "runs": str(tmp_path / "runs"),
            "arm": "contrastive+attention",
            "max_steps": 10,
            "data": {
                "shards": str(tiny_sample.train),
                "labels": str(tiny_sample.labels),
                "batch_size": 12,
                "image_size": 32,
            },
            "model": {"backbone": "test_resnet", "projector_hidden": 32, "projector_out": 16},
            "attention": {"channels": 16},
            "optim": {"name": "adamw", "lr": 0.001, "lr_scaling": "none", "warmup_epochs": 0.5},
            "loop": {"log_every": 1, "checkpoint_every": 100, "tracker": "none", "num_workers": 0},
        }
        for name, value in overrides.items():
            *sections, key = name.split("__")
            place = config
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        path = tmp_path / f"{config['run']}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write
