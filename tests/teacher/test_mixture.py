"""Mixtures: proportions to the image, each set in its own order, the same step on any number of ranks."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from engine.program import parse_config
from engine.runs import RunFolder
from shards.gaze import load_targets
from shards.order import SampleOrder, StepBatches
from shards.pack import pack
from shards.reader import ShardSet
from teacher.config import AugmentConfig, Config, GazeSource
from teacher.data import GazeDataset
from teacher.label_config import LabelConfig
from teacher.labeller import label
from teacher.mixture import MAX_BLOCK, SEEDS_APART, MixedOrder, exact_shares
from teacher.saved import load_teacher
from teacher.sources import GazeSet, GazeSets, open_sources
from teacher.trainer import check, train
from tests.teacher.conftest import SIGMA, BlobSource, arguments_of, training_options

SIZES = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), min_size=1, max_size=4)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[np.ndarray], list[float], int]:
    """Shard sizes and weights of one to four sets, and a seed."""
    sizes = [np.array(one) for one in draw(SIZES)]
    weights = draw(st.lists(st.sampled_from([0.1, 0.25, 1, 2, 3.5, 7]), min_size=len(sizes), max_size=len(sizes)))
    return sizes, weights, draw(st.integers(0, 2**40))


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 40))
def test_every_block_holds_each_set_exactly_by_its_weight(
    mixture: tuple[list[np.ndarray], list[float], int], first: int
) -> None:
    sizes, weights, seed = mixture
    order = MixedOrder(sizes, weights=weights, seed=seed)
    counts = np.bincount(order.sets(first * order.block, (first + 3) * order.block), minlength=len(sizes))
    np.testing.assert_array_equal(counts, 3 * np.array(order.shares))
    np.testing.assert_allclose(counts / counts.sum(), np.array(weights) / sum(weights))


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.lists(st.integers(0, 60), min_size=1, max_size=4))
def test_each_set_is_gone_through_in_its_own_order_from_any_position(
    mixture: tuple[list[np.ndarray], list[float], int], parts: list[int]
) -> None:
    sizes, weights, seed = mixture
    bounds = np.cumsum([0, *parts])
    pieces = [
        MixedOrder(sizes, weights=weights, seed=seed, window=2).slice(int(a), int(b)) for a, b in pairwise(bounds)
    ]
    found = np.concatenate(pieces)
    first = 0
    for number, own in enumerate(sizes):
        mine = found[(found[:, 1] >= first) & (found[:, 1] < first + len(own))] - [0, first, 0]
        alone = SampleOrder(own, seed=seed + number * SEEDS_APART, window=2).slice(0, len(mine))
        np.testing.assert_array_equal(mine, alone)
        first += len(own)


def test_one_set_has_the_order_it_has_alone() -> None:
    sizes = np.array([5, 0, 9, 4])
    mixed, alone = (kind([sizes] if kind is MixedOrder else sizes, **more) for kind, more in (  # type: ignore[operator]
        (MixedOrder, {"weights": [0.3], "seed": 4, "window": 2}), (SampleOrder, {"seed": 4, "window": 2}),
    ))  # fmt: skip
    np.testing.assert_array_equal(mixed.slice(11, 70), alone.slice(11, 70))


def test_resuming_on_other_numbers_of_ranks_takes_the_same_samples_in_every_step() -> None:
    sizes = [np.array([7, 6]), np.array([5, 5, 5])]

    def steps(world_size: int, start: int, stop: int) -> list[list[tuple[int, int, int]]]:
        ranks = [
            list(
                StepBatches(
                    MixedOrder(sizes, weights=[2, 1], seed=9),
                    batch_size=12, rank=rank, world_size=world_size, start_step=start, stop_step=stop,
                )
            )
            for rank in range(world_size)
        ]  # fmt: skip
        return [[sample for rank in ranks for sample in rank[step]] for step in range(stop - start)]

    whole = steps(1, 0, 9)
    assert steps(4, 0, 3) + steps(2, 3, 7) + steps(6, 7, 9) == whole
    # every step of 12 is four whole blocks of three: two and one
    assert [sum(shard < 2 for _, shard, _ in step) for step in whole] == [8] * 9


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([0.7, 0.3], [7, 3]), ([10000, 5000], [2, 1]), ([1, 1, 1], [1, 1, 1]), ([0.125, 2], [1, 16]), ([3.0], [1])],
)
def test_shares_are_the_weights_as_written(weights: list[float], shares: list[int]) -> None:
    assert exact_shares(weights) == shares


@pytest.mark.parametrize("weights", [[0, 1], [-1, 1], [float("nan"), 1], [float("inf"), 1]])
def test_weights_that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="give numbers above 0"):
        exact_shares(weights)
    with pytest.raises(InputError, match="give rounder ones"):
        exact_shares([1, 1 / MAX_BLOCK])


def sources_of(data: Path, *, sigma: float = 2.0) -> GazeSets:
    return GazeSets([GazeSet(ShardSet(data / "train"), SIGMA, 3.0), GazeSet(ShardSet(data / "mouse"), sigma)])


def test_samples_come_from_their_set_with_its_sigma_and_changes_of_their_own(data: Path) -> None:
    sources = sources_of(data)
    assert [sources.locate(shard)[1:] for shard in range(4)] == [(0, 0), (1, 10), (2, 20), (0, 24)]
    dataset = GazeDataset(sources, size=(32, 48), grid=(12, 16), augment=AugmentConfig(flip=0.0, min_area=0.5))
    mixed = dataset[(1, 3, 2)]
    alone = GazeSets([GazeSet(ShardSet(data / "mouse"), 2.0)])
    whole, changed = (
        GazeDataset(alone, size=(32, 48), grid=(12, 16), augment=augment)[(1, 0, 2)]
        for augment in (None, dataset.augment)
    )
    unchanged = GazeDataset(sources, size=(32, 48), grid=(12, 16))[(1, 3, 2)]
    assert (unchanged.images == whole.images).all() and (unchanged.maps == whole.maps).all()
    assert not (mixed.images == changed.images).all(), "samples of two sets must not share their draws"
    wider = GazeDataset(sources_of(data, sigma=8.0), size=(32, 48), grid=(12, 16))[(1, 3, 2)]
    assert wider.maps.max() < unchanged.maps.max()


def test_a_limit_takes_the_first_images_and_no_others(data: Path) -> None:
    shards = ShardSet(data / "train")
    assert shards.shard_sizes.tolist() == [10, 10, 4]
    for limit, expected in ((24, [10, 10, 4]), (13, [10, 3, 0]), (1, [1, 0, 0])):
        sources = GazeSets([GazeSet(shards, SIGMA, limit=limit)])
        assert sources.sets[0].sizes.tolist() == expected and sources.num_samples == limit
        seen = sources.order(seed=0, window=16).slice(0, limit)[:, 1:].tolist()
        assert sorted(map(tuple, seen)) == [(s, r) for s, count in enumerate(expected) for r in range(count)]
        assert len(load_targets(shards, limits=expected)) == limit
    digests = {GazeSets([GazeSet(shards, SIGMA, limit=limit)]).digest for limit in (None, 24, 13)}
    assert len(digests) == 3 and shards.digest in digests


def mixed_config(data: Path, folder: Path, **options: object) -> Config:
    """A run on three parts of `train` and one of `mouse`; `entries` of the list may be given."""
    entries = options.pop("entries", [{"shards": "train", "weight": 3}, {"shards": "mouse", "limit": 3}])
    assert isinstance(entries, list)
    sets = [{**entry, "shards": str(data / entry["shards"])} for entry in entries]
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({"data": {"train": sets, "mix_editions": True}}))
    rest = {k: v for k, v in training_options(data, folder / "runs").items() if k != "data__train"} | options
    return parse_config(Config, argv=["--config", str(path), *arguments_of(rest)])[0]


def test_a_mixture_trains_and_its_teacher_and_labels_name_every_set(data: Path, tmp_path: Path) -> None:
    lines = "\n".join(check(mixed_config(data, tmp_path)))
    assert "24 images, 48 fixations, gaze simulated, sigma 4 pixels; 75.0% of the images trained on" in lines
    assert "3 images, 6 fixations, gaze mouse" in lines
    train(mixed_config(data, tmp_path))
    run = tmp_path / "runs" / "tiny"
    about = load_teacher(run).facts["sources"]
    expected = [("train", "simulated", 3.0, 24), ("mouse", "mouse", 1.0, 3)]
    assert [(one["name"], one["edition"], one["weight"], one["num_images"]) for one in about] == expected
    assert [one["digest"] for one in about] == [ShardSet(data / name).digest for name in ("train", "mouse")]
    written = RunFolder(run).read_config()["data"]["train"]
    assert [(one["weight"], one["limit"]) for one in written] == [(3.0, None), (1.0, 3)]
    assert "edition: mouse" in (run / "report" / "index.html").read_text()
    labels = label(LabelConfig(run=run, shards=data / "images", output=tmp_path / "labels", num_workers=0))
    manifest = ShardSet(data / "images", labels=labels).label_manifest
    assert manifest is not None and manifest.extra["teacher"]["sources"] == about
    # going on with other weights would be another training
    with pytest.raises(InputError, match="was trained on other train"):
        train(mixed_config(data, tmp_path, entries=[{"shards": "train"}, {"shards": "mouse", "limit": 3}]))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "editions not said to be mixed": ({"data__mix_editions": "false"}, "of edition 'mouse'.*data.mix_editions true"),
    "empty list": ({"entries": []}, "empty list"),
    "missing set": ({"entries": [{"shards": "nowhere"}]}, "nowhere: no such folder"),
    "no gaze": ({"entries": [{"shards": "train"}, {"shards": "images"}]}, "hold no gaze"),
    "limit": ({"entries": [{"shards": "train", "limit": 25}]}, "limit 25 is more than the 24 images"),
    "small set": ({"entries": [{"shards": "train"}, {"shards": "mouse", "limit": 1}]}, "2.0 of the 4 images of a step"),
    "weights": ({"entries": [{"shards": "train", "weight": 1 / 3}, {"shards": "mouse"}]}, "give rounder ones"),
}


@pytest.mark.parametrize("case", BAD)
def test_mixtures_that_make_no_sense_are_refused(data: Path, tmp_path: Path, case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(InputError, match=message) as error:
        train(mixed_config(data, tmp_path, **options))
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{shards: a, weigth: 2}", "'weigth' is not accepted"),
        ("{shards: a, weight: 0}", "0 does not conform"),
        ("a", "data.train"),
    ],
)
def test_a_list_with_a_mistake_names_it(tmp_path: Path, entry: str, message: str) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(f"data: {{train: [{entry}]}}\n")
    with pytest.raises(InputError, match=message):
        parse_config(Config, argv=["--config", str(path)])
    typed = parse_config(Config, argv=[f"--data.train=[{entry}]"])[0]
    with pytest.raises(InputError, match="is no list of"):
        open_sources(typed.data)


def test_a_list_may_be_given_on_the_command_line(data: Path) -> None:
    config = parse_config(
        Config, argv=[f"--data.train=[{{shards: {data}/train, limit: 6}}]", f"--data.val={data}/val"]
    )[0]
    assert config.data.train == [GazeSource(data / "train", 1.0, 6)]
    assert open_sources(config.data)[0].num_samples == 6


def test_sets_packed_without_an_edition_are_of_one(tmp_path: Path, data: Path) -> None:
    source = BlobSource(5, seed=8)
    source.gaze = {"sigma": SIGMA}
    pack(source, tmp_path / "plain")
    config = parse_config(Config, argv=[f"--data.train={data}/train", f"--data.val={tmp_path}/plain"])[0]
    with pytest.raises(InputError, match="edition None"):
        open_sources(config.data)
