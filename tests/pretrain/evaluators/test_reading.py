"""Reading ahead: one loader for all conditions, released sets in its processes, pieces of work that add up."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import InputError
from engine.runs import RunFolder
from pretrain.evaluators import reading
from pretrain.evaluators.base import Subject
from pretrain.evaluators.features import collect_each, pooled, pooled_features
from pretrain.evaluators.imagenet_c import imagenet_c
from pretrain.evaluators.linear_probe import fit_on
from pretrain.evaluators.offline import probe_run
from pretrain.evaluators.prepare import CentreCrop, Prepare, RandomView, ReleasedCrop
from pretrain.evaluators.reading import Job, read_images
from pretrain.evaluators.shared_work import describe_share, pieces_of, run_share
from pretrain.evaluators.sources import ArrayImages, FolderImages, ImageSource, train_images, val_images
from pretrain.probe_array_config import ProbeArrayConfig
from pretrain.probe_config import CorruptionConfig, LinearConfig, ProbeConfig
from tests.conftest import TinySample
from tests.pretrain.evaluators.conftest import tiny_probe, write_run
from tests.pretrain.evaluators.test_corruptions import write_released

Open = Callable[..., tuple[Subject, ProbeConfig]]


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of processes of each loader that is made."""
    made: list[int] = []
    make = reading.make_loader

    def counted(*arguments: Any, num_workers: int) -> Any:
        made.append(num_workers)
        return make(*arguments, num_workers=num_workers)

    monkeypatch.setattr(reading, "make_loader", counted)
    return made


def test_one_loader_reads_all_conditions(open_tiny: Open, loaders: list[int]) -> None:
    """Two at the start, for probe and clean images, and one for everything corrupted; none for what is known."""
    pytest.importorskip("imagecorruptions")
    options = CorruptionConfig(names=["fog", "contrast", "brightness"], severities=[1, 5])
    subject, probe = open_tiny(num_workers=2, batch_size=32, corruptions=options)
    first = imagenet_c(subject, probe).metrics
    assert loaders == [2, 2, 2]
    assert imagenet_c(subject, probe).metrics == first and len(loaders) == 3
    here = imagenet_c(dataclasses.replace(subject, cache=None), dataclasses.replace(probe, num_workers=0)).metrics
    assert here == first


def test_jobs_of_all_kinds_of_images_in_one_loader(open_tiny: Open, tmp_path: Path) -> None:
    """Folders and arrays are opened while others are read, and their images sent for by number; gaps in the cache."""
    subject, probe = open_tiny(num_workers=2, batch_size=16)
    val = val_images(probe)
    write_released(tmp_path / "c", probe, names=("fog",), severities=(1,))
    rows, labels = read_images(val, CentreCrop(32, 1.0), list(range(len(val))), size=32)
    np.save(tmp_path / "fog.npy", np.concatenate([rows.numpy() // severity for severity in range(1, 6)]))
    np.save(tmp_path / "labels.npy", labels.numpy())
    array = ArrayImages(tmp_path / "fog.npy", tmp_path / "labels.npy", severity=2, classes=val.classes)
    sets: list[tuple[ImageSource, Prepare]] = [
        (val, CentreCrop(32, 0.875)),
        (FolderImages(tmp_path / "c" / "fog" / "1", classes=val.classes), ReleasedCrop(32)),
        (array, CentreCrop(32, 1.0)),
        (val, RandomView(32, 0, 3)),
    ]
    pooled_features(subject, probe, val, prepare=sets[0][1])  # the first set is known
    jobs = [Job(source, prepare, pooled(subject), "pooled", "") for source, prepare in sets]
    found = list(collect_each(subject, probe, iter(jobs)))
    for (source, prepare), outputs in zip(sets, found, strict=True):
        pixels, answers = read_images(source, prepare, list(range(len(source))), size=32)
        expected = pooled(subject)(reading.to_inputs(pixels, subject))["features"]
        assert torch.equal(outputs["labels"], answers)
        assert torch.allclose(outputs["features"], expected, atol=1e-5)
    assert torch.equal(read_images(array, sets[2][1], [4], size=32)[0][0], rows[4] // 2)


def test_views_drawn_together_are_those_drawn_alone(open_tiny: Open) -> None:
    _, probe = open_tiny()
    source, view = train_images(probe), RandomView(32, 5, 2)
    together, _ = read_images(source, view, [3, 9, 40], size=32)
    for number, pixels in zip((3, 9, 40), together, strict=True):
        assert np.array_equal(view(source.read(number)[0], number), pixels.numpy())
    assert not torch.equal(together, read_images(source, RandomView(32, 5, 3), [3, 9, 40], size=32)[0])


def test_a_linear_head_is_trained_once(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept under all that decides it; a damaged file is made again."""
    subject, probe = open_tiny()
    train = train_images(probe)
    head = fit_on(subject, probe, train)
    other = fit_on(subject, dataclasses.replace(probe, linear=LinearConfig(epochs=2, rates=[0.1])), train)
    assert not torch.equal(other.weights, head.weights) and subject.cache is not None
    kept = next(path for path in subject.cache.glob("linear-*") if path.stat().st_size)
    kept.write_bytes(kept.read_bytes()[:-8])
    again = fit_on(subject, probe, train)
    assert torch.equal(again.weights, head.weights) and again.rate == head.rate
    monkeypatch.setattr("pretrain.evaluators.linear_probe.fit_head", None)  # may not be called again
    assert torch.equal(fit_on(subject, probe, train).weights, head.weights)


def test_robust_gaze_is_shared_out_by_corruption(tiny_sample: TinySample, tmp_path: Path) -> None:
    """Three tasks, one read-out: together what one probe finds, and nothing is left to do."""
    pytest.importorskip("imagecorruptions")
    runs = [write_run(tmp_path / name, tiny_sample).path for name in ("run", "twin")]
    corruptions = CorruptionConfig(names=["gaussian_noise", "shot_noise", "impulse_noise"], severities=[2, 4])
    probe = tiny_probe(runs[0], tiny_sample, evaluators="robust_gaze", corruptions=corruptions)
    config = ProbeArrayConfig(**vars(probe), runs=runs[:1])
    assert [piece.corruption for piece in pieces_of(config)] == corruptions.names
    for task in (2, 0, 1):
        run_share(dataclasses.replace(config, task=task, num_tasks=3))
    probe_run(dataclasses.replace(probe, run=runs[1]))
    shared, whole = (RunFolder(run).read_summary() for run in runs)
    assert shared["metrics"] == whole["metrics"] and "robust_gaze/noise/kld" in whole["metrics"]
    assert shared["protocols"] == whole["protocols"] and not whole["protocols"]["robust_gaze"]["complete"]
    tables = [(run / "probe" / "robust_gaze.json").read_text() for run in runs]
    assert tables[0] == tables[1]
    assert all(line.endswith(": finished") for line in describe_share(config)[1:])
    other = dataclasses.replace(config, seed=3)
    assert all(line.endswith(": to be done") for line in describe_share(other)[1:])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_corruption_that_a_released_set_lacks_is_a_gap_in_whatever_order_the_tasks_run(
    tiny_sample: TinySample, tmp_path: Path, order: tuple[int, ...]
) -> None:
    """The first and the last of three tasks find nothing in the set: together they give what one probe finds."""
    runs = [write_run(tmp_path / name, tiny_sample).path for name in ("run", "twin")]
    options = CorruptionConfig(names=["snow", "fog", "contrast"], severities=[1], folder=tmp_path / "c")
    probe = tiny_probe(runs[1], tiny_sample, evaluators="imagenet_c", corruptions=options)
    write_released(tmp_path / "c", probe, names=("fog",), severities=(1,))
    probe_run(probe)
    config = ProbeArrayConfig(**vars(probe), runs=runs[:1])
    for task in order:
        run_share(dataclasses.replace(config, task=task, num_tasks=3))
    shared, whole = (RunFolder(run).read_summary() for run in runs)
    assert shared["metrics"] == whole["metrics"] and "imagenet_c/fog/1" in whole["metrics"]
    assert shared["protocols"] == whole["protocols"] and whole["protocols"]["imagenet_c"]["missing"]["snow"]
    assert [line.rpartition(": ")[2] for line in describe_share(config)[1:]] == ["absent", "finished", "absent"]
    nothing = dataclasses.replace(config, corruptions=dataclasses.replace(options, names=["snow", "contrast"]))
    for task in order:
        with pytest.raises(InputError, match="holds none of the corruptions"):
            run_share(dataclasses.replace(nothing, task=task % 2, num_tasks=2))
