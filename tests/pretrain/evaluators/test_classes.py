"""Classes without training images: refused where the whole set has none, marked where a limit leaves none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InputError
from pretrain.evaluators.classes import class_labels
from pretrain.evaluators.offline import check_probe, probe_run
from pretrain.evaluators.sources import ShardImages, labelled_pair, train_images
from pretrain.probe_config import ProbeConfig
from shards.quarantine import FILE_NAME, BadEntry, write_quarantine
from shards.reader import ShardSet
from tests.conftest import TinySample

Make = Callable[..., ProbeConfig]


def without_class(original: Path, copy: Path, label: int) -> ShardSet:
    """A copy of a set whose list of bad samples holds all images of a class, and one more."""
    shutil.copytree(original, copy)
    shards = ShardSet(copy)
    labels = [ShardImages(shards).read(number)[1] for number in range(shards.num_samples)]
    bad = [*np.flatnonzero(np.array(labels) == label), labels.index(label + 1)]
    places = [ShardImages(shards).place(int(number)) for number in bad]
    entries = [BadEntry(shard, row, shards.key(shard, row), "unreadable") for shard, row in places]
    write_quarantine(copy, shards.manifest, entries)
    return ShardSet(copy)


def test_a_class_without_training_images_is_refused(probe: Make, tiny_sample: TinySample, tmp_path: Path) -> None:
    shards = without_class(tiny_sample.train, tmp_path / "train", 2)
    expected = [ShardImages(shards).read(number)[1] for number in range(shards.num_samples)]
    assert class_labels(shards).tolist() == expected and set(expected) == set(range(10)) - {2}
    for config in (probe(train=shards.root), probe(train=shards.root, max_train=9)):
        with pytest.raises(InputError, match=f"no training image of class '{shards.classes[2]}'"):
            labelled_pair(config)


def test_the_labels_of_an_open_set_are_read_without_opening_it_again(tiny_sample: TinySample, tmp_path: Path) -> None:
    shards = without_class(tiny_sample.train, tmp_path / "train", 2)
    expected = [ShardImages(shards).read(number)[1] for number in range(shards.num_samples)]
    for name in ("manifest.json", FILE_NAME):
        (tmp_path / "train" / name).unlink()
    assert class_labels(shards).tolist() == expected


def test_classes_that_max_train_leaves_out_are_marked(probe: Make, tmp_path: Path) -> None:
    def protocol() -> dict[str, object]:
        return json.loads((tmp_path / "out" / "summary.json").read_text())["protocols"]["linear_probe"]

    limited = probe(evaluators="linear_probe", max_train=9)
    train = train_images(limited)
    unseen = 10 - len({train.read(number)[1] for number in range(9)})
    assert any(f"max_train 9 leaves {unseen} of 10 classes" in line for line in check_probe(limited))
    probe_run(limited)
    assert protocol()["classes_without_training_images"] == unseen > 0
    probe_run(probe(evaluators="linear_probe"))
    assert "classes_without_training_images" not in protocol()
