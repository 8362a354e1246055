"""ImageNet-C: published numbers, the package's own pixels, the released layouts, and what is missing."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torchvision.models import AlexNet_Weights

from engine.errors import InputError
from pretrain.evaluators import reading
from pretrain.evaluators.base import Subject
from pretrain.evaluators.corruptions import (
    ALEXNET,
    ALEXNET_CLEAN,
    ALL,
    COMMON,
    SEVERITIES,
    corrupt,
    mean_corruption_error,
    relative_mean_corruption_error,
    summarise,
)
from pretrain.evaluators.features import pooled_features
from pretrain.evaluators.imagenet_c import CorruptedSets, imagenet_c, summary
from pretrain.evaluators.prepare import CentreCrop, Corrupted, ReleasedCrop, fit_square
from pretrain.evaluators.reading import read_images
from pretrain.evaluators.robust_gaze import robust_gaze
from pretrain.evaluators.sources import val_images
from pretrain.probe_config import CorruptionConfig, ProbeConfig

Open = Callable[..., tuple[Subject, ProbeConfig]]

# torchvision's ResNet-50 (76.13 clean), top-1 accuracy on ImageNet-C in percent, mean over the severities:
# bethgelab/game-of-noise, Results/clean_results.txt, whose own line says mCE 76.70.
RESNET50 = {
    "brightness": 68.02,
    "contrast": 39.06,
    "defocus_blur": 38.75,
    "elastic_transform": 45.25,
    "fog": 45.83,
    "frost": 38.14,
    "gaussian_noise": 29.29,
    "glass_blur": 26.79,
    "impulse_noise": 23.81,
    "jpeg_compression": 53.41,
    "motion_blur": 38.67,
    "pixelate": 44.79,
    "shot_noise": 27.03,
    "snow": 32.53,
    "zoom_blur": 36.24,
}


def test_alexnet_has_an_mce_of_100() -> None:
    assert mean_corruption_error(ALEXNET) == pytest.approx(100.0, abs=1e-12)
    assert relative_mean_corruption_error(ALEXNET, ALEXNET_CLEAN) == pytest.approx(100.0, abs=1e-12)
    published = AlexNet_Weights.IMAGENET1K_V1.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert 1 - published / 100 == pytest.approx(ALEXNET_CLEAN, abs=1e-9)


def test_resnet50_has_its_published_mce() -> None:
    """76.7 and 105.0, Hendrycks and Dietterich's table 1; through the summary as well."""
    errors = {name: 1 - accuracy / 100 for name, accuracy in RESNET50.items()}
    assert round(mean_corruption_error(errors), 1) == 76.7
    assert relative_mean_corruption_error(errors, 1 - 0.7613) == pytest.approx(105.0, abs=0.1)
    every = {name: dict.fromkeys(SEVERITIES, error) for name, error in errors.items()}
    metrics, state = summarise(every, clean=1 - 0.7613, alexnet=True)
    assert state == {"complete": True, "missing": {}}
    assert metrics["mce"] == pytest.approx(76.70, abs=0.005) and metrics["mean_top1"] == pytest.approx(39.17, abs=0.01)
    assert metrics["noise/top1"] == pytest.approx((29.29 + 27.03 + 23.81) / 3)
    assert metrics["glass_blur/ce"] == pytest.approx(88.61, abs=0.01)


def test_extra_corruptions_never_count_in_mce() -> None:
    every = {name: dict.fromkeys(SEVERITIES, ALEXNET.get(name, 1.0)) for name in ALL}
    metrics, _ = summarise(every, clean=ALEXNET_CLEAN, alexnet=True)
    assert metrics["mce"] == pytest.approx(100.0) and metrics["extra/top1"] == 0


def test_a_gap_leaves_no_mce() -> None:
    every = {name: dict.fromkeys(SEVERITIES, 0.5) for name in COMMON}
    del every["fog"][4]
    metrics, state = summarise(every, clean=0.1, alexnet=True)
    assert not {"mce", "relative_mce", "mean_top1", "weather/top1", "fog/top1"} & metrics.keys()
    assert metrics["partial_mean_top1"] == pytest.approx(50) and metrics["blur/top1"] == pytest.approx(50)
    assert state == {"complete": False, "missing": {"fog": [4]}}
    with pytest.raises(ValueError, match="fog"):
        mean_corruption_error({name: 0.5 for name in COMMON if name != "fog"})


def photo(seed: int = 0) -> np.ndarray:
    """A smooth random picture, uint8 `(40, 48, 3)`."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return cv2.resize(noise, (48, 40), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("name", ALL)
def test_pixels_are_the_packages_own(name: str) -> None:
    """Equal to `imagecorruptions.corrupt` after seeding NumPy, at the mildest and the strongest severity."""
    package = pytest.importorskip("imagecorruptions")
    image = photo()
    np.random.seed(3)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    for severity in (1, 5):
        found = corrupt(image, name, severity=severity, seed=7)
        assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[arg-type]
        state = np.random.get_state()
        np.random.seed(7)
        given = {"seed": 7} if name in ("impulse_noise", "glass_blur") else {}
        expected = package.corrupt(image, corruption_name=name, severity=severity, **given)
        np.random.set_state(state)
        assert np.array_equal(found, expected) and not np.array_equal(found, image)
        assert np.array_equal(found, corrupt(image, name, severity=severity, seed=7))


def test_workers_and_subsets_do_not_change_a_corruption(open_tiny: Open) -> None:
    pytest.importorskip("imagecorruptions")
    subject, probe = open_tiny(num_workers=2)
    prepare = Corrupted(CentreCrop(32, 0.875), "snow", 3, seed=0)
    source = val_images(probe)
    together, _ = read_images(source, prepare, list(range(40)), size=32)
    alone, _ = read_images(source, prepare, [17], size=32)
    assert torch.equal(together[17], alone[0]) and not torch.equal(together[17], together[18])
    in_workers, _ = pooled_features(dataclasses.replace(subject, cache=None), probe, source, prepare=prepare)
    here = dataclasses.replace(probe, num_workers=0)
    itself, _ = pooled_features(dataclasses.replace(subject, cache=None), here, source, prepare=prepare)
    assert torch.equal(in_workers, itself)


def write_released(root: Path, probe: ProbeConfig, *, names: tuple[str, ...], severities: tuple[int, ...]) -> None:
    """The validation images as ImageNet-C has them: JPEGs in class folders, 40 pixels, alike under all corruptions."""
    source = val_images(probe)
    for name in names:
        for severity in severities:
            for number in range(len(source)):
                image, label = source.read(number)
                folder = root / name / str(severity) / source.classes[label]
                folder.mkdir(parents=True, exist_ok=True)
                pixels = fit_square(image, size=40, crop=0.875)
                cv2.imwrite(str(folder / f"{number:03d}.JPEG"), pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])


def test_released_folders_with_gaps_give_a_marked_partial_result(open_tiny: Open, tmp_path: Path) -> None:
    subject, probe = open_tiny()
    write_released(tmp_path / "c", probe, names=("fog", "snow"), severities=(1, 2, 3, 4, 5))
    write_released(tmp_path / "c", probe, names=("frost",), severities=(2,))
    probe = dataclasses.replace(probe, corruptions=CorruptionConfig(folder=tmp_path / "c"))
    result = imagenet_c(subject, probe)
    assert "PARTIAL, 64 of 75" in result.note and "mce" not in result.metrics
    assert result.protocol["missing"]["frost"] == [1, 3, 4, 5] and "snow" not in result.protocol["missing"]
    assert result.metrics["fog/top1"] == pytest.approx(result.metrics["frost/2"])  # the files are alike
    assert result.metrics["fog/ce"] == pytest.approx((100 - result.metrics["fog/top1"]) / ALEXNET["fog"])


def test_an_mce_says_why_it_is_not_comparable(open_tiny: Open, tmp_path: Path) -> None:
    """All of ImageNet's classes, at its size, on its whole validation set; then with one of them changed."""
    subject, probe = open_tiny(corruptions=CorruptionConfig(folder=tmp_path))
    (tmp_path / "fog" / "1").mkdir(parents=True)
    found = {(name, severity): (0.5,) for name in COMMON for severity in SEVERITIES}

    def notes(*, classes: int = 1000, size: int = 224, limit: int = 0) -> list[str]:
        val = val_images(dataclasses.replace(probe, max_val=limit))
        val.classes = tuple(map(str, range(classes)))
        sets = CorruptedSets(subject, probe, val)
        sets.size = size
        result = summary(found, clean=0.3, protocol={}, corrupted=sets)
        assert "mce" in result.metrics
        return [result.note, result.protocol["mce"]]

    assert notes() == ["", "by AlexNet's errors on ImageNet"]
    for changed, words in (
        (notes(classes=10), "10 classes"),
        (notes(size=32), "inputs of 32 pixels"),
        (notes(limit=7), "7 of 40 validation images"),
    ):
        assert all("not comparable" in note and words in note for note in changed)


def test_released_images_that_were_replaced_are_measured_again(open_tiny: Open, tmp_path: Path) -> None:
    """In place, even by files of the same size; those that are as they were are not."""
    lines: list[str] = []
    subject, probe = open_tiny(corruptions=CorruptionConfig(folder=tmp_path / "c"))
    subject = dataclasses.replace(subject, report=lines.append)
    write_released(tmp_path / "c", probe, names=("fog", "snow"), severities=(1,))
    first = imagenet_c(subject, probe).metrics
    assert len(lines) == 2
    files = {file: file.stat() for file in (tmp_path / "c" / "fog" / "1").glob("*/*.JPEG")}
    one = min(files, key=lambda file: files[file].st_size).read_bytes()
    for file, state in files.items():  # all show the same
        file.write_bytes(one.ljust(state.st_size, b"\0"))
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    second = imagenet_c(subject, probe).metrics
    assert len(lines) == 3 and lines[2].startswith("imagenet_c: fog")
    assert second["fog/1"] != first["fog/1"] and second["snow/1"] == first["snow/1"]
    assert imagenet_c(subject, probe).metrics == second and len(lines) == 3


def test_released_jpegs_are_cropped_and_never_resized() -> None:
    image = photo()
    assert np.array_equal(ReleasedCrop(32)(image, 0), image[4:36, 8:40])


def test_cifar_c_arrays(open_tiny: Open, tmp_path: Path) -> None:
    """Five blocks of rows by severity; AlexNet's ImageNet errors do not apply."""
    subject, probe = open_tiny()
    source, folder = val_images(probe), tmp_path / "cifar-c"
    folder.mkdir()
    clean, labels = read_images(source, CentreCrop(32, 0.875), list(range(40)), size=32)
    blocks = [clean.numpy() // severity for severity in SEVERITIES]
    for name in COMMON:
        np.save(folder / f"{name}.npy", np.concatenate(blocks))
    np.save(folder / "labels.npy", np.tile(labels.numpy(), 5))
    result = imagenet_c(subject, dataclasses.replace(probe, corruptions=CorruptionConfig(folder=folder)))
    assert result.protocol["layout"] == "array" and result.protocol["complete"]
    assert "mce" not in result.metrics and "mean_top1" in result.metrics
    assert result.metrics["fog/1"] == result.metrics["clean_top1"]  # severity 1 divides by one
    assert result.tables["by_severity"]["top1"][0] == pytest.approx(result.metrics["clean_top1"])
    np.save(folder / "labels.npy", labels.numpy()[:7])
    with pytest.raises(InputError, match="do not match"):
        imagenet_c(subject, dataclasses.replace(probe, corruptions=CorruptionConfig(folder=folder)))
    rows = np.tile(labels.numpy(), 5)
    rows[3] = (rows[3] + 1) % 4
    np.save(folder / "labels.npy", rows)
    with pytest.raises(InputError, match="labels of the five severities differ"):
        imagenet_c(subject, dataclasses.replace(probe, corruptions=CorruptionConfig(folder=folder)))


def test_jobs_of_an_array_add_up_and_nothing_is_measured_twice(open_tiny: Open) -> None:
    pytest.importorskip("imagecorruptions")
    lines: list[str] = []
    subject, probe = open_tiny()
    subject = dataclasses.replace(subject, report=lines.append)

    def measure(*names: str) -> dict[str, float]:
        lines.clear()
        options = CorruptionConfig(names=list(names), severities=[1, 3])
        return imagenet_c(subject, dataclasses.replace(probe, corruptions=options)).metrics

    first = measure("contrast")
    assert len(lines) == 2 and "brightness/1" not in first
    both = measure("brightness")
    assert len(lines) == 2 and {"contrast/1", "contrast/3", "brightness/1", "brightness/3"} <= both.keys()
    assert measure("contrast", "brightness") == both and not lines
    assert subject.cache is not None
    kept = next(subject.cache.glob("errors-*/contrast-3.json"))
    kept.write_text(kept.read_text()[:9])  # as a full disk leaves it
    assert measure("contrast", "brightness") == both and len(lines) == 1
    assert json.loads(kept.read_text())["severity"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (CorruptionConfig(names=["foggy"]), "foggy"),
        (CorruptionConfig(severities=[6]), "1 to 5"),
        (CorruptionConfig(folder=Path("absent")), "absent"),
    ],
)
def test_bad_options_are_refused(open_tiny: Open, options: CorruptionConfig, words: str) -> None:
    subject, probe = open_tiny()
    with pytest.raises(InputError, match=words):
        imagenet_c(subject, dataclasses.replace(probe, corruptions=options))


@pytest.mark.parametrize(
    ("fault", "words"), [("empty", "without images"), ("unknown", "n99999999"), ("absent", "no folder for class")]
)
def test_class_folders_that_do_not_match_are_refused(open_tiny: Open, tmp_path: Path, fault: str, words: str) -> None:
    subject, probe = open_tiny()
    write_released(tmp_path / "c", probe, names=("fog",), severities=(1,))
    first = sorted((tmp_path / "c" / "fog" / "1").iterdir())[0]
    if fault == "empty":
        for file in first.iterdir():
            file.unlink()
    elif fault == "absent":
        shutil.rmtree(first)
    else:
        first.rename(first.with_name("n99999999"))
    probe = dataclasses.replace(probe, corruptions=CorruptionConfig(folder=tmp_path / "c"))
    with pytest.raises(InputError, match=words):
        imagenet_c(subject, probe)


def test_corrupted_images_are_kept_on_request_for_the_next_encoder(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("imagecorruptions")
    subject, probe = open_tiny(corruptions=CorruptionConfig(cache_images=True))
    prepare = Corrupted(CentreCrop(32, 0.875), "fog", 2, seed=0)
    expected, _ = pooled_features(subject, probe, val_images(probe), prepare=prepare)
    monkeypatch.setattr(reading, "read_images", None)  # nothing may be read again
    other = dataclasses.replace(subject, hash="another encoder's")
    found, _ = pooled_features(other, probe, val_images(probe), prepare=prepare)
    assert torch.equal(found, expected)


def test_robust_gaze_of_no_corruption_is_zero(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imagecorruptions")
    options = CorruptionConfig(names=["contrast", "fog"], severities=[5])
    subject, probe = open_tiny(corruptions=options)
    real = robust_gaze(subject, probe)
    assert real.metrics["contrast/5/kld"] > 0 and real.metrics["kld"] == pytest.approx(
        (real.metrics["contrast/kld"] + real.metrics["fog/kld"]) / 2
    )
    assert "PARTIAL" in real.note and real.tables["conditions"]["severity"] == [5.0, 5.0]
    monkeypatch.setattr("pretrain.evaluators.prepare.corrupt", lambda image, name, **_: image)
    still = robust_gaze(dataclasses.replace(subject, cache=None), probe)
    assert still.metrics["kld"] == pytest.approx(0, abs=1e-6) and still.metrics["lost"] == 0
    with pytest.raises(InputError, match="clean twin"):
        robust_gaze(subject, dataclasses.replace(probe, corruptions=CorruptionConfig(folder=Path("released"))))
