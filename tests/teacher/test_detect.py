"""Objects as labels: from a file of results and from torchvision's Mask R-CNN; array tasks, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
from torchvision.models import get_model

from engine.errors import InputError
from engine.program import parse_config
from shards.coco import from_coco_results
from shards.decode import decode_rgb
from shards.manifest import read_manifest
from shards.objects import decode_objects, read_objects
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.base import Item
from shards.verify import VerifyConfig
from shards.verify import main as verify
from teacher.detect_config import DetectConfig
from teacher.detecting import check, detect
from teacher.detector import Detector
from tests.shards.coco_files import compressed, mask_of, write_coco
from tests.teacher.conftest import SIZE, BlobSource, run_here
from tests.tools import REPOSITORY

NUM_IMAGES, NUM_SHARDS = 22, 5
DETECT = REPOSITORY / "teacher" / "detect.py"
NAMES = [f"{number:04d}.png" for number in range(NUM_IMAGES)]
NUM_OBJECTS = sum(number % 3 for number in range(NUM_IMAGES))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 images without gaze in 5 shards."""
    root = tmp_path_factory.mktemp("images")
    pack(BlobSource(NUM_IMAGES, edition=None, seed=3), root / "set", shard_samples=5)
    return root / "set"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a detector said about them, and about two images that are not in the set."""
    path = tmp_path_factory.mktemp("results") / "detections.json"
    return write_coco(path, [*NAMES, "8000.png", "8001.png"], size=SIZE)


@pytest.fixture(scope="module")
def labels(images: Path, results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished label set of these results."""
    return detect(config_of(images, tmp_path_factory.mktemp("labels"), results=results))


def config_of(images: Path, output: Path, **options: Any) -> DetectConfig:
    return DetectConfig(**{"shards": images, "output": output, "num_workers": 0} | options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def found_in(shards: ShardSet) -> dict[str, list[tuple[str, float, bytes]]]:
    """Key -> category, score and mask of each object."""
    return {
        shards.key(shard, row): [
            (one.category, one.score, one.mask.tobytes()) for one in read_objects(shards, shard, row)
        ]
        for shard, size in enumerate(shards.shard_sizes)
        for row in range(size)
    }


# from results


def test_labels_are_what_the_results_say(labels: Path, images: Path, results: Path) -> None:
    shards = ShardSet(images, labels=labels, objects=True)
    expected = from_coco_results(results)
    found = found_in(shards)
    assert found == {
        name[:-4]: [(one.category, one.score, one.mask.tobytes()) for one in expected.masks(name, size=SIZE)]
        for name in NAMES
    }
    assert sum(map(len, found.values())) == NUM_OBJECTS == 21
    manifest = read_manifest(labels)
    assert labels.name == manifest.extra["teacher"]["hash"][:16]
    assert manifest.extra["teacher"]["results"] == "detections.json"
    assert manifest.extra["settings"] == {"encoding": "coco_rle", "threshold": 0.5}


def test_verify_passes_and_knows_the_results_again(labels: Path, images: Path, results: Path, tmp_path: Path) -> None:
    verify(VerifyConfig(path=str(labels), images=str(images), teacher=str(results), workers=1))
    other = write_coco(tmp_path / "other.json", NAMES[:3], size=SIZE)
    with pytest.raises(InputError, match="1 faults"):
        verify(VerifyConfig(path=str(labels), images=str(images), teacher=str(other), workers=1))


def test_tasks_and_interruptions_end_in_the_same_bytes(
    labels: Path, images: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    for task in (2, 0):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        directory = detect(config_of(images, tmp_path, results=results))
    assert not (directory / "manifest.json").exists()
    # a task that was killed left a tar without its index
    (directory / "shard-000004.index").unlink()
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*.tar")}
    for task in (1, 2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        detect(config_of(images, tmp_path, results=results))
    assert contents(directory) == contents(labels)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "shards were written anew"
    again = detect(config_of(images, tmp_path, results=results))
    assert contents(again) == contents(labels)


def test_the_program_writes_the_shuffled_control(
    labels: Path, images: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--shards={images}", f"--output={tmp_path}", f"--results={results}", "--controls=shuffled"]
    assert run_here(DETECT, *words) == 0
    said = capsys.readouterr()
    assert "2 of them not in this set" in said.out + said.err and "sealed, 22 images in 5 shards" in said.out + said.err
    control = ShardSet(images, labels=tmp_path / f"{labels.name}-shuffled-0", objects=True)
    own, other = found_in(ShardSet(images, labels=labels, objects=True)), found_in(control)
    assert own != other and sorted(own.values()) == sorted(other.values())


def test_the_threshold_leaves_objects_out(images: Path, results: Path, tmp_path: Path) -> None:
    found = found_in(
        ShardSet(images, labels=detect(config_of(images, tmp_path, results=results, threshold=0.7)), objects=True)
    )
    scores = [score for objects in found.values() for _, score, _ in objects]
    assert len(scores) == NUM_IMAGES // 3 and min(scores) > 0.7
    with pytest.raises(InputError, match=r"labels of other threshold \(0\.7, now 0\.5\)"):
        detect(config_of(images, tmp_path, results=results))


def test_few_images_without_results_are_named_and_many_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One image that the file lacks, one of another size, one whose mask does not decode."""
    content = json.loads(write_coco(tmp_path / "r.json", NAMES[1:], size=SIZE).read_text())
    content["images"][2] |= {"height": SIZE[0] + 1}
    broken = next(one for one in content["annotations"] if one["image_id"] == content["images"][7]["id"])
    broken["segmentation"]["counts"] = "zzz"
    (tmp_path / "r.json").write_text(json.dumps(content))
    config = config_of(images, tmp_path / "labels", results=tmp_path / "r.json")
    with pytest.raises(InputError, match=r"\d of 22 images cannot be labelled.*raise --max_bad_fraction") as caught:
        detect(config)
    assert "\n" not in str(caught.value)
    config.max_bad_fraction = 0.2
    directory = detect(config)
    said = "".join(capsys.readouterr())
    assert "3 images without a label" in said and "the results have no such image" in said
    assert f"those of an image of {SIZE[1]}x{SIZE[0] + 1}, it is {SIZE[1]}x{SIZE[0]}" in said
    assert "do not decode" in said
    shards = ShardSet(images, labels=directory, objects=True)
    stored = [shards.read_label(shard, row) for shard, size in enumerate(shards.shard_sizes) for row in range(size)]
    assert stored.count(None) == 3
    verify(VerifyConfig(path=str(directory), images=str(images), workers=1))


def test_results_of_other_images_are_refused(images: Path, tmp_path: Path) -> None:
    path = write_coco(tmp_path / "r.json", ["a.jpg", "b.jpg"], size=SIZE)
    for program in (detect, check):
        with pytest.raises(InputError, match=r"none of its 2 images is in .* it names 'a.jpg', the set '00"):
            program(config_of(images, tmp_path / "labels", results=path))
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("threshold", ["0", "1", "-0.2", "1.5", "half"])
def test_thresholds_outside_0_to_1_are_refused(
    images: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], threshold: str
) -> None:
    words = [f"--shards={images}", f"--output={tmp_path / 'labels'}", f"--results={results}"]
    assert run_here(DETECT, *words, f"--threshold={threshold}") == 2
    error = capsys.readouterr().err.strip()
    assert "threshold" in error and "\n" not in error and not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": Path("w.pth")}, "results and weights"),
        ({"results": None, "annotations": Path("a.json")}, "annotations: names the images of --results"),
        ({"controls": "centre_bias"}, "objects have no mean"),
        ({"controls": "shufled"}, "unknown control"),
        ({"results": Path("nowhere.json")}, "nowhere.json: cannot be read"),
        ({"first_shard": 5}, "has shards 0 to 4"),
        ({"task": 2, "num_tasks": 2}, "give at most 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    images: Path, results: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    for program in (detect, check):
        with pytest.raises(InputError, match=message):
            program(config_of(images, tmp_path / "labels", **{"results": results} | options))
    assert not (tmp_path / "labels").exists()


def test_check_says_what_would_be_written(labels: Path, images: Path, results: Path, tmp_path: Path) -> None:
    lines = check(config_of(images, labels.parent, results=results, task=1, num_tasks=5))
    assert f"hash {labels.name}" in lines[0] and "24 objects" in lines[0]
    assert "22 in 5 shards" in lines[1] and "1 shards, 1 of them labelled already" in lines[2]


# from a detector


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A Mask R-CNN with two classes and random weights, and the options that name it."""
    folder = tmp_path_factory.mktemp("detector")
    settings = {"min_size": 32, "max_size": 64}
    torch.manual_seed(0)
    model = get_model(
        "maskrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=3, **settings,
        box_score_thresh=0.4, box_detections_per_img=3,
    ).eval()  # fmt: skip
    torch.save(model.state_dict(), folder / "weights.pth")
    (folder / "names.txt").write_text("bird\nhot dog\n")
    options = {
        "weights": folder / "weights.pth",
        "categories": folder / "names.txt",
        "threshold": 0.4,
        "max_objects": 3,
    }
    return model, options | settings


class TwoSizes(BlobSource):
    """Wide and high images, the last of which is damaged."""

    def read(self, item: Item) -> bytes:
        number = int(item.name[:4])
        data = super().read(item)
        if number == self.count - 1:
            return data[: len(data) // 2]
        if number % 2:
            return data
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR)
        return bytes(cv2.imencode(".png", cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE))[1].tobytes())


def test_labels_are_what_torchvisions_detector_finds(
    detector: tuple[torch.nn.Module, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, options = detector
    pack(TwoSizes(5, edition=None), tmp_path / "set", shard_samples=3, workers=1)
    directory = detect(config_of(tmp_path / "set", tmp_path / "labels", **options))
    assert "1 images without a label" in "".join(capsys.readouterr())
    shards = ShardSet(tmp_path / "set", labels=directory, objects=True)
    sizes, total = set(), 0
    # as the program batches them: two at a time, and never from two shards
    for shard, size in enumerate(shards.shard_sizes):
        for start in range(0, size, 2):
            rows = [row for row in range(start, min(start + 2, size)) if shards.read_label(shard, row) is not None]
            pixels = [decode_rgb(shards.read(shard, row).image) for row in rows]
            with torch.inference_mode():
                given = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in pixels]
                outputs = model(given) if given else []
            for row, image, output in zip(rows, pixels, outputs, strict=True):
                found = read_objects(shards, shard, row)
                total += len(found)
                sizes |= {one.mask.shape for one in found}
                assert all(one.mask.shape == image.shape[:2] for one in found)
                assert [one.score for one in found] == output["scores"].tolist()
                assert [one.category for one in found] == [("", "bird", "hot dog")[i] for i in output["labels"]]
                expected = (output["masks"][:, 0] > 0.5).numpy()
                np.testing.assert_array_equal(np.array([one.mask for one in found]).reshape(expected.shape), expected)
    assert total >= 6 and sizes == {SIZE, SIZE[::-1]}
    verify(
        VerifyConfig(path=str(directory), images=str(tmp_path / "set"), teacher=str(options["weights"]), decode=False)
    )


def test_weights_that_are_no_such_detector_are_refused(
    detector: tuple[torch.nn.Module, dict[str, Any]], images: Path, tmp_path: Path
) -> None:
    _, options = detector

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message) as caught:
            detect(config_of(images, tmp_path / "labels", **options | changes))
        assert "\n" not in str(caught.value)

    refused("no such file", weights=tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    refused("holds no weights", weights=tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("holds no state dict", weights=tmp_path / "list.pth")
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    refused("holds no weights of maskrcnn_resnet50_fpn", weights=tmp_path / "other.pth")
    refused("of another architecture than maskrcnn_resnet50_fpn_v2", model="maskrcnn_resnet50_fpn_v2")
    refused("COCO's are 90 names, .* has 2 classes", categories=None)
    refused("categories: .*none.txt: cannot be read", categories=tmp_path / "none.txt")
    assert not (tmp_path / "labels").exists()


def test_without_weights_and_network_the_cache_is_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    for program in (detect, check):
        with pytest.raises(InputError, match=r"is not in torch's cache and cannot be.*--weights FILE") as caught:
            program(config_of(images, tmp_path / "labels"))
        assert str(tmp_path / "cache" / "hub" / "checkpoints" / "maskrcnn_resnet50_fpn_coco") in str(caught.value)


def test_weights_in_torchs_cache_are_taken(
    detector: tuple[torch.nn.Module, dict[str, Any]], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, options = detector
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(options["weights"], folder / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    lines = check(config_of(images, tmp_path / "labels", **options | {"weights": None}))
    assert "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth" in lines[0]


class TwoFinds(torch.nn.Module):
    """Finds class 1 in the upper and class 2 in the lower half of every image."""

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = []
        for image in images:
            masks = torch.zeros(2, 1, *image.shape[1:])
            half = image.shape[1] // 2
            masks[0, 0, :half], masks[1, 0, half:], masks[1, 0, 0] = 0.9, 0.6, 0.5
            found.append({"labels": torch.tensor([1, 2]), "scores": torch.tensor([0.7, 1.0]), "masks": masks})
        return found


def test_a_class_without_a_name_of_its_own_is_left_out(tmp_path: Path) -> None:
    """COCO's list has gaps, called N/A, at numbers that no object has. A pixel belongs to a mask above one half."""
    image = torch.zeros(8, 6, 3, dtype=torch.uint8)
    for names, expected in ((("bird", "dog"), ["dog", "bird"]), (("N/A", "dog"), ["dog"])):
        config = config_of(tmp_path, tmp_path)
        detector = Detector(TwoFinds(), ("__background__", *names), "ab" * 32, torch.device("cpu"), config)
        (stored,) = detector([image])
        found = decode_objects(stored)
        assert [one.category for one in found] == expected
        np.testing.assert_array_equal(found[0].mask, np.arange(8)[:, None].repeat(6, axis=1) >= 4)


def test_masks_cover_the_image_that_is_stored(images: Path, tmp_path: Path) -> None:
    """A set packed at another size than its results were made for is refused rather than given shifted masks."""
    pack(BlobSource(4, edition=None, seed=3), tmp_path / "small", max_side=32)
    path = write_coco(tmp_path / "r.json", NAMES[:4], size=SIZE)
    with pytest.raises(InputError, match="those of an image of 64x48, it is 32x24"):
        detect(config_of(tmp_path / "small", tmp_path / "labels", results=path))
    scaled = [compressed(mask_of(1, height=24, width=32))] * 4
    annotations = [{"image_id": 100 + i, "category_id": 1, "segmentation": mask} for i, mask in enumerate(scaled)]
    path = write_coco(tmp_path / "s.json", NAMES[:4], size=(24, 32), annotations=annotations)
    shards = ShardSet(
        tmp_path / "small",
        labels=detect(config_of(tmp_path / "small", tmp_path / "labels", results=path)),
        objects=True,
    )
    assert read_objects(shards, 0, 0)[0].mask.shape == (24, 32)


def test_the_recipes_are_good_options() -> None:
    for name, results in (("objects_flickr8k", False), ("objects_coco", True)):
        recipe = REPOSITORY / "configs" / "teacher" / f"{name}.yaml"
        config, _ = parse_config(DetectConfig, argv=["--config", str(recipe)])
        assert (config.results is not None) == results and 0 < config.threshold < 1
