"""Surrogates of images as a label set: verified, read by key, the same maps."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from downstream.config import DataConfig, DownstreamConfig, ImageConfig
from downstream.export_config import ExportConfig
from downstream.exporter import export
from downstream.pipeline import Pipeline
from downstream.stage import stage_folder
from downstream.surrogates import SurrogateStore
from downstream.tasks.images import ImageTask
from engine.errors import InputError
from engine.settings import LoopConfig, OptimConfig
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder
from tests.tools import run_python


def write_images(folder: Path, *, each: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, channel in (("blue", 0), ("red", 2)):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            image = rng.integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
            image[..., channel] = 255
            cv2.imwrite(str(folder / name / f"{seed}-{i}.jpg"), image)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DownstreamConfig:
    root = tmp_path_factory.mktemp("export")
    for seed, (part, each) in enumerate((("train", 15), ("test", 4))):
        pack(ImageFolder(write_images(root / part, each=each, seed=seed)), root / "shards" / part, shard_samples=20)
    config = DownstreamConfig(
        run="t",
        runs=root / "runs",
        task="cifar10",
        epochs=1,
        retrain_epochs=1,
        data=DataConfig(path=root / "shards" / "train", val=root / "shards" / "test", batch_size=9),
        image=ImageConfig(size=16, channels=4, num_masks=6),
        optim=OptimConfig(name="adamw", lr=0.01, lr_scaling="none", warmup_epochs=0),
        loop=LoopConfig(num_workers=0, tracker="none"),
    )
    Pipeline.open(config).second_step(config, "mse", 0)
    return config


def test_a_label_set_holds_the_surrogates_by_key(config: DownstreamConfig, tmp_path: Path) -> None:
    run = stage_folder(config, arm="step1", seed=0)
    directory = export(ExportConfig(run=run.path, output=tmp_path))
    written = (directory / "manifest.json").read_bytes()
    manifest = run.path / "surrogates" / "image" / "manifest.json"
    options = ("--images", config.data.path, "--teacher", manifest)
    assert run_python("shards/verify.py", directory, *options).returncode == 0
    train = ImageTask(config).train
    found = SurrogateStore(run.path / "surrogates" / "image").load(train.keys)
    images = ShardSet(config.data.path, labels=directory)
    places = [(shard, row) for shard, count in enumerate(images.shard_sizes.tolist()) for row in range(count)]
    maps = {sample.key: sample.map for sample in (images.read(*place) for place in places)}
    assert len(maps) == 30 and len(train) == 27, "the held-out tenth has surrogates too"
    for key, given in zip(train.keys, found.maps.numpy(), strict=True):
        density = maps[key]
        assert density is not None and np.allclose(density / density.sum(), given, atol=0.02)
    assert export(ExportConfig(run=run.path, output=tmp_path)) == directory
    assert (directory / "manifest.json").read_bytes() == written


def test_what_has_no_surrogates_of_images_is_refused(config: DownstreamConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mse of task 'cifar10': give the step1"):
        export(ExportConfig(run=stage_folder(config, arm="mse", seed=0).path, output=tmp_path))
    bare = replace(config, run="bare")
    Pipeline.open(bare).first_step(bare, 0)
    with pytest.raises(InputError, match="no complete surrogates"):
        export(ExportConfig(run=stage_folder(bare, arm="step1", seed=0).path, output=tmp_path))
