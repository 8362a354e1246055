"""The generated sample: the same bytes however it is made, a true SALICON layout, gaze where it should be."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.io import loadmat

from engine.errors import InputError
from shards.generate import SCHEMA, Config, check, generate, is_complete, to_pixels
from shards.scenes import CLASS_NAMES, observe, render_scene

SMALL = {"num_train": 30, "num_val": 10, "num_gaze_train": 12, "num_gaze_val": 6, "image_size": 64, "num_observers": 5}


def _digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generated") / "sample"
    assert generate(Config(output=root, seed=3, num_workers=1, **SMALL))
    return root


def test_same_bytes_in_two_processes(sample: Path, tmp_path: Path) -> None:
    generate(Config(output=tmp_path / "again", seed=3, num_workers=2, **SMALL))
    assert _digests(tmp_path / "again") == _digests(sample)


def test_larger_sample_holds_the_smaller_and_other_seeds_differ(sample: Path, tmp_path: Path) -> None:
    generate(
        Config(output=tmp_path / "larger", seed=3, num_workers=1, **(SMALL | {"num_train": 31, "num_gaze_val": 7}))
    )
    generate(Config(output=tmp_path / "other", seed=4, num_workers=1, **SMALL))
    small, larger, other = _digests(sample), _digests(tmp_path / "larger"), _digests(tmp_path / "other")
    del small["sample.json"]
    assert small.items() <= larger.items()
    assert not set(small.values()) & set(other.values())


def test_image_folder(sample: Path) -> None:
    for split, count in (("train", 30), ("val", 10)):
        folder = sample / "images" / split
        assert sorted(path.name for path in folder.iterdir()) == sorted(CLASS_NAMES)
        per_class = [len(list((folder / name).glob("*.jpg"))) for name in CLASS_NAMES]
        assert per_class == [count // len(CLASS_NAMES)] * len(CLASS_NAMES)
    image = np.asarray(cv2.imread(str(next((sample / "images" / "val").rglob("*.jpg")))))
    assert image.shape == (64, 64, 3)


def test_parts_share_no_scene(sample: Path) -> None:
    images = [digest for name, digest in _digests(sample).items() if name.endswith(".jpg")]
    assert len(images) == len(set(images)) == 30 + 10 + 12 + 6


def test_salicon_layout(sample: Path) -> None:
    for split, count in (("train", 12), ("val", 6)):
        names = [
            {path.stem for path in (sample / "gaze" / kind / split).iterdir()}
            for kind in ("images", "fixations", "maps")
        ]
        assert names[0] == names[1] == names[2]
        assert len(names[0]) == count
    for path in (sample / "gaze" / "fixations").rglob("*.mat"):
        content = loadmat(path)
        assert content["image"].item() == path.stem
        assert content["resolution"].tolist() == [[64, 64]]
        gaze = content["gaze"]
        assert gaze.shape == (5, 1)
        assert gaze.dtype.names == ("location", "timestamp", "fixations")
        for observer in gaze[:, 0]:
            fixations = observer["fixations"]
            assert fixations.shape[1] == 2
            assert 5 <= len(fixations) <= 10
            assert fixations.dtype.kind == "u"
            assert fixations.min() >= 1
            assert fixations.max() <= 64
            assert len(observer["location"]) == len(observer["timestamp"])
            assert (np.diff(observer["timestamp"][:, 0]) > 0).all()


def test_mat_files_carry_no_time_of_writing(sample: Path) -> None:
    header = next((sample / "gaze" / "fixations").rglob("*.mat")).read_bytes()[:116]
    assert header.rstrip() == b"MATLAB 5.0 MAT-file, generated sample"


def test_maps_agree_with_fixations(sample: Path) -> None:
    scores, turned = [], []
    for path in sorted((sample / "gaze" / "maps").rglob("*.png")):
        shown = np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), dtype=float)
        assert shown.shape == (64, 64)
        assert shown.max() == 255
        mat = loadmat(sample / "gaze" / "fixations" / path.parent.name / f"{path.stem}.mat")
        points = np.concatenate([observer["fixations"] for observer in mat["gaze"][:, 0]]).astype(int) - 1
        z = (shown - shown.mean()) / shown.std()
        scores.append(z[points[:, 1], points[:, 0]].mean())
        turned.append(z[points[:, 0], points[:, 1]].mean())
    assert np.mean(scores) > 2.0
    assert np.mean(scores) > np.mean(turned) + 0.5


def test_one_based_pixels() -> None:
    points = np.array([[0.0, 63.0], [0.6, 62.4]], dtype=np.float32)
    assert to_pixels(points, size=64).tolist() == [[1, 64], [2, 63]]


def test_people_look_at_the_object_that_names_the_class() -> None:
    on_target, on_others, off_centre = [], [], []
    for number in range(60):
        rng = np.random.default_rng(number)
        scene = render_scene(rng, size=96)
        points = np.concatenate(observe(rng, scene, num_observers=12))
        assert 12 * 5 <= len(points) <= 12 * 10
        assert points.min() >= 0
        assert points.max() <= 95
        reach = [np.hypot(*(points - (item.x, item.y)).T) < item.radius for item in scene.objects]
        target = scene.objects.index(scene.target)
        on_target.append(reach[target].mean())
        on_others.append(max(share.mean() for i, share in enumerate(reach) if i != target))
        off_centre.append(np.hypot(scene.target.x - 48, scene.target.y - 48))
    assert 0.6 < np.mean(on_target) < 0.95
    assert np.mean(on_others) < 0.5 * np.mean(on_target)
    assert np.mean(off_centre) > 0.15 * 96  # else looking at the centre would be enough


def test_scene_has_one_object_of_its_class() -> None:
    for class_id in range(len(CLASS_NAMES)):
        scene = render_scene(np.random.default_rng(class_id), size=48, class_id=class_id)
        assert scene.class_id == scene.target.class_id == class_id
        assert sum(item.class_id >= 0 for item in scene.objects) == 1
        assert len(scene.objects) >= 2
        assert scene.image.shape == (48, 48, 3)
        assert scene.image.dtype == np.uint8
        assert scene.image.std() > 10


def _scenes(count: int, *, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASS_NAMES)
    images = [render_scene(rng, size=32, class_id=int(label)).image.ravel() / 255 for label in labels]
    return np.stack(images), labels


def test_pixels_alone_do_not_tell_the_class() -> None:
    train, train_labels = _scenes(800, seed=0)
    held_out, held_out_labels = _scenes(300, seed=1)
    centre = train.mean(axis=0)
    train, held_out = train - centre, held_out - centre
    onehot = np.eye(len(CLASS_NAMES))[train_labels]
    for strength in (10.0, 100.0, 1000.0):  # ridge regression in its dual form: 800 samples of 3,072 pixels
        dual = np.linalg.solve(train @ train.T + strength * np.eye(len(train)), onehot)
        accuracy = ((held_out @ train.T @ dual).argmax(axis=1) == held_out_labels).mean()
        assert accuracy < 0.25


def test_complete_sample_is_left_alone(sample: Path) -> None:
    config = Config(output=sample, seed=3, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in sample.rglob("*")}
    assert is_complete(config)
    assert not generate(config)
    assert before == {path: path.stat().st_mtime_ns for path in sample.rglob("*")}
    assert "already" in check(config)[0]


def test_refuses_what_is_not_this_sample(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seed 3, not 5"):
        generate(Config(output=sample, seed=5, **SMALL))
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="other files"):
        generate(Config(output=tmp_path, **SMALL))
    with pytest.raises(InputError, match="is a file"):
        generate(Config(output=tmp_path / "mine.txt", **SMALL))
    with pytest.raises(InputError, match="at least 32"):
        generate(Config(output=tmp_path / "tiny", **(SMALL | {"image_size": 16})))
    with pytest.raises(InputError, match="cannot write"):
        generate(Config(output=tmp_path / "mine.txt" / "below", num_workers=1, **SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("shards.generate.write_item", fail)
    with pytest.raises(OSError, match="disk full"):
        generate(Config(output=tmp_path / "sample", num_workers=1, **SMALL))
    assert list(tmp_path.iterdir()) == []


def test_settings_are_written(sample: Path) -> None:
    found = json.loads((sample / "sample.json").read_text())
    assert found == {"schema": SCHEMA, "kind": "generated", "seed": 3} | SMALL


def test_processes_start_while_opencv_has_threads(tmp_path: Path) -> None:
    """OpenCV's threads of the parent must not hang the children that are forked after them (one in three did)."""
    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 5.0)
    config = Config(output=tmp_path / "a", num_train=20, num_val=4, num_gaze_train=4, num_gaze_val=4, num_workers=2)
    generate(config)
    assert len(list((tmp_path / "a" / "images").rglob("*.jpg"))) == 24
