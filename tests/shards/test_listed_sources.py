"""Flickr8k, COCO, CUB-200 and Stanford Dogs in their published layouts, their split files, and the splits by rule."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from engine.errors import InputError
from engine.program import parse_config
from shards.pack import PackConfig, pack
from shards.reader import ShardSet
from shards.sources.base import Item, Source, SourceConfig, make_source
from shards.sources.splits import HALVES_RULE, TENTHS_RULE, in_halves, in_tenths
from tests.tools import REPOSITORY

BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
DOGS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")

Writer = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, jpeg: Callable[..., bytes]) -> Writer:
    """Write images of these names below the test's folder."""

    def make(*names: str) -> None:
        for number, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(seed=number, height=8, width=9))

    return make


def source_of(kind: str, path: Path, split: str = "all", split_file: str = "") -> Source:
    return make_source(SourceConfig(kind=kind, path=str(path), split=split, split_file=split_file))  # type: ignore[arg-type]


def names_of(source: Source) -> list[str]:
    return [item.name for item in source.items()]


def labels_of(source: Source) -> dict[str, str]:
    return {item.name: source.classes[item.label] for item in source.items()}


# splits by rule


def test_the_rule_in_tenths_orders_by_the_hash_of_the_file_name() -> None:
    names = [f"{number}.jpg" for number in range(1000)]
    parts = {split: in_tenths(names[::-1], split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 800, "val": 100, "test": 100}
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    digests = {split: [hashlib.sha256(name.encode()).digest() for name in part] for split, part in parts.items()}
    assert max(digests["train"]) < min(digests["val"]) and max(digests["val"]) < min(digests["test"])
    # the rule is part of every number that is reported on it: it may never change
    assert parts["test"][:3] == ["110.jpg", "13.jpg", "132.jpg"]


def test_the_rule_in_halves_takes_half_of_each_class() -> None:
    names = [f"{name}/{number}.jpg" for name, count in (("a", 7), ("b", 10), ("c", 1)) for number in range(count)]
    train, test = in_halves(names, "train"), in_halves(names[::-1], "test")
    assert sorted(train + test) == sorted(names)
    assert Counter(name[0] for name in train) == {"a": 4, "b": 5, "c": 1}
    assert Counter(name[0] for name in test) == {"a": 3, "b": 5}
    # by the file's name alone: the class folder may be called otherwise
    assert [name[1:] for name in in_halves([f"z{name[1:]}" for name in names[:7]], "train")] == [
        name[1:] for name in train if name[0] == "a"
    ]


# Flickr8k


@pytest.mark.parametrize("folder", ["Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", "Images"])
@pytest.mark.parametrize("lists", [".", "Flickr8k_text"])
def test_flickr8k_is_split_by_its_lists(tmp_path: Path, write: Writer, folder: str, lists: str) -> None:
    write(*(f"{folder}/{number}_ab.jpg" for number in range(6)))
    (tmp_path / lists).mkdir(exist_ok=True)
    for name, numbers in (("train", (3, 0, 5)), ("dev", (1,)), ("test", (2, 4))):
        text = "".join(f"{number}_ab.jpg\n" for number in numbers)
        (tmp_path / lists / f"Flickr_8k.{name}Images.txt").write_text(text)
    expected = {"train": [0, 3, 5], "val": [1], "test": [2, 4], "all": list(range(6))}
    for split, numbers in expected.items():
        source = source_of("flickr8k", tmp_path, split)
        assert [item.key for item in source.items()] == [f"{number}_ab" for number in numbers]
        about = source.describe()
        assert about["split"] == split and about["split_rule"] == ("none" if split == "all" else "official")
        assert source.read(source.items()[0]) == (tmp_path / folder / names_of(source)[0]).read_bytes()


def test_flickr8k_without_lists_is_split_by_rule(tmp_path: Path, write: Writer) -> None:
    names = [f"{number}.jpg" for number in range(20)]
    write(*(f"images/{name}" for name in names))
    for split, count in (("train", 16), ("val", 2), ("test", 2)):
        source = source_of("flickr8k", tmp_path, split)
        assert names_of(source) == in_tenths(names, split) and len(names_of(source)) == count
        assert source.describe()["split_rule"] == TENTHS_RULE and source.classes == ()


def test_karpathys_split_file_splits_both_sets(tmp_path: Path, write: Writer) -> None:
    write("f/Images/1.jpg", "f/Images/2.jpg", "c/val2014/COCO_val2014_1.jpg", "c/train2014/COCO_train2014_2.jpg")
    flickr = [{"filename": "1.jpg", "split": "train"}, {"filename": "2.jpg", "split": "test"}]
    coco = [
        {"filename": "COCO_val2014_1.jpg", "filepath": "val2014", "split": "restval"},
        {"filename": "COCO_train2014_2.jpg", "filepath": "train2014", "split": "train"},
        {"filename": "COCO_val2014_3.jpg", "filepath": "val2014", "split": "val"},
    ]
    for name, images in (("flickr8k", flickr), ("coco", coco)):
        (tmp_path / f"dataset_{name}.json").write_text(json.dumps({"images": images}))
    assert names_of(source_of("flickr8k", tmp_path / "f", "test", str(tmp_path / "dataset_flickr8k.json"))) == ["2.jpg"]
    source = source_of("coco", tmp_path / "c", "train", str(tmp_path / "dataset_coco.json"))
    assert [item.key for item in source.items()] == ["COCO_train2014_2", "COCO_val2014_1"]
    assert source.read(source.items()[1]) == (tmp_path / "c/val2014/COCO_val2014_1.jpg").read_bytes()
    assert source.describe()["split_rule"] == "Karpathy: dataset_coco.json"


# COCO


@pytest.mark.parametrize("base", [".", "images"])
def test_coco_is_split_by_its_folders(tmp_path: Path, write: Writer, base: str) -> None:
    write(
        f"{base}/train2017/000000000009.jpg", f"{base}/val2017/000000000139.jpg", f"{base}/val2014/COCO_val2014_1.jpg"
    )
    train = source_of("coco", tmp_path, "train")
    assert [item.key for item in train.items()] == ["000000000009"]
    with pytest.raises(InputError, match="of split 'val' there must be one folder, found: val2017, val2014"):
        source_of("coco", tmp_path, "val")
    with pytest.raises(InputError, match="found: none"):
        source_of("coco", tmp_path, "test")
    with pytest.raises(InputError, match=r"give one of them with --source\.split"):
        source_of("coco", tmp_path)
    assert [item.key for item in source_of("coco", tmp_path / base / "val2014").items()] == ["COCO_val2014_1"]


# CUB-200


def write_cub_2011(root: Path, write: Writer) -> dict[str, str]:
    """Six images in three classes, the ids in another order than the names; returns id -> name."""
    names = [f"{bird}/{bird[4:]}_{number:04d}_{number}.jpg" for bird in BIRDS for number in (1, 2)]
    write(*(f"CUB_200_2011/images/{name}" for name in names))
    files = {str(number): name for number, name in enumerate(names[::-1], start=1)}
    folder = root / "CUB_200_2011"

    def put(name: str, rows: dict[str, object]) -> None:
        (folder / name).write_text("".join(f"{key} {value}\n" for key, value in rows.items()))

    put("images.txt", dict(files))
    put("classes.txt", {str(number): bird for number, bird in enumerate(BIRDS, start=1)})
    put("image_class_labels.txt", {number: int(name[:3]) for number, name in files.items()})
    put("train_test_split.txt", {number: int(number) % 2 for number in files})
    return files


def test_cub_2011_is_split_and_labelled_by_its_files(tmp_path: Path, write: Writer) -> None:
    files = write_cub_2011(tmp_path, write)
    found = {split: source_of("cub", tmp_path, split) for split in ("train", "test", "all")}
    assert names_of(found["train"]) == [files[number] for number in "135"]
    assert names_of(found["test"]) == [files[number] for number in "246"]
    assert labels_of(found["all"]) == {name: name.split("/")[0] for name in files.values()}
    assert found["train"].classes == BIRDS and found["train"].describe()["split_rule"] == "official"
    with pytest.raises(InputError, match="has no split 'val'"):
        source_of("cub", tmp_path, "val")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train_test_split.txt", "99 1\n", "an unknown image 99 "),
        ("image_class_labels.txt", "99 1\n", "an unknown image 99 "),
        ("images.txt", "99 001.Black_footed_Albatross/x.jpg\n", "no line for image 99 "),
        ("train_test_split.txt", "1 0\n", "'1' comes twice"),
        ("train_test_split.txt", "7\n", "'7' has no value"),
        ("classes.txt", None, "cannot be read"),
        ("classes.txt", b"\xff\xfe", "no UTF-8 text"),
    ],
)
def test_cub_2011_with_files_that_do_not_fit_is_refused(
    tmp_path: Path, write: Writer, file: str, change: str | bytes | None, message: str
) -> None:
    write_cub_2011(tmp_path, write)
    path = tmp_path / "CUB_200_2011" / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + (change if isinstance(change, bytes) else change.encode()))
    with pytest.raises(InputError, match=message) as caught:
        source_of("cub", tmp_path, "train")
    assert "\n" not in str(caught.value)


def write_cub_2010(root: Path, write: Writer, *, train: list[str], test: list[str]) -> None:
    (root / "lists").mkdir()
    for name, listed in (("train", train), ("test", test)):
        (root / "lists" / f"{name}.txt").write_text("".join(f"{one}\n" for one in listed))
    write(*(f"images/{name}" for name in train + test))


def test_cub_2010_is_split_by_its_lists(tmp_path: Path, write: Writer) -> None:
    train = [f"{BIRDS[0]}/a_1.jpg", f"{BIRDS[1]}/b_1.jpg"]
    test = [f"{BIRDS[0]}/a_2.jpg", f"{BIRDS[2]}/c_1.jpg"]
    write_cub_2010(tmp_path, write, train=train, test=test)
    assert names_of(source_of("cub", tmp_path, "train")) == train
    found = source_of("cub", tmp_path, "test")
    # a class that only one list has still keeps its number in both
    assert labels_of(found) == {test[0]: BIRDS[0], test[1]: BIRDS[2]} and found.classes == BIRDS
    assert names_of(source_of("cub", tmp_path)) == sorted(train + test)


def test_class_folders_without_lists_are_split_in_halves(tmp_path: Path, write: Writer) -> None:
    names = [f"{bird}/{number}.jpg" for bird in BIRDS for number in range(4)]
    write(*(f"images/{name}" for name in names))
    train, test = (source_of("cub", tmp_path, split) for split in ("train", "test"))
    assert names_of(train) == in_halves(names, "train") and names_of(test) == in_halves(names, "test")
    assert Counter(item.label for item in train.items()) == {0: 2, 1: 2, 2: 2}
    assert train.describe() == {"kind": "cub", "split": "train", "split_rule": HALVES_RULE, "num_images": 6}


# Stanford Dogs


def write_dogs(root: Path, write: Writer, *, where: str = ".", shift: int = 0) -> dict[str, list[str]]:
    """`file_list`, `annotation_list` and `labels` as the release has them: columns of a cell array, counted from 1."""
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for number, dog in enumerate(DOGS):
        for index in range(3):
            lists["test" if index == number else "train"].append(f"{dog}/{dog[:9]}_{index}.jpg")
    (root / where).mkdir(exist_ok=True)
    for part, names in lists.items():
        cells = np.array([[name] for name in names], dtype=object)
        labels = np.array([[DOGS.index(name.split("/")[0]) + 1 + shift] for name in names], dtype=np.float64)
        content = {"file_list": cells, "annotation_list": cells, "labels": labels}
        savemat(root / where / f"{part}_list.mat", content)
    write(*(f"Images/{name}" for name in lists["train"] + lists["test"]))
    return lists


@pytest.mark.parametrize("where", [".", "lists"])
def test_stanford_dogs_are_split_by_their_lists(tmp_path: Path, write: Writer, where: str) -> None:
    lists = write_dogs(tmp_path, write, where=where)
    for split, names in lists.items():
        source = source_of("stanford_dogs", tmp_path, split)
        assert names_of(source) == sorted(names)
        assert labels_of(source) == {name: name.split("/")[0] for name in names} and source.classes == DOGS


def test_stanford_dogs_with_other_lists_are_refused(tmp_path: Path, write: Writer) -> None:
    write_dogs(tmp_path, write, shift=1)
    with pytest.raises(InputError, match="has class 2 in the lists, its folder is number 1"):
        source_of("stanford_dogs", tmp_path, "train")
    savemat(tmp_path / "train_list.mat", {"files": np.zeros(3)})
    with pytest.raises(InputError, match="not the layout of Stanford Dogs"):
        source_of("stanford_dogs", tmp_path, "train")
    with pytest.raises(InputError, match="has no split 'val'"):
        source_of("stanford_dogs", tmp_path, "val")


# what lists may say


def test_a_listed_image_that_is_missing_is_left_out_and_counted(tmp_path: Path, write: Writer) -> None:
    names = [f"{BIRDS[0]}/{number}.jpg" for number in range(5)]
    write_cub_2010(tmp_path, write, train=names, test=[f"{BIRDS[1]}/x.jpg"])
    (tmp_path / "images" / names[2]).unlink()
    source = source_of("cub", tmp_path, "train")
    with pytest.raises(InputError, match=r"1 of 5 images cannot be used.*2\.jpg' \(No such file"):
        pack(source, tmp_path / "strict", workers=1)
    manifest = pack(source, tmp_path / "set", workers=1, max_bad_fraction=0.2)
    assert manifest.extra["source"]["skipped"] == [[names[2], "No such file or directory"]]
    shards = ShardSet(tmp_path / "set")
    assert sorted(shards.keys(0)) == sorted(name[:-4] for name in names if name != names[2])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (["../secret/x.jpg"], "outside it"),
        (["/etc/x.jpg"], "outside it"),
        (["a/x.jpg", "a/x.jpg"], "stands twice"),
        (["b/x.jpg"], "stands in the lists of train and test"),
        ([], "no images of split 'train'"),
    ],
)
def test_lists_that_cannot_be_are_refused(tmp_path: Path, write: Writer, train: list[str], message: str) -> None:
    write_cub_2010(tmp_path, write, train=[], test=["b/x.jpg"])
    (tmp_path / "lists" / "train.txt").write_text("\n".join(train))
    with pytest.raises(InputError, match=message):
        source_of("cub", tmp_path, "train")


@pytest.mark.parametrize("text", ["{", "[]", '{"images": [{"filename": "1.jpg"}]}', '{"images": [3]}'])
def test_a_split_file_of_another_layout_is_refused(tmp_path: Path, write: Writer, text: str) -> None:
    write("Images/1.jpg")
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(InputError, match="not Karpathy's layout"):
        source_of("flickr8k", tmp_path, "train", str(tmp_path / "split.json"))
    with pytest.raises(InputError, match="cannot be read"):
        source_of("flickr8k", tmp_path, "train", str(tmp_path / "none.json"))


def test_options_of_other_sources_are_refused(tmp_path: Path, write: Writer) -> None:
    write("images/a/1.jpg")
    with pytest.raises(InputError, match=r"source\.split_file: cub has no such option"):
        source_of("cub", tmp_path, "train", "x.json")
    with pytest.raises(InputError, match="its images lie in folders, those of flickr8k in one"):
        source_of("flickr8k", tmp_path, "train")
    write("loose/1.jpg")
    with pytest.raises(InputError, match="images without class folders"):
        source_of("cub", tmp_path / "loose", "train")


def test_items_of_missing_files_have_no_size(tmp_path: Path, write: Writer) -> None:
    write_cub_2010(tmp_path, write, train=["a/1.jpg"], test=["b/2.jpg"])
    (tmp_path / "images/a/1.jpg").unlink()
    assert source_of("cub", tmp_path, "train").items() == [Item("a/1.jpg", 0, 0)]


@pytest.mark.parametrize(
    ("kind", "place", "counts"),
    [
        ("flickr8k", "flickr8k_1k/data", {"train": 800, "val": 100, "test": 100, "all": 1000}),
        ("coco", "coco362", {"train": 290, "val": 36, "test": 36, "all": 362}),
        ("cub", "cub200_2010", {"train": 1519, "test": 1471, "all": 2990}),
    ],
)
def test_real_sets_have_their_counts(kind: str, place: str, counts: dict[str, int]) -> None:
    folder = Path(os.environ.get("SACCADE_DATA", "")) / place
    if not os.environ.get("SACCADE_DATA") or not folder.is_dir():
        pytest.skip(f"SACCADE_DATA holds no {place}")
    parts = {split: source_of(kind, folder, split) for split in counts}
    assert {split: len(source.items()) for split, source in parts.items()} == counts
    assert not set(names_of(parts["train"])) & set(names_of(parts["test"]))
    if kind == "cub":
        assert all(len({item.label for item in source.items()}) == 100 for source in parts.values())


@pytest.mark.parametrize(
    ("name", "kind", "split"),
    [
        ("flickr8k", "flickr8k", "all"),
        ("coco_train", "coco", "train"),
        ("coco_val", "coco", "val"),
        ("cub_train", "cub", "train"),
        ("cub_test", "cub", "test"),
        ("dogs_train", "stanford_dogs", "train"),
        ("dogs_test", "stanford_dogs", "test"),
    ],
)
def test_the_packing_recipes_name_their_part(name: str, kind: str, split: str) -> None:
    recipe = REPOSITORY / "configs" / "shards" / f"{name}.yaml"
    config, _ = parse_config(PackConfig, argv=["--config", str(recipe)])
    assert (config.source.kind, config.source.split) == (kind, split)
    assert split == "all" or config.output.endswith(split)
