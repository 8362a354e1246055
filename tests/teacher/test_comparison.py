"""The comparison scores the teacher and the baselines on the same images with the same metrics."""

import numpy as np
import pytest
import torch

from attention.baselines import leave_image_out
from shards.gaze import GazeTarget, centre_bias_scores, score_densities
from teacher import comparison
from teacher.comparison import COLUMNS, compare
from teacher.report import table_lines

SIZE = (40, 60)


def make_targets(count: int, *, size: tuple[int, int] = SIZE, observers: int = 3) -> list[GazeTarget]:
    rng = np.random.default_rng(0)
    targets = []
    for row in range(count):
        spot = rng.random(2) * [size[1], size[0]]
        points = np.clip(spot + rng.normal(0, 3, (4 * observers, 2)), 0, [size[1] - 1, size[0] - 1])
        targets.append(GazeTarget(str(row), size, points, np.repeat(np.arange(observers), 4), 4.0, 0, row))
    return targets


def test_rows_agree_with_the_scores_of_validation() -> None:
    targets = make_targets(6)
    maps = [torch.rand(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    rows = compare(targets, maps, stride=4)
    assert set(rows) == {"attention", "uniform", "centre_bias", "one_human", "split_half"}
    for name, value in score_densities(targets, maps).items():
        if name in COLUMNS:
            assert rows["attention"][name] == pytest.approx(value, rel=1e-4), name
    for name in ("nss", "cc", "kld"):
        assert rows["centre_bias"][name] == pytest.approx(centre_bias_scores(targets)[name], rel=1e-4)
    assert rows["uniform"]["auc_judd"] == 0.5 and rows["one_human"]["nss"] > rows["centre_bias"]["nss"]


def test_the_centre_bias_gains_nothing_over_itself() -> None:
    targets = make_targets(5)
    maps = list(leave_image_out(torch.stack([torch.from_numpy(t.density(t.grid(4))) for t in targets])))
    rows = compare(targets, maps, stride=4)
    assert rows["attention"]["information_gain"] == pytest.approx(0, abs=1e-5)
    assert rows["attention"]["auc_shuffled"] == pytest.approx(rows["centre_bias"]["auc_shuffled"], abs=1e-6)


def test_large_sets_are_compared_on_some_of_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "MAX_IMAGES", 4)
    targets = make_targets(9)
    rows = compare(targets, [torch.rand(5, 5) for _ in targets], stride=4)
    assert {scores["num_images"] for scores in rows.values()} == {4}


def test_images_of_several_sizes_have_every_baseline() -> None:
    targets = make_targets(3) + make_targets(2, size=(50, 30))
    rows = compare(targets, [torch.rand(5, 5) for _ in targets], stride=4)
    assert set(rows) == {"attention", "uniform", "centre_bias", "one_human", "split_half"}
    assert {scores["num_images"] for scores in rows.values()} == {5}
    assert rows["uniform"]["auc_judd"] == 0.5 and rows["one_human"]["nss"] > rows["centre_bias"]["nss"]


def test_images_of_several_sizes_are_scored_by_the_same_rules() -> None:
    """On images of one size both ways of scoring agree; one observer has looked beside the image."""
    targets = make_targets(6)
    targets[2].points[targets[2].observers == 1] = -5
    maps = [torch.rand(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    whole = compare(targets, maps, stride=4)
    each = comparison._of_several_sizes(targets, maps, stride=4)
    for row, scores in each.items():
        for name in ("nss", "kld", "cc", "sim", "auc_judd"):
            assert scores[name] == pytest.approx(whole[row][name], rel=1e-4, abs=1e-6), (row, name)


def test_a_single_image_has_no_centre_bias() -> None:
    rows = compare(make_targets(1), [torch.rand(5, 5)], stride=4)
    assert set(rows) == {"attention", "uniform", "one_human", "split_half"}


def test_one_observer_leaves_the_human_rows_empty_in_the_table() -> None:
    targets = make_targets(4, observers=1)
    rows = compare(targets, [torch.rand(5, 5) for _ in targets], stride=4)
    lines = table_lines(rows)
    assert "nss" not in rows["one_human"] and len({len(line) for line in lines}) == 1
    assert next(line for line in lines if line.startswith("one human")).split()[2:] == ["-"] * len(COLUMNS)
