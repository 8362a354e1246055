"""Object masks from COCO files and label sets, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from downstream.captioning.config import CaptionConfig
from downstream.captioning.layouts import CaptionedImage, read_captions
from downstream.captioning.objects import ObjectGrids, find_grids, open_objects
from engine.errors import InputError
from shards.labels import label_directory, seal_labels, write_label_shard
from shards.manifest import OBJECT_ENCODING
from shards.objects import OBJECTS, encode_objects
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.base import SourceConfig, make_source
from tests.downstream.captioning.files import CLASSES, SIDE, colour_of, detections, mask_of, write_flickr8k


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flickr8k(tmp_path_factory.mktemp("objects"), 12)


def images_of(root: Path) -> list[CaptionedImage]:
    parts = read_captions(CaptionConfig(), root).parts
    return sorted((image for images in parts.values() for image in images), key=lambda image: image.name)


def grids_of(root: Path, content: Any, tmp_path: Path, *, min_score: float = 0.25) -> ObjectGrids:
    file = tmp_path / "objects.json"
    file.write_text(json.dumps(content))
    images = images_of(root)
    wanted = {image.name: set(CLASSES.values()) for image in images}
    source = open_objects(CaptionConfig(objects=file, min_score=min_score))
    return find_grids(source, images, wanted, grid=(12, 12), min_score=min_score)


def test_every_form_of_mask_is_read(root: Path) -> None:
    objects = open_objects(CaptionConfig(objects=root / "detections.json"))
    assert objects.categories == set(CLASSES.values()) and objects.num_images == 12
    for number in range(12):
        (one,) = objects.find(f"{number:04d}.jpg", size=(SIDE, SIDE))
        assert (one.category, one.score) == (CLASSES[colour_of(number)], 0.9)
        assert np.array_equal(one.mask, mask_of(number)), f"form {number // 2 % 3}"
    assert objects.find("folder/0003.jpg", size=(SIDE, SIDE))[0].category == CLASSES[colour_of(3)]
    assert objects.key("other.jpg") is None and objects.find("other.jpg", size=(SIDE, SIDE)) == []


def test_a_bare_list_of_results_takes_its_names_from_another_file(root: Path, tmp_path: Path) -> None:
    content = detections([f"{i:04d}.jpg" for i in range(12)])
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content["annotations"][:5]))
    named = open_objects(CaptionConfig(objects=file, object_names=root / "detections.json"))
    assert named.key("0007.jpg") == "0007" and not named.find("0007.jpg", size=(SIDE, SIDE))
    assert named.find("0001.jpg", size=(SIDE, SIDE))[0].category == CLASSES[colour_of(1)]
    with pytest.raises(InputError, match="a bare list of results"):
        open_objects(CaptionConfig(objects=file))


def test_instances_are_merged_below_the_score_left_out(root: Path, tmp_path: Path) -> None:
    content = detections([f"{i:04d}.jpg" for i in range(12)])
    first = content["annotations"][0]
    content["annotations"] += [
        {**first, "segmentation": content["annotations"][1]["segmentation"], "score": 0.6},
        {**first, "segmentation": [[0, 0, SIDE, 0, SIDE, SIDE, 0, SIDE]], "score": 0.2},
    ]
    coverage = grids_of(root, content, tmp_path).coverage["0000.jpg"]
    both = (mask_of(0) | mask_of(1)).reshape(12, 8, 12, 8).mean(axis=(1, 3))
    assert set(coverage) == {CLASSES[colour_of(0)]}
    assert np.allclose(coverage[CLASSES[colour_of(0)]], both, atol=1e-6)
    whole = grids_of(root, content, tmp_path, min_score=0.1).coverage["0000.jpg"][CLASSES[colour_of(0)]]
    assert whole.min() == 1


def test_detections_of_other_images_are_refused(root: Path, tmp_path: Path) -> None:
    content = detections([f"other{i}.jpg" for i in range(5)])
    with pytest.raises(InputError, match=r"holds 5 images, and none of those with captions \(such as 0000.jpg\)"):
        grids_of(root, content, tmp_path)
    some = detections(["0001.jpg", "other.jpg"])
    assert grids_of(root, some, tmp_path).num_known == 1


def test_images_of_one_name_in_two_folders_have_their_own_objects_or_none(root: Path, tmp_path: Path) -> None:
    names = ["a/0000.jpg", "a/0001.jpg", "b/0000.jpg"]
    images = [CaptionedImage(name, root / "images" / "0000.jpg", ("",)) for name in names]
    wanted = {name: set(CLASSES.values()) for name in names}
    file = tmp_path / "objects.json"

    def grids(listed: list[str], images: list[CaptionedImage]) -> ObjectGrids:
        file.write_text(json.dumps(detections(listed)))
        return find_grids(open_objects(CaptionConfig(objects=file)), images, wanted, grid=(12, 12), min_score=0.25)

    own = {name: set(found) for name, found in grids(names, images).coverage.items()}
    assert own == {name: {CLASSES[colour_of(number)]} for number, name in enumerate(names)}
    assert grids(["0000.jpg", "0001.jpg"], images[:2]).num_known == 2
    with pytest.raises(InputError, match=r"a/0000.jpg and b/0000.jpg would both get the objects of '0000': name the"):
        grids(["0000.jpg", "0001.jpg"], images)
    with pytest.raises(InputError, match=r"objects.json: a/0.jpg and a/0.png are one image by name: rename one"):
        grids(["a/0.jpg", "a/0.png"], images)


def test_masks_of_another_size_are_counted(root: Path, tmp_path: Path) -> None:
    content = detections([f"{i:04d}.jpg" for i in range(12)])
    content["annotations"][0]["segmentation"] = {"size": [10, 40], "counts": [100, 300]}
    found = grids_of(root, content, tmp_path)
    assert found.num_unusable == 1 and found.num_known == 12 and "0000.jpg" not in found.coverage
    assert found.first_fault.startswith("0000.jpg: ") and "40x10" in found.first_fault


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [SIDE, SIDE], "counts": "????"},
        {"size": [SIDE, SIDE], "counts": [1, 2, 3]},
        {"size": [SIDE, SIDE], "counts": [[1], [2]]},
        {"size": [SIDE, SIDE]},
        {"size": ["a", None], "counts": "abc"},
        {"counts": [4]},
        [],
        ["x"],
    ],
)
def test_masks_that_do_not_decode_are_counted(root: Path, tmp_path: Path, segmentation: Any) -> None:
    content = detections([f"{i:04d}.jpg" for i in range(12)])
    content["annotations"][3]["segmentation"] = segmentation
    found = grids_of(root, content, tmp_path)
    assert found.num_unusable == 1 and len(found.coverage) == 11 and found.first_fault.startswith("0003.jpg: ")


def test_a_label_set_needs_its_images_and_gives_the_same(root: Path, tmp_path: Path) -> None:
    packed = tmp_path / "images"
    pack(make_source(SourceConfig(kind="image_folder", path=str(root / "images"))), packed, workers=1)
    images = ShardSet(packed)
    teacher = {"hash": "ab" * 32, "kind": "detector"}
    labels = label_directory(tmp_path / "objects", teacher["hash"])
    known = open_objects(CaptionConfig(objects=root / "detections.json"))
    for shard, count in enumerate(images.shard_sizes.tolist()):
        keys = [images.key(shard, row) for row in range(count)]
        found = {key: known.find(f"{key}.jpg", size=(SIDE, SIDE)) for key in keys}
        stored = [(key, encode_objects(objects, size=(SIDE, SIDE))) for key, objects in found.items()]
        write_label_shard(labels, images, shard, stored, member=OBJECTS)
    seal_labels(labels, images, teacher=teacher, settings={"encoding": OBJECT_ENCODING})
    source = open_objects(CaptionConfig(objects=labels, object_images=packed))
    assert source.categories == known.categories and source.key("x/0003.jpg") == "0003" and source.key("12.jpg") is None
    for number in range(12):
        (one,) = source.find(f"{number:04d}.jpg", size=(SIDE * 2, SIDE * 2))
        assert np.array_equal(one.mask, mask_of(number))
    with pytest.raises(ValueError, match="it is 96x48"):
        source.find("0000.jpg", size=(SIDE // 2, SIDE))
    with pytest.raises(InputError, match=r"together with caption.object_images"):
        open_objects(CaptionConfig(objects=labels))
