"""The two-step protocol at its door: tables, resume, what is finished, and refusals; on the generated sample."""

import json
import os
import shutil
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.branch.config import BranchConfig
from downstream.branch.data import open_data
from downstream.branch.evaluate import evaluate, read_evaluation
from downstream.branch.pipeline import check_branch, run_branch
from downstream.branch.stage import Stage, build_network, stage_weights
from downstream.branch.table import tabulate
from downstream.config import DataConfig, DownstreamConfig
from downstream.main import main
from downstream.stage import stage_folder
from engine.errors import InputError, Requeue
from engine.package_weights import PYPI, PYPI_BACKBONE, PYPI_MODULE
from engine.progress import silent
from engine.ranks import Ranks
from engine.settings import LoopConfig, OptimConfig
from shards.labels import encode_label, seal_labels, write_label_shard
from shards.manifest import OBJECT_ENCODING
from shards.objects import OBJECTS, ObjectMask, encode_objects
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder
from tests.conftest import TEACHER, TinySample
from tests.downstream.launched import finetune
from tests.tools import run_distributed


@pytest.fixture
def config(tiny_sample: TinySample, tmp_path: Path) -> DownstreamConfig:
    return DownstreamConfig(
        run="t",
        runs=tmp_path / "runs",
        task="abn",
        arm="all",
        arms=["baseline", "mining", "maps"],
        epochs=2,
        retrain_epochs=1,
        data=DataConfig(path=tiny_sample.train, batch_size=12),
        branch=BranchConfig(
            backbone="test_resnet",
            size=32,
            stored_size=36,
            labels=next(tiny_sample.labels.iterdir()),
            insertion_steps=4,
            curves=["insertion"],
            sigma=0.5,
            paper="cub",
        ),
        optim=OptimConfig(name="adamw", lr=0.01, lr_scaling="none", warmup_epochs=0),
        loop=LoopConfig(num_workers=0, tracker="none", checkpoint_every=3, log_every=2),
    )


def test_arms_and_seeds_become_a_table_and_a_page(config: DownstreamConfig) -> None:
    config = replace(config, seeds=2, arm="baseline,mining,maps,mining+maps")
    config = replace(config, branch=replace(config.branch, curves=["insertion", "insertion_zero", "deletion"]))
    main(config)
    summary = json.loads((config.runs / "t" / "summary.json").read_text())
    tops = []
    for seed in (0, 1):
        folders = {arm: stage_folder(config, arm=arm, seed=seed) for arm in ("baseline", "mining", "maps")}
        found = {arm: read_evaluation(folder.path) for arm, folder in folders.items()}
        tops.append(100 * found["mining"]["top1"].mean().item())
        logged = {arm: {k for line in folder.metrics() for k in line} for arm, folder in folders.items()}
        assert "train/masked_score" in logged["mining"] and "train/masked_score" not in logged["baseline"]
        assert "train/map" in logged["maps"] and "train/map" not in logged["mining"]
        runs = (stage_folder(config, arm="step1", seed=seed), folders["maps"])
        before, after = (stage_weights(run)["perception.classify.weight"] for run in runs)
        assert not torch.equal(before, after)
    metrics = summary["metrics"]
    assert metrics["mining/test/top1"] == pytest.approx(np.mean(tops))
    assert metrics["mining/test/top1_deviation"] == pytest.approx(np.std(tops, ddof=1))
    assert {"baseline/misclassified/insertion", "maps/test/map_cc", "mining+maps/gain"} <= set(metrics)
    page = (config.runs / "t" / "report" / "index.html").read_text()
    assert "Where the network looks" in page and "The game of insertion" in page and "33.53 / 58.68" in page
    assert summary["data"]["split"].startswith("0.3 of each class")
    assert "33.53" in (config.runs / "t" / "report" / "summary.md").read_text()


def test_stopped_anywhere_it_ends_in_the_same_bits_and_what_is_done_stays(config: DownstreamConfig) -> None:
    whole, parts = (replace(config, run=name, arm="mining+maps") for name in ("whole", "parts"))
    run_branch(whole)
    for step in (5, 2):  # in the first step, which has eight, and after it in the second
        with pytest.raises(Requeue):
            run_branch(replace(parts, loop=replace(parts.loop, stop_after=step)))
        if step == 5:
            with pytest.raises(Requeue):
                run_branch(replace(parts, loop=replace(parts.loop, stop_after=7)))
    done = stage_folder(parts, arm="step1", seed=0).path / "summary.json"
    written = done.read_bytes()
    run_branch(parts)
    assert done.read_bytes() == written
    ours, theirs = (stage_weights(stage_folder(c, arm="mining+maps", seed=0)) for c in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_under_zero_it_learns_as_under_ddp_and_tests_the_weights_it_keeps(config: DownstreamConfig) -> None:
    """Losses and weights of two ranks; what both of them tested is the network of the kept weights."""
    # no Adam: it makes whole steps of the rounding in gradients that are 0
    config = replace(config, arm="mining+maps", epochs=1, optim=replace(config.optim, name="sgd"))
    run_distributed(finetune, 2, config, [0, 2])
    ddp, zero = (stage_folder(replace(config, run=f"zero{stage}"), arm="mining+maps", seed=0) for stage in (0, 2))
    ours, theirs = ([line["train/loss"] for line in run.metrics() if "train/loss" in line] for run in (ddp, zero))
    assert len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-4)
    weights, others = stage_weights(ddp), stage_weights(zero)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4, msg=name)
    data = open_data(config.data, config.branch, report=silent)
    for run in (ddp, zero):
        network = build_network(data, config, Stage("mining+maps", 0, 1, stage_weights(run)))
        alone = evaluate(
            network, data.test, config.branch, curves=[], ranks=Ranks(), autocast=nullcontext, label="alone"
        )
        found = read_evaluation(run.path)
        assert torch.allclose(found["score"], alone["score"], atol=1e-5)
        assert torch.allclose(found["map"].float(), alone["map"].float(), atol=1e-3)


def test_another_table_shares_the_first_steps(config: DownstreamConfig, tiny_sample: TinySample) -> None:
    run_branch(replace(config, arm="baseline"))
    other = replace(config, run="other", first="t", arm="mining", branch=replace(config.branch, alpha=0.5))
    results = run_branch(other)
    assert set(results) == {("step1", 0), ("mining", 0)} and not (config.runs / "other-step1-seed0").exists()
    with pytest.raises(InputError, match=r"branch.alpha is 0.5 there"):
        run_branch(replace(other, branch=replace(other.branch, alpha=0.1)))
    others = replace(other, data=replace(other.data, path=tiny_sample.val), branch=replace(other.branch, labels=None))
    with pytest.raises(InputError, match="on other data"):
        run_branch(others)


def test_check_says_what_would_run(config: DownstreamConfig) -> None:
    text = "\n".join(check_branch(config))
    assert (
        "52 training" in text and "20 test" in text and "52 training images with a map" in text and "2x2 maps" in text
    )
    assert not config.runs.exists()


def test_the_table_pairs_seeds() -> None:
    scores = {"baseline": [30.0, 32.0, 31.0], "mining": [31.0, 33.5, 32.0], "step1": [20.0, 21.0, 22.0]}
    results = {(arm, s): {"test/top1": v} for arm, values in scores.items() for s, v in enumerate(values)}
    rows = {row.arm: row for row in tabulate(results)}
    assert rows["mining"].gain == pytest.approx(7 / 6) and rows["mining"].p_value < 0.05
    assert rows["baseline"].gain is None and rows["step1"].gain is None
    assert rows["mining"].deviations["test/top1"] == pytest.approx(np.std(scores["mining"], ddof=1))


def test_refusals(config: DownstreamConfig, tiny_sample: TinySample) -> None:
    def refused(complaint: str, **changes: object) -> None:
        with pytest.raises(InputError, match=complaint):
            run_branch(replace(config, **changes))

    refused("'mine'.*not known; take from all, baseline, mining, maps", arm="mine")
    refused("needs branch.labels", branch=replace(config.branch, labels=None))
    refused("'x'.*not known; take from insertion", branch=replace(config.branch, curves=["x"]))
    refused("have other classes", data=replace(config.data, val=tiny_sample.gaze))
    refused("no class labels", data=replace(config.data, path=tiny_sample.gaze), arm="baseline",
            branch=replace(config.branch, labels=None))  # fmt: skip
    refused("belong to another image set", data=replace(config.data, path=tiny_sample.val))
    refused("has no training image", data=replace(config.data, limit=2))
    assert not list(config.runs.glob("t-*")), "nothing was begun"


def test_one_class_is_refused(config: DownstreamConfig, tiny_sample: TinySample, tmp_path: Path) -> None:
    images = tiny_sample.root / "sample" / "images" / "train"
    first = sorted(path for path in images.iterdir() if path.is_dir())[0]
    shutil.copytree(first, tmp_path / "one" / first.name)
    pack(ImageFolder(tmp_path / "one"), tmp_path / "packed", workers=1)
    with pytest.raises(InputError, match="one class only"):
        run_branch(replace(config, arm="baseline", data=replace(config.data, path=tmp_path / "packed"),
                           branch=replace(config.branch, labels=None)))  # fmt: skip


def some_labels(images: Path, folder: Path, *, left_out: int = 0, other_size: int = 0) -> Path:
    """Labels of all images but the first `left_out` of each shard; the next `other_size` are 9x9, the rest 8x8."""
    shards = ShardSet(images)
    for shard in range(shards.manifest.num_shards):
        maps = []
        for number, key in enumerate(shards.keys(shard)[left_out:]):
            side = 9 if number < other_size else 8
            maps.append((key, encode_label(np.arange(side * side).reshape(side, side))))
        write_label_shard(folder, shards, shard, maps)
    seal_labels(folder, shards, teacher={"hash": TEACHER}, settings={"size": [8, 8]})
    return folder


def test_missing_maps_are_counted_and_too_many_refused(
    config: DownstreamConfig, tiny_sample: TinySample, tmp_path: Path
) -> None:
    labels = some_labels(tiny_sample.train, tmp_path / "few", left_out=1)
    data = open_data(config.data, replace(config.branch, labels=labels, max_bad_fraction=0.1), report=silent)
    assert int(data.train.has_map.sum() + data.test.has_map.sum()) == 72 - 3
    with pytest.raises(InputError, match=r"no usable map for \d of 52 training images.*label them"):
        open_data(config.data, replace(config.branch, labels=labels), report=silent)
    mixed = some_labels(tiny_sample.train, tmp_path / "mixed", other_size=1)
    with pytest.raises(InputError, match=r"maps of several sizes, \(8, 8\) and \(9, 9\)"):
        open_data(config.data, replace(config.branch, labels=mixed), report=silent)


def test_a_detectors_objects_are_maps_too(config: DownstreamConfig, tiny_sample: TinySample, tmp_path: Path) -> None:
    """All objects of an image merged; an image in which nothing was found has no map."""
    shards, folder = ShardSet(tiny_sample.train), tmp_path / "objects"
    for shard in range(shards.manifest.num_shards):
        left, right = np.zeros((64, 64), dtype=bool), np.zeros((64, 64), dtype=bool)
        left[:, :16], right[:32, 48:] = True, True
        objects = [[ObjectMask("a", 0.9, left), ObjectMask("b", 0.4, right)], []]
        stored = [(k, encode_objects(objects[int(i == 0)], size=(64, 64))) for i, k in enumerate(shards.keys(shard))]
        write_label_shard(folder, shards, shard, stored, member=OBJECTS)
    seal_labels(folder, shards, teacher={"hash": TEACHER}, settings={"encoding": OBJECT_ENCODING})
    data = open_data(config.data, replace(config.branch, labels=folder, max_bad_fraction=0.1), report=silent)
    assert int(data.train.has_map.sum() + data.test.has_map.sum()) == 72 - 3
    assert data.train.maps is not None
    row = int(torch.nonzero(data.train.has_map)[0])
    wanted = np.zeros((56, 56))
    wanted[:, :14], wanted[:28, 42:] = 255, 255
    assert np.array_equal(data.train.maps[row].numpy(), wanted)


def test_unreadable_images_are_left_out_and_too_many_refused(config: DownstreamConfig, tiny_sample: TinySample) -> None:
    packed = config.runs.parent / "damaged"
    shutil.copytree(tiny_sample.train, packed)
    shards = ShardSet(packed)
    damage(packed / shards.manifest.files[0], shards.keys(0)[3])
    config = replace(config, data=replace(config.data, path=packed), branch=replace(config.branch, labels=None))
    data = open_data(config.data, replace(config.branch, max_bad_fraction=0.05), report=silent)
    assert len(data.train) + len(data.test) == 71 and len(data.facts["bad"]) == 1
    assert shards.keys(0)[3] in data.facts["bad"][0]
    with pytest.raises(InputError, match="1 of 72 images cannot be read"):
        open_data(config.data, replace(config.branch, max_bad_fraction=0.0), report=silent)


def damage(tar: Path, key: str) -> None:
    """Change some bytes in the middle of a sample's image."""
    with tarfile.open(tar) as archive:
        member = next(m for m in archive if m.name.startswith(f"{key}.") and not m.name.endswith((".json", ".cls")))
    with open(tar, "r+b") as file:
        file.seek(member.offset_data + member.size // 2)
        file.write(b"\0" * 16)


@pytest.mark.skipif("SACCADE_DATA" not in os.environ, reason="SACCADE_DATA names no folder of real data")
def test_it_learns_birds(config: DownstreamConfig, tmp_path: Path) -> None:
    """Six classes of CUB-200-2010 at 64 pixels from ImageNet weights: far above one in six within some steps."""
    birds = Path(os.environ["SACCADE_DATA"]) / "cub200_2010" / "images"
    if not birds.is_dir() or find_spec(PYPI_MODULE) is None:
        pytest.skip("cub200_2010 or the package of ImageNet weights is not here")
    for folder in sorted(birds.iterdir())[:6]:
        (tmp_path / "cub" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cub" / "images" / folder.name).symlink_to(folder)
    pack(ImageFolder(tmp_path / "cub" / "images"), tmp_path / "packed", workers=1)
    branch = BranchConfig(
        backbone=PYPI_BACKBONE, weights=PYPI, size=64, stored_size=72, insertion_steps=2, curves=["insertion"]
    )
    config = replace(config, arm="mining", epochs=4, data=DataConfig(path=tmp_path / "packed", batch_size=16))
    optim = OptimConfig(name="sgd", lr=0.02, lr_scaling="none", warmup_epochs=0.5)
    results = run_branch(replace(config, branch=branch, optim=optim))
    assert results["mining", 0]["test/top1"] > 35
