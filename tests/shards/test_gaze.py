"""Gaze targets from shards, and scores that agree with the metrics they are made of and with OSIE's known figures."""

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from attention import metrics
from engine.errors import InputError
from shards.gaze import (
    GazeTarget,
    centre_bias_scores,
    gaze_sigma,
    load_targets,
    resize_density,
    score_densities,
    score_each,
)
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.base import Item
from shards.sources.osie import Osie


class Source:
    """A few images with given fixations."""

    classes: tuple[str, ...] = ()

    def __init__(self, fixations: list[Any], gaze: dict[str, Any] | None) -> None:
        self.all, self.gaze = fixations, gaze

    def items(self) -> list[Item]:
        return [Item(f"{i}.png", 1) for i in range(len(self.all))]

    def read(self, item: Item) -> bytes:
        return cv2.imencode(".png", np.full((30, 42, 3), int(item.name[0]), dtype=np.uint8))[1].tobytes()

    def fixations(self, item: Item) -> Any:
        return self.all[int(item.name[0])]

    def describe(self) -> dict[str, Any]:
        return {}


GAZE = {"edition": "simulated", "sigma": 5.0}


def targets_of(*points: list[list[float]], size: tuple[int, int] = (30, 42)) -> list[GazeTarget]:
    arrays = [np.array(p, dtype=np.float64).reshape(-1, 2) for p in points]
    return [GazeTarget(str(i), size, a, np.arange(len(a)), 5.0, 0, i) for i, a in enumerate(arrays)]


def test_targets_hold_points_observers_and_sigma(tmp_path: Path) -> None:
    fixations = [[[[3, 4], [5, 6]], [], [[41, 29]]], [[[50, 2]]], []]
    pack(Source(fixations, GAZE), tmp_path / "set", shard_samples=2, shuffle=False)
    targets = load_targets(ShardSet(tmp_path / "set"))
    assert [t.key for t in targets] == ["0", "1", "2"] and [(t.shard, t.row) for t in targets] == [
        (0, 0),
        (0, 1),
        (1, 0),
    ]
    assert targets[0].size == (30, 42) and targets[0].sigma == 5.0
    np.testing.assert_array_equal(targets[0].points, [[3, 4], [5, 6], [41, 29]])
    np.testing.assert_array_equal(targets[0].observers, [0, 0, 2])
    assert [t.num_inside for t in targets] == [3, 0, 0]
    assert load_targets(ShardSet(tmp_path / "set"), sigma=2.5)[0].sigma == 2.5


@pytest.mark.parametrize(
    ("fixations", "gaze", "message"),
    [
        ([None, None], None, "hold no gaze"),
        ([[[[1, 1]]]], {"edition": "simulated", "sigma": 0}, "gaze.sigma is 0"),
        ([[[[1, 1]]]], {"edition": "simulated"}, "gaze.sigma is None"),
        ([[[[99, 99]]], []], GAZE, "not one of 2 samples has a fixation inside"),
    ],
)
def test_sets_without_usable_gaze_are_refused(tmp_path: Path, fixations: Any, gaze: Any, message: str) -> None:
    pack(Source(fixations, gaze), tmp_path / "set")
    with pytest.raises(InputError, match=message):
        load_targets(ShardSet(tmp_path / "set"))


def test_scores_are_those_of_the_metrics_on_the_grid() -> None:
    (target,) = targets_of([[3, 4], [20, 15], [41, 29]])
    grid = (8, 11)  # 30 / 4 and 42 / 4, rounded up
    density = torch.rand(1, *grid, generator=torch.Generator().manual_seed(0))
    points = torch.from_numpy((target.points + 0.5) * [11 / 42, 8 / 30])[None]
    human = torch.from_numpy(target.density(grid))[None]
    scores = score_densities([target], density)
    assert scores["nss"] == pytest.approx(metrics.nss(density, points).item(), rel=1e-5)
    assert scores["kld"] == pytest.approx(metrics.kld(density, human).item(), rel=1e-5)
    assert scores["cc"] == pytest.approx(metrics.cc(density, human).item(), rel=1e-5)
    assert scores["auc_judd"] == pytest.approx(metrics.auc_judd(density, points).item(), rel=1e-5)


def test_a_perfect_map_of_any_grid_scores_as_one() -> None:
    targets = targets_of([[10, 10], [12, 11]], [[30, 20]])
    same = score_densities(targets, [t.density(t.grid(4)) for t in targets])
    fine = score_densities(targets, [t.density((60, 84)) for t in targets])
    assert (
        same["kld"] == pytest.approx(0, abs=1e-5) and same["cc"] == pytest.approx(1) and same["sim"] == pytest.approx(1)
    )
    assert fine["cc"] > 0.99 and fine["kld"] < 0.02


def test_images_of_many_sizes_are_scored_each_as_if_alone() -> None:
    rng = np.random.default_rng(0)
    targets, densities = [], []
    for i in range(70):
        size = (30, 42) if i % 3 else (50, 20)
        targets += targets_of((rng.random((4, 2)) * [size[1], size[0]]).tolist(), size=size)
        densities.append(rng.random((7, 9) if i % 2 else (5, 5)))
    together = score_each(targets, densities)
    for i in (0, 1, 33, 69):
        alone = score_each([targets[i]], [densities[i]])
        for name, values in together.items():
            assert values[i] == pytest.approx(alone[name][0], rel=1e-5), name


def test_images_without_fixations_are_counted_and_left_out() -> None:
    targets = targets_of([[10, 10]], [], [[99, 0]])
    scores = score_densities(targets, [t.density((8, 11)) for t in targets])
    assert scores["num_images"] == 1 and scores["num_skipped"] == 2
    assert scores["nss"] == score_densities(targets[:1], [targets[0].density((8, 11))])["nss"]
    assert score_densities(targets[1:2], [np.ones((8, 11))])["num_images"] == 0


def test_centre_bias_leaves_the_image_out() -> None:
    targets = targets_of([[10, 10]], [[30, 20]])
    scores = centre_bias_scores(targets)
    other = score_densities(targets, [targets[1].density((8, 11)), targets[0].density((8, 11))])
    assert scores["nss"] == pytest.approx(other["nss"], rel=1e-4)
    with pytest.raises(ValueError, match="needs 2 images"):
        centre_bias_scores(targets[:1])


def test_one_density_per_target_is_needed() -> None:
    with pytest.raises(ValueError, match="one density per target"):
        score_each(targets_of([[1, 1]]), [])


def test_resizing_keeps_a_constant_and_the_place_of_a_peak() -> None:
    flat = resize_density(torch.ones(1, 7, 9), (20, 30))
    torch.testing.assert_close(flat, torch.ones(1, 20, 30))
    peak = torch.zeros(1, 8, 8)
    peak[0, 2, 5] = 1
    large = resize_density(peak, (32, 32))[0]
    rows, columns = torch.arange(32) + 0.5, torch.arange(32) + 0.5
    assert ((large.sum(1) * rows).sum() / large.sum()).item() == pytest.approx(2.5 * 4, abs=0.01)
    assert ((large.sum(0) * columns).sum() / large.sum()).item() == pytest.approx(5.5 * 4, abs=0.01)


def test_sigma_is_read_from_the_manifest(tmp_path: Path) -> None:
    pack(Source([[[[1, 1]]]], GAZE), tmp_path / "set")
    assert (
        gaze_sigma(ShardSet(tmp_path / "set"))
        == json.loads((tmp_path / "set" / "manifest.json").read_text())["gaze"]["sigma"]
    )


def test_osie_centre_bias_is_the_known_one(tmp_path: Path) -> None:
    root = os.environ.get("SACCADE_DATA")
    if not root or not (Path(root) / "osie").is_dir():
        pytest.skip("OSIE is not at hand: SACCADE_DATA names no folder that holds osie/")
    pack(Osie(Path(root) / "osie"), tmp_path / "osie")
    scores = centre_bias_scores(load_targets(ShardSet(tmp_path / "osie")))
    for name, value in {"nss": 0.880, "cc": 0.312, "sim": 0.373, "kld": 1.308}.items():
        assert scores[name] == pytest.approx(value, abs=0.0006), name
