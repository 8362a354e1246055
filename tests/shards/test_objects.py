"""Object labels: masks by value against pycocotools, COCO's files, label sets of objects, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO

from engine.errors import InputError
from shards.coco import CocoObjects, from_coco_results
from shards.controls import write_control
from shards.labels import encode_label, label_directory, seal_labels, write_label_shard
from shards.manifest import OBJECT_ENCODING, read_manifest
from shards.objects import (
    OBJECTS,
    ObjectMask,
    decode_objects,
    encode_objects,
    mask_of_counts,
    read_objects,
    store_objects,
)
from shards.quarantine import BadEntry, write_quarantine
from shards.reader import BadSample, ShardSet
from shards.verify import VerifyConfig
from shards.verify import main as verify
from tests.shards.coco_files import CATEGORIES, compressed, mask_of, plain, write_coco

SIZE = (24, 32)
TEACHER = "cd" * 32


def objects_of(key: str) -> list[ObjectMask]:
    """What can only be this key's: 0 to 2 objects, the highest score first."""
    seed = int(key[-3:])
    masks = [mask_of(10 * seed + number, height=SIZE[0], width=SIZE[1]) for number in range(seed % 3)]
    return [ObjectMask(f"thing {seed}", 0.9 - 0.2 * number, mask) for number, mask in enumerate(masks)]


def write_set(images: ShardSet, root: Path, *, without: tuple[str, ...] = (), spoil: str = "") -> Path:
    """A sealed set of object labels; `spoil`: key whose label is no JSON."""
    directory = label_directory(root, TEACHER)
    for shard in range(images.manifest.num_shards):
        keys = [key for key in images.keys(shard) if key not in without]
        stored = [(key, b"{}" if key == spoil else encode_objects(objects_of(key), size=SIZE)) for key in keys]
        write_label_shard(directory, images, shard, stored, member=OBJECTS)
    seal_labels(directory, images, teacher={"hash": TEACHER}, settings={"encoding": OBJECT_ENCODING})
    return directory


def assert_same(found: list[ObjectMask], expected: list[ObjectMask]) -> None:
    assert [(one.category, one.score) for one in found] == [(one.category, one.score) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.mask.dtype == bool
        np.testing.assert_array_equal(one.mask, other.mask)


# masks


def test_run_lengths_decode_as_pycocotools_decodes_them() -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        share = [0.0, 1.0, 0.02, 0.5][number % 4]
        mask = rng.random((height, width)) < share
        np.testing.assert_array_equal(mask_of_counts(compressed(mask)["counts"], size=(height, width)), mask)
    large = np.zeros((1200, 1000), dtype=bool)
    large[3:, 400:900] = True
    large[:, 5] = True
    np.testing.assert_array_equal(mask_of_counts(compressed(large)["counts"], size=large.shape), large)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-1], "do not decode|not those of a mask"),
        (lambda text: text + "0", "do not decode|not those of a mask"),
        (lambda text: "", "do not decode"),
        (lambda text: text + "é", "do not decode|not those of a mask"),
        (lambda text: "o" * 12 + "0", "no size of an image"),
        (lambda text: "nonsense!", "do not decode"),
        (lambda text: compressed(np.ones((24, 31), dtype=bool))["counts"], "not those of a mask of 32x24"),
    ],
)
def test_run_lengths_that_are_no_mask_are_refused(change: Any, message: str) -> None:
    text = compressed(mask_of(3, height=SIZE[0], width=SIZE[1]))["counts"]
    with pytest.raises(ValueError, match=message):
        mask_of_counts(change(text), size=SIZE)


def test_random_texts_are_refused_or_masks_of_the_size_asked_for() -> None:
    rng = np.random.default_rng(1)
    good = compressed(mask_of(3, height=SIZE[0], width=SIZE[1]))["counts"].encode()
    refused = 0
    for _ in range(500):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.integers(128))
        try:
            assert mask_of_counts(data.decode(), size=SIZE).shape == SIZE
        except ValueError:
            refused += 1
    assert refused > 400


def test_objects_come_back_by_value_sorted_by_score() -> None:
    masks = [mask_of(seed, height=SIZE[0], width=SIZE[1]) for seed in range(2)]
    everything, nothing = np.ones(SIZE, dtype=bool), np.zeros(SIZE, dtype=bool)
    given = [
        ObjectMask("dog", 0.25, masks[0]),
        ObjectMask("traffic light", 1.0, masks[1]),
        ObjectMask("café", 0.5, everything),
        ObjectMask("dog", 0.5, nothing),
    ]
    data = encode_objects(given, size=SIZE)
    assert_same(decode_objects(data), [given[1], given[2], given[3], given[0]])
    assert data == encode_objects(decode_objects(data), size=SIZE)
    assert decode_objects(encode_objects([], size=SIZE)) == []


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (ObjectMask("dog", 0.5, np.ones((24, 31), dtype=bool)), "mask of 31x24, the image is 32x24"),
        (ObjectMask("dog", 1.5, np.ones(SIZE, dtype=bool)), "score '1.5' of 'dog' is not in"),
        (ObjectMask("dog", float("nan"), np.ones(SIZE, dtype=bool)), "score 'nan'"),
        (ObjectMask(" ", 0.5, np.ones(SIZE, dtype=bool)), "without the name of its category"),
    ],
)
def test_objects_that_cannot_be_are_not_written(one: ObjectMask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_objects([one], size=SIZE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged JSON"),
        (b"[" * 100_000, "damaged JSON"),
        (b"[]", "damaged JSON"),
        (b'{"height": 2, "width": 2}', "damaged JSON"),
        (b'{"height": true, "width": 2, "objects": []}', "damaged JSON"),
        (b'{"height": 2, "width": 2, "objects": {}}', "damaged JSON"),
        (b'{"height": 100000, "width": 100000, "objects": []}', "100000x100000 pixels"),
        (b'{"height": 2, "width": 2, "objects": [3]}', "without category, score or mask"),
        (b'{"height": 2, "width": 2, "objects": [{"category": "a", "score": 2, "counts": "4"}]}', "score '2'"),
        (
            b'{"height": 2, "width": 2, "objects": [{"category": "a", "score": 1, "counts": "5"}]}',
            "not those of a mask",
        ),
    ],
)
def test_damaged_labels_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_objects(content)


def test_a_label_that_asks_for_endless_memory_is_refused() -> None:
    side = 11_000
    full = {"category": "a", "score": 1, "counts": compressed(np.zeros((1, 1), dtype=bool))["counts"]}
    content = {"height": side, "width": side, "objects": [full] * 40}
    with pytest.raises(ValueError, match="40 masks of 11000x11000 pixels are too many"):
        decode_objects(json.dumps(content).encode())
    with pytest.raises(ValueError, match="are too many"):
        store_objects([full] * 40, size=(side, side))


# label sets


def test_every_image_gets_its_own_objects(packed: ShardSet, tmp_path: Path) -> None:
    directory = write_set(packed, tmp_path / "labels")
    shards = ShardSet(packed.root, labels=directory, teacher_hash=TEACHER, objects=True)
    counts = []
    for shard, size in enumerate(shards.shard_sizes):
        for row in range(size):
            sample = shards.read(shard, row)
            found = read_objects(shards, shard, row)
            assert_same(found, objects_of(sample.key))
            counts.append(len(found))
            assert sample.map is None and sample.image == packed.read(shard, row).image
    assert sorted(set(counts)) == [0, 1, 2]
    assert read_manifest(directory).extra["settings"] == {"encoding": "coco_rle"}


def test_an_image_without_label_or_with_a_damaged_one_is_a_bad_sample(packed: ShardSet, tmp_path: Path) -> None:
    lost, changed = packed.keys(1)[2], packed.keys(1)[4]
    directory = write_set(packed, tmp_path, without=(lost,), spoil=changed)
    shards = ShardSet(packed.root, labels=directory, objects=True)
    with pytest.raises(BadSample, match="none were written for this image") as caught:
        read_objects(shards, 1, 2)
    assert caught.value.key == lost
    with pytest.raises(BadSample, match="objects: damaged JSON") as caught:
        read_objects(shards, 1, 4)
    assert caught.value.key == changed
    tar = directory / packed.manifest.files[0]
    data = bytearray(tar.read_bytes())
    data[512 + 30] ^= 1
    tar.write_bytes(data)
    with pytest.raises(BadSample, match="its bytes have changed"):
        read_objects(shards, 0, 0)


def test_rows_count_without_quarantined_samples(packed: ShardSet, tmp_path: Path) -> None:
    directory = write_set(packed, tmp_path)
    gone = packed.keys(0)[1]
    write_quarantine(Path(packed.root), packed.manifest, [BadEntry(0, 1, gone, "blurred")])
    shards = ShardSet(packed.root, labels=directory, objects=True)
    for row, key in enumerate(shards.keys(0)):
        assert key != gone
        assert_same(read_objects(shards, 0, row), objects_of(key))


def test_objects_where_maps_are_needed_are_refused_and_the_other_way_round(packed: ShardSet, tmp_path: Path) -> None:
    objects = write_set(packed, tmp_path / "objects")
    with pytest.raises(InputError, match="these labels are objects, but maps are needed"):
        ShardSet(packed.root, labels=objects)
    maps = label_directory(tmp_path / "maps", TEACHER)
    for shard in range(packed.manifest.num_shards):
        given = [(key, encode_label(np.ones((4, 4)))) for key in packed.keys(shard)]
        write_label_shard(maps, packed, shard, given)
    seal_labels(maps, packed, teacher={"hash": TEACHER}, settings={"size": [4, 4]})
    with pytest.raises(InputError, match="these labels are maps, but objects are needed"):
        ShardSet(packed.root, labels=maps, objects=True)


def test_verify_passes_good_objects_and_images_without_any_and_names_bad_ones(
    packed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = str(packed.root)
    passed_over = write_set(packed, tmp_path / "good", without=tuple(packed.keys(1)))
    verify(VerifyConfig(path=str(passed_over), images=images, workers=1))
    assert "labels: 23 samples in 1 sets" in capsys.readouterr().out
    assert ShardSet(packed.root, labels=passed_over, objects=True).read(1, 0).image
    key = packed.keys(2)[3]
    with pytest.raises(InputError, match="1 faults"):
        verify(VerifyConfig(path=str(write_set(packed, tmp_path / "bad", spoil=key)), images=images, workers=1))
    assert f"row 3 '{key}': damaged JSON of objects" in capsys.readouterr().out


def test_the_shuffled_control_gives_every_image_anothers_objects(packed: ShardSet, tmp_path: Path) -> None:
    directory = write_set(packed, tmp_path / "labels", without=(packed.keys(0)[0],))
    control, _ = write_control("shuffled", packed, directory, tmp_path / "labels", seed=3)
    shards = [ShardSet(packed.root, labels=where, objects=True) for where in (directory, control)]
    own, other = (
        [one.read_label(shard, row) for shard, size in enumerate(one.shard_sizes) for row in range(size)]
        for one in shards
    )
    assert own[0] is None and other[0] is None
    assert sorted(filter(None, own)) == sorted(filter(None, other)) and own != other
    with pytest.raises(InputError, match="these labels are objects, which have no mean"):
        write_control("centre_bias", packed, directory, tmp_path / "labels")


def test_repair_lets_no_sample_back_in_that_has_no_label(packed: ShardSet, tmp_path: Path) -> None:
    """A control leaves out what its labels leave out, and has no label there: nothing tells that it would be sound."""
    directory = write_set(packed, tmp_path / "labels")
    write_quarantine(directory, read_manifest(directory), [BadEntry(0, 1, packed.keys(0)[1], "x")])
    control, _ = write_control("shuffled", packed, directory, tmp_path / "labels", seed=3)
    before = (control / "quarantine.json").read_bytes()
    verify(VerifyConfig(path=str(control), images=str(packed.root), repair=True, workers=1))
    assert (control / "quarantine.json").read_bytes() == before
    assert ShardSet(packed.root, labels=control, objects=True).num_samples == 22


# COCO's files

POLYGON = [2.0, 3.0, 20.5, 3.0, 20.5, 18.0, 2.0, 18.0]


def coco_file(path: Path, segmentation: Any, **image: Any) -> Path:
    """One image with one object."""
    images = [{"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]} | image]
    annotations = [{"id": 1, "image_id": 1, "category_id": 18, "segmentation": segmentation}]
    return write_coco(path, [], size=SIZE, images=images, annotations=annotations)


@pytest.mark.parametrize("form", ["polygons", "plain", "compressed"])
def test_each_form_of_mask_is_what_pycocotools_makes_of_it(tmp_path: Path, form: str) -> None:
    mask = mask_of(5, height=SIZE[0], width=SIZE[1])
    two = [POLYGON, [22.0, 1.0, 30.0, 1.0, 26.0, 9.5]]
    path = coco_file(tmp_path / "f.json", {"polygons": two, "plain": plain(mask), "compressed": compressed(mask)}[form])
    reference = COCO(str(path))
    expected = reference.annToMask({"image_id": 1} | json.loads(path.read_text())["annotations"][0]).astype(bool)
    assert form == "polygons" or (expected == mask).all()
    assert_same(from_coco_results(path).masks("a.jpg", size=SIZE), [ObjectMask("dog", 1.0, expected)])


def test_a_bare_list_of_results_takes_names_from_a_second_file(tmp_path: Path) -> None:
    names = [f"{number:03d}.jpg" for number in range(6)]
    whole = write_coco(tmp_path / "whole.json", names, size=SIZE)
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(json.loads(whole.read_text())["annotations"]))
    with pytest.raises(InputError, match=r"neither images nor categories.*--annotations"):
        from_coco_results(bare)
    one, other = from_coco_results(whole), from_coco_results(bare, whole)
    for number, name in enumerate(names):
        assert one.stored(name, size=SIZE) == other.stored(name, size=SIZE)
        assert len(one.masks(name, size=SIZE)) == number % 3
    assert one.num_objects == other.num_objects == 6


def test_the_threshold_and_unknown_images_are_counted(tmp_path: Path) -> None:
    names = [f"{number:03d}.jpg" for number in range(6)]
    content = json.loads(write_coco(tmp_path / "f.json", names, size=SIZE).read_text())
    extra = [content["annotations"][0] | {"image_id": 7}]
    path = write_coco(tmp_path / "g.json", names, size=SIZE, annotations=content["annotations"] + extra)
    found = from_coco_results(path, threshold=0.6)
    assert (found.num_objects, found.num_below, found.num_unknown) == (6, 0, 1)
    found = from_coco_results(path, threshold=0.7)
    assert (found.num_objects, found.num_below, found.num_unknown) == (2, 4, 1)
    assert [len(found.masks(name, size=SIZE)) for name in names] == [0, 0, 1, 0, 0, 1]
    assert found.masks(names[2], size=SIZE)[0].score == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [24, 31], "counts": [24 * 31]}, "image of 31x24, it is 32x24"),
        ({"size": [24, 32], "counts": "Rf0<h5"}, "object 'dog': run lengths"),
        ({"size": [24, 32], "counts": [700, 67]}, "not those of a mask of 32x24"),
        ({"size": [24, 32], "counts": [800, -32]}, "no whole numbers"),
        ({"size": [24, 32], "counts": None}, "no whole numbers"),
        ({"counts": "4"}, "neither polygons nor run lengths with their size"),
        ([[1, 2, 3, 4]], "fewer than 3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "half a point"),
        ([[1, 2, 3, 4, 5, 1e9]], "leaves the image, at 1000000000.0"),
        ([[1, 2, 3, "x", 5, 6]], "leaves the image, at x"),
        ([], "no polygon"),
    ],
)
def test_masks_that_do_not_decode_are_named(tmp_path: Path, segmentation: Any, message: str) -> None:
    found = from_coco_results(coco_file(tmp_path / "f.json", segmentation))
    with pytest.raises(ValueError, match=message):
        found.stored("a.jpg", size=SIZE)


def test_an_image_of_another_size_than_its_objects_is_refused(tmp_path: Path) -> None:
    found = from_coco_results(coco_file(tmp_path / "f.json", [POLYGON]))
    with pytest.raises(ValueError, match="those of an image of 32x24, it is 64x48"):
        found.stored("a.jpg", size=(48, 64))
    unsaid = from_coco_results(coco_file(tmp_path / "g.json", [POLYGON], height=None, width=None))
    assert unsaid.masks("a.jpg", size=(48, 64))[0].mask.shape == (48, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "not COCO's layout"),
        ({"categories": [{"id": 18}]}, "not COCO's layout \\(no entry 'name'\\)"),
        ({"categories": CATEGORIES[:1]}, "category 18 has no name"),
        ({"annotations": {}}, "no list"),
        ({"annotations": [{"image_id": 1, "category_id": 18, "bbox": [0, 0, 3, 3]}]}, "without masks"),
        ({"annotations": [{"image_id": 1, "category_id": 18, "score": 80, "segmentation": []}]}, "score '80'"),
        ({"annotations": ["x"]}, "not COCO's layout"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}]}, "the same file name"),
    ],
)
def test_other_layouts_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = json.loads(coco_file(tmp_path / "f.json", [POLYGON]).read_text()) | change
    (tmp_path / "f.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        from_coco_results(tmp_path / "f.json")
    assert "\n" not in str(caught.value) and str(tmp_path / "f.json") in str(caught.value)


def test_files_that_are_missing_or_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        from_coco_results(tmp_path / "none.json")
    (tmp_path / "f.json").write_bytes(b"\xff{")
    with pytest.raises(InputError, match="no JSON"):
        from_coco_results(tmp_path / "f.json")


def test_images_are_found_by_key_and_else_by_a_last_part_that_is_the_only_one() -> None:
    names = ["000.jpg", "b/001.jpg", "c/002.png", "d/002.png", "x.y.jpg"]
    found = CocoObjects("f", dict.fromkeys(names))
    keys = ["train2017/000", "b/001", "a/001", "002", "d/002", "x_y", "p/003", "q/000z"]
    assert found.names_of(keys) == {
        "train2017/000": "000.jpg",
        "b/001": "b/001.jpg",
        "d/002": "d/002.png",
        "x_y": "x.y.jpg",
    }
    # two samples that end alike: neither may take the other's objects
    assert found.names_of(["p/000", "q/000"]) == {}


@pytest.mark.parametrize(
    ("place", "num_images", "num_objects"),
    [("flickr8k_1k/data/detections.json", 1000, 2775), ("coco362/instances.json", 362, 3102)],
)
def test_real_files_give_pycocotools_masks(place: str, num_images: int, num_objects: int) -> None:
    path = Path(os.environ.get("SACCADE_DATA", "")) / place
    if not path.is_file():
        pytest.skip(f"SACCADE_DATA holds no {place}")
    found = from_coco_results(path)
    assert (len(found.sizes), found.num_objects, found.num_unknown) == (num_images, num_objects, 0)
    reference = COCO(str(path))
    for image in list(reference.imgs.values())[::5]:
        masks = found.masks(image["file_name"], size=(image["height"], image["width"]))
        annotations = reference.loadAnns(reference.getAnnIds(image["id"]))
        annotations.sort(key=lambda one: -one.get("score", 1.0))
        for mask, annotation in zip(masks, annotations, strict=True):
            assert mask.category == reference.cats[annotation["category_id"]]["name"]
            np.testing.assert_array_equal(mask.mask, coco.decode(reference.annToRLE(annotation)).astype(bool))
    assert sum(len(found.masks(name, size=size)) for name, size in found.sizes.items() if size) == num_objects


def test_stored_objects_are_plain_coco_run_lengths() -> None:
    """Any tool that reads COCO reads them: pycocotools decodes what stands in the JSON."""
    mask = mask_of(4, height=SIZE[0], width=SIZE[1])
    content = json.loads(store_objects([{"category": "dog", "score": 1, **_counts(mask)}], size=SIZE))
    entry = content["objects"][0]
    decoded = coco.decode({"size": [content["height"], content["width"]], "counts": entry["counts"]})
    np.testing.assert_array_equal(decoded.astype(bool), mask)


def _counts(mask: np.ndarray) -> dict[str, str]:
    return {"counts": compressed(mask)["counts"]}
