"""Features: each image once on any number of ranks, kept through kills, computed again where the cache is damaged."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engine.ranks import Ranks
from pretrain.evaluators import features as features_module
from pretrain.evaluators.alignment import alignment
from pretrain.evaluators.base import Subject
from pretrain.evaluators.cache import Outputs
from pretrain.evaluators.features import collect, pooled, pooled_features
from pretrain.evaluators.offline import probe_run
from pretrain.evaluators.prepare import CentreCrop
from pretrain.evaluators.reading import Job, read_images
from pretrain.evaluators.registry import pick
from pretrain.evaluators.sources import ShardImages, train_images
from pretrain.evaluators.subjects import open_subject
from pretrain.probe_config import CorruptionConfig, GazeConfig, ProbeConfig
from tests.conftest import TinySample
from tests.pretrain.evaluators.conftest import tiny_probe, write_run
from tests.tools import run_distributed

Open = Callable[..., tuple[Subject, ProbeConfig]]
NAMES = "linear_probe,knn,imagenet_c,alignment,retrieval,finetune,robust_gaze"


def evaluate_all(rank: int, world_size: int, run: Path, sample: TinySample) -> dict[str, float]:
    """Every evaluator of our own on this rank's part, in parts so small that each rank has several.

    `alignment` once more without the student's own heads: with a read-out trained here.
    """
    features_module.PART = 7
    probe = tiny_probe(run, sample, corruptions=CorruptionConfig(names=["gaussian_noise"], severities=[3]))
    subject = open_subject(probe, ranks=Ranks(), device=torch.device("cpu"))
    metrics: dict[str, float] = {}
    for evaluator in pick(NAMES):
        result = evaluator.run(subject, probe)
        metrics |= {f"{evaluator.label}/{name}": value for name, value in result.metrics.items()}
    bare = dataclasses.replace(probe, gaze_options=GazeConfig(readout_steps=3, readout_lr=0.01, rows=[]))
    trained = alignment(dataclasses.replace(subject, heads={}), bare).metrics
    assert trained["nss"] != metrics["attention/nss"]
    return metrics | {f"readout/{name}": value for name, value in trained.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_sample: TinySample) -> tuple[Path, dict[str, float]]:
    """A run whose fine-tuning has dropout, and what one process finds on it."""
    run = write_run(tmp_path_factory.mktemp("ranks") / "tiny", tiny_sample, options={"drop_rate": 0.5}).path
    part = features_module.PART
    try:
        return run, evaluate_all(0, 1, run, tiny_sample)
    finally:
        features_module.PART = part


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_evaluator_gives_the_same_on_any_number_of_ranks(
    alone: tuple[Path, dict[str, float]], tiny_sample: TinySample, world_size: int
) -> None:
    run, expected = alone
    found = run_distributed(evaluate_all, world_size, run, tiny_sample)
    names = NAMES.replace("alignment", "attention,readout").split(",")
    assert {name.split("/")[0] for name in expected} == set(names)
    for metrics in found:
        assert metrics == pytest.approx(expected, abs=1e-6)
    assert not dist.is_initialized()


def test_each_image_is_computed_once_and_a_killed_pass_goes_on(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the fourth of eight parts; the next pass computes the other five, a third computes none."""
    monkeypatch.setattr(features_module, "PART", 9)
    subject, probe = open_tiny(batch_size=4)
    source = train_images(probe)
    counted = itertools.count()

    def job(limit: int) -> Job:
        def compute(images: torch.Tensor) -> Outputs:
            if next(counted) >= limit:
                raise KeyboardInterrupt
            return pooled(subject)(images)

        return Job(source, CentreCrop(32, 0.875), compute, "pooled", "features")

    with pytest.raises(KeyboardInterrupt):
        collect(subject, probe, job(limit=10))  # three parts of 4 + 4 + 1 images, and one batch more
    counted = itertools.count()
    whole = collect(subject, probe, job(limit=10**6))
    assert next(counted) == 5 * 3
    fresh = collect(dataclasses.replace(subject, cache=None), probe, job(limit=10**6))
    counted = itertools.count()
    again = collect(subject, probe, job(limit=0))
    for name, value in fresh.items():
        assert torch.equal(whole[name], value) and torch.equal(again[name], value)
    assert whole["labels"].tolist() == [source.read(number)[1] for number in range(72)]


@pytest.mark.parametrize("damage", ["cut", "byte", "foreign"])
def test_a_damaged_cache_is_reported_and_computed_again(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(features_module, "PART", 30)
    subject, probe = open_tiny()
    lines: list[str] = []
    subject = dataclasses.replace(subject, report=lines.append)
    expected, _ = pooled_features(subject, probe, train_images(probe))
    assert subject.cache is not None and not lines
    first, second, _ = sorted(subject.cache.rglob("*.safetensors"))
    content = first.read_bytes()
    if damage == "cut":
        first.write_bytes(content[:-10])
    elif damage == "byte":
        first.write_bytes(content[:-10] + bytes([content[-10] ^ 64]) + content[-9:])
    else:
        first.write_bytes(second.read_bytes())
    found, _ = pooled_features(subject, probe, train_images(probe))
    assert torch.equal(found, expected) and len(lines) == 1 and first.name in lines[0] and "again" in lines[0]
    again, _ = pooled_features(subject, probe, train_images(probe))
    assert torch.equal(again, expected) and len(lines) == 1  # repaired


def test_other_weights_data_or_crop_never_share_a_cache(open_tiny: Open, tmp_path: Path) -> None:
    subject, probe = open_tiny()
    pooled_features(subject, probe, train_images(probe))
    other = dataclasses.replace(subject, hash="0" * 64)
    for changed in (
        (other, probe, train_images(probe)),
        (subject, probe, train_images(dataclasses.replace(probe, max_train=10))),
        (subject, dataclasses.replace(probe, crop=0.5), train_images(probe)),
        (dataclasses.replace(subject, statistics=((0.4,) * 3, (0.5,) * 3)), probe, train_images(probe)),
    ):
        before = len(list((tmp_path / "cache").iterdir()))
        pooled_features(*changed)
        assert len(list((tmp_path / "cache").iterdir())) == before + 1


def test_an_unreadable_image_is_left_out_and_counted(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, probe = open_tiny()
    lines: list[str] = []
    subject = dataclasses.replace(subject, report=lines.append)
    source = train_images(probe)
    expected, labels = pooled_features(subject, probe, source)
    read = ShardImages.read

    def broken(self: ShardImages, number: int) -> tuple[np.ndarray, int]:
        if number == 5:
            raise ValueError("damaged")
        return read(self, number)

    monkeypatch.setattr(ShardImages, "read", broken)
    found, classes = pooled_features(dataclasses.replace(subject, cache=None), probe, source)
    keep = torch.arange(72) != 5
    assert torch.allclose(found, expected[keep], atol=1e-6) and torch.equal(classes, labels[keep])
    assert any("1 of 72" in line for line in lines)


def test_workers_read_what_the_process_itself_reads(open_tiny: Open) -> None:
    subject, probe = open_tiny(num_workers=2, keep_cache=False)
    images, _ = read_images(train_images(probe), CentreCrop(32, 0.875), list(range(72)), size=32)
    found: list[Any] = []
    subject = dataclasses.replace(subject, cache=None)
    job = Job(
        train_images(probe), CentreCrop(32, 0.875), lambda x: {"mean": x.mean((1, 2, 3))}, "mean", "means of images"
    )
    mean, std = (torch.tensor(each) for each in subject.statistics)
    expected = ((images.float() / 255 - mean) / std).mean((1, 2, 3))
    found = collect(subject, probe, job)["mean"].tolist()
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_limit_takes_images_evenly(tiny_sample: TinySample) -> None:
    probe = ProbeConfig(train=tiny_sample.train, max_train=8)
    images = train_images(probe)
    assert images.numbers.tolist() == [0, 9, 18, 27, 36, 45, 54, 63]
    assert [images.place(number) for number in (0, 2, 3, 7)] == [(0, 0), (0, 18), (1, 3), (2, 15)]


def test_a_probe_writes_summary_maps_and_tables(
    probe: Callable[..., ProbeConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All in one run folder; what a number was measured on stands beside it."""
    probe_run(probe(evaluators="knn,alignment,retrieval"))
    summary = (tmp_path / "out" / "summary.json").read_text()
    for word in ('"knn/top1"', '"attention/nss"', '"k": 5', '"temperature": 0.1', '"encoder"', '"commit"', '"seed"'):
        assert word in summary
    names = {path.name for path in (tmp_path / "out" / "probe").iterdir()}
    assert {"alignment.safetensors", "alignment.json", "retrieval.json", "cache"} <= names
    assert "knn (k 5, T 0.1): top1" in capsys.readouterr().out
