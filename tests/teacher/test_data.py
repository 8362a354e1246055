"""Augmentation moves fixations with the image, and is a pure function of seed, epoch and sample."""

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from engine.loading import make_loader
from shards.faults import RemoteFault
from shards.fetch import RemoteOptions
from shards.gaze import GazeTarget
from shards.reader import ShardSet, Stored
from teacher.config import AugmentConfig, DataConfig
from teacher.data import Change, GazeDataset, change_generator, change_image, draw_change, move_target
from teacher.sources import GazeSet, GazeSets, open_sources
from tests.shards.servers import nginx
from tests.teacher.conftest import SIGMA


def whole(path: Path) -> GazeSets:
    """One set as it is."""
    return GazeSets([GazeSet(ShardSet(path), SIGMA)])


def make_target(points: list[list[float]], size: tuple[int, int]) -> GazeTarget:
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return GazeTarget("key", size, array, np.arange(len(array)), 3.0, 0, 0)


def test_a_mirrored_image_has_the_mirrored_human_map() -> None:
    target = make_target([[3, 7], [50, 20], [63, 47]], (48, 64))
    flipped = move_target(target, Change((0, 0, 48, 64), flip=True))
    np.testing.assert_array_equal(flipped.points[:, 0], [60, 13, 0])
    np.testing.assert_allclose(flipped.density((12, 16)), target.density((12, 16))[:, ::-1], rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_fixations_stay_on_what_they_were_on(seed: int) -> None:
    """A bright dot at the fixation is still at the fixation after crop, flip and resize."""
    rng = np.random.default_rng(seed)
    size = (120, 160)
    x, y = int(rng.integers(60, 100)), int(rng.integers(50, 70))
    image = np.zeros((*size, 3), dtype=np.uint8)
    cv2.circle(image, (x, y), 4, (255, 255, 255), -1)
    change = draw_change(rng, AugmentConfig(flip=0.5, min_area=0.6), size=size)
    moved = move_target(make_target([[x, y]], size), change)
    out = change_image(image, change, stored=size, size=(60, 80))
    row, column = (c.mean() for c in np.nonzero(out[..., 0] > 127))
    height, width = moved.size
    assert len(moved.points) == 1
    assert column + 0.5 == pytest.approx((moved.points[0, 0] + 0.5) * 80 / width, abs=0.8)
    assert row + 0.5 == pytest.approx((moved.points[0, 1] + 0.5) * 60 / height, abs=0.8)


def test_fixations_outside_the_crop_are_dropped_with_their_observers() -> None:
    target = make_target([[10, 10], [50, 40], [30, 20]], (48, 64))
    moved = move_target(target, Change((8, 20, 20, 30)))
    np.testing.assert_array_equal(moved.points, [[10, 12]])
    np.testing.assert_array_equal(moved.observers, [2])
    assert moved.size == (20, 30)


def test_crops_lie_inside_and_keep_their_share_and_shape() -> None:
    for sample in range(300):
        rng = change_generator(0, epoch=0, sample=sample)
        change = draw_change(rng, AugmentConfig(min_area=0.5), size=(90, 120))
        top, left, height, width = change.box
        assert 0 <= top <= 90 - height and 0 <= left <= 120 - width
        assert 0.49 <= height * width / (90 * 120) <= 1 and height / width == pytest.approx(0.75, abs=0.02)


def test_a_sample_is_changed_alike_wherever_it_is_read(data: Path) -> None:
    augment = AugmentConfig(flip=0.5, min_area=0.5, jitter=0.3)
    dataset = GazeDataset(whole(data / "train"), size=(32, 48), grid=(8, 12), augment=augment, seed=7)
    many = dataset.__getitems__([(3, 0, 1), (3, 1, 4), (4, 0, 1)])
    alone = dataset[(3, 1, 4)]
    assert torch.equal(many.images[1], alone.images[0]) and torch.equal(many.maps[1], alone.maps[0])
    assert not torch.equal(many.images[0], many.images[2]), "another epoch must be another draw"


def test_a_batch_holds_maps_counts_and_what_could_not_be_used(data: Path) -> None:
    dataset = GazeDataset(whole(data / "train"), size=(32, 48), grid=(12, 16))
    batch = dataset.__getitems__([(0, 0, 0), (0, 2, 3)])
    torch.testing.assert_close(batch.maps.sum((1, 2)), torch.ones(2))
    # two fixations on the blob; the one beside the image counts nowhere
    assert batch.counts.sum((1, 2)).tolist() == [2, 2] and batch.valid.all() and batch.bad == []
    peak = batch.maps[0].flatten().argmax()
    assert batch.counts[0].flatten()[peak] > 0 or batch.counts[0].sum() == 2
    bright = batch.images[0].float().mean(-1)
    blob = (bright > 200).nonzero().float().mean(0) / torch.tensor([32.0, 48.0])
    found = torch.tensor(divmod(int(peak), 16)).float() / torch.tensor([12.0, 16.0])
    assert (blob - found).abs().max() < 0.15


def test_what_cannot_be_read_is_named_with_its_set_and_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sets whose shards have the same names; a lost connection is nobody's fault and ends the program."""
    sets = GazeSets([GazeSet(ShardSet(data / name), SIGMA) for name in ("val", "train")])
    dataset = GazeDataset(sets, size=(32, 48), grid=(8, 12))
    shards = sets.sets[1].shards
    read = shards.read_stored

    def spoiled(shard: int, row: int) -> Stored:
        stored = read(shard, row)
        stored.image = stored.image[: len(stored.image) // 2] if row == 2 else stored.image
        return stored

    def lost(shard: int, row: int) -> dict[str, Any]:
        raise RemoteFault("http://host/shard-000001.tar: no answer in time")

    monkeypatch.setattr(shards, "read_stored", spoiled)
    first = sets.sets[0].shards.manifest.num_shards
    batch = dataset.__getitems__([(0, first + 1, 1), (0, first + 1, 2)])
    assert batch.valid.tolist() == [True, False] and len(batch.bad) == 1
    assert batch.bad[0].startswith(f"{data / 'train'}/{shards.manifest.files[1]}: sample {shards.key(1, 2)!r}: ")
    assert dataset.key_of((0, first + 1, 2)) == f"{data / 'train'}/{shards.key(1, 2)}"
    alone = GazeDataset(whole(data / "train"), size=(32, 48), grid=(8, 12))
    assert alone.key_of((0, 1, 2)) == shards.key(1, 2)
    monkeypatch.setattr(shards, "read_info", lost)
    with pytest.raises(RemoteFault):
        dataset[(0, first + 1, 1)]


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx on the PATH (Debian: apt-get install nginx-light)")
def test_gaze_sets_on_a_server_are_read_with_the_options_given(data: Path, tmp_path: Path) -> None:
    (tmp_path / "nginx").mkdir()
    with nginx(data, tmp_path / "nginx") as port:
        base = f"http://127.0.0.1:{port}"
        remote = RemoteOptions(cache=str(tmp_path / "cache"))
        sources, val = open_sources(DataConfig(train=Path(base) / "train", val=Path(base) / "val", remote=remote))
        batch = GazeDataset(sources, size=(32, 48), grid=(8, 12))[(0, 0, 1)]
        assert batch.valid.all() and val.read(0, 0).image == ShardSet(data / "val").read(0, 0).image
    expected = GazeDataset(whole(data / "train"), size=(32, 48), grid=(8, 12))[(0, 0, 1)]
    assert torch.equal(batch.images, expected.images) and torch.equal(batch.maps, expected.maps)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


@pytest.mark.timeout(120)
def test_reading_processes_start_after_this_one_has_used_opencv(data: Path) -> None:
    cv2.setNumThreads(2)
    large = np.zeros((1000, 1000, 3), dtype=np.uint8)
    cv2.cvtColor(cv2.resize(large, (3000, 3000)), cv2.COLOR_BGR2HSV)
    dataset = GazeDataset(whole(data / "train"), size=(32, 48), grid=(8, 12))
    for _ in range(3):
        batches = list(make_loader(dataset, [[(0, 0, 0), (0, 0, 1)], [(0, 1, 0)]], num_workers=1))
        assert [len(batch.images) for batch in batches] == [2, 1]
