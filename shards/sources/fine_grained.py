"""Fine-grained recognition: Caltech-UCSD Birds of 2010 and 2011, and Stanford Dogs, with their split files."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from engine.errors import InputError
from shards.sources.base import existing_folder, walk_images
from shards.sources.image_folder import ImageFolder
from shards.sources.listed import ListedImages, read_lines, read_pairs
from shards.sources.matlab import load_mat
from shards.sources.splits import HALVES_RULE, in_halves


def cub(path: str | Path, *, split: str) -> ListedImages:
    """CUB-200: `images/<class>/`, with `images.txt` and the files beside it (2011) or `lists/` (2010).

    Class folders without any list, such as a part of the set, are split by `HALVES_RULE`.

    Args:
        split: `train`, `test` or `all`.

    Raises:
        InputError: no images, no such split, or lists that do not fit each other.
    """
    root = existing_folder(path, "the folder of CUB-200 (it holds images)")
    root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
    _no_val(split, "CUB-200")
    images = root / "images" if (root / "images").is_dir() else root
    if (root / "images.txt").exists():
        return _cub_2011(root, images, split=split)
    if (root / "lists").is_dir():
        lists = {part: read_lines(root / "lists" / f"{part}.txt") for part in ("train", "test")}
        return _in_folders("cub", images, lists, split=split)
    return _by_rule("cub", images, split=split)


def stanford_dogs(path: str | Path, *, split: str) -> ListedImages:
    """Stanford Dogs: `Images/<class>/`, with `train_list.mat` and `test_list.mat` beside it or in `lists/`.

    Without the lists, `HALVES_RULE` splits.

    Args:
        split: `train`, `test` or `all`.

    Raises:
        InputError: no images, no such split, or lists that are damaged or do not fit each other.
    """
    root = existing_folder(path, "the folder of Stanford Dogs (it holds Images)")
    _no_val(split, "Stanford Dogs")
    images = root / "Images" if (root / "Images").is_dir() else root
    folder = root / "lists" if (root / "lists").is_dir() else root
    if not (folder / "train_list.mat").exists():
        return _by_rule("stanford_dogs", images, split=split)
    lists: dict[str, list[str]] = {}
    numbers: dict[str, int] = {}
    for part in ("train", "test"):
        lists[part], labels = _dogs_list(folder / f"{part}_list.mat")
        numbers |= dict(zip(lists[part], labels, strict=True))
    source = _in_folders("stanford_dogs", images, lists, split=split)
    for item in source.items():
        if numbers[item.name] != item.label + 1:
            raise InputError(
                f"{folder}: {item.name!r} has class {numbers[item.name]} in the lists, its folder is number "
                f"{item.label + 1}: take the release's lists"
            )
    return source


def _no_val(split: str, what: str) -> None:
    if split == "val":
        raise InputError(f"source.split: {what} has no split 'val': give train, test or all")


def _cub_2011(root: Path, images: Path, *, split: str) -> ListedImages:
    files, classes = read_pairs(root / "images.txt"), read_pairs(root / "classes.txt")
    class_of, in_train = read_pairs(root / "image_class_labels.txt"), read_pairs(root / "train_test_split.txt")
    for name, found in (("image_class_labels.txt", class_of), ("train_test_split.txt", in_train)):
        odd = sorted(found.keys() ^ files.keys())
        if odd:
            side = "an unknown image" if odd[0] in found else "no line for image"
            raise InputError(f"{root / name}: {side} {odd[0]} ({len(odd)} such): take the files of one release")
    if not set(class_of.values()) <= classes.keys() or not set(in_train.values()) <= {"0", "1"}:
        raise InputError(
            f"{root}: unknown classes in image_class_labels.txt, or splits other than 0 and 1: take one release"
        )
    numbers = {number: index for index, number in enumerate(classes)}
    labels = {files[image]: numbers[class_of[image]] for image in files}
    wanted = {"train": "1", "test": "0"}.get(split)
    names = [files[image] for image in files if wanted in (None, in_train[image])]
    return ListedImages(
        "cub", images, names, classes=list(classes.values()), labels=labels, split=split, rule="official"
    )


def _dogs_list(path: Path) -> tuple[list[str], list[int]]:
    content = load_mat(path)
    try:
        files = [str(name) for name in np.atleast_1d(content["file_list"])]
        labels = [int(label) for label in np.atleast_1d(content["labels"])]
        if len(files) != len(labels):
            raise ValueError(f"{len(files)} files, {len(labels)} labels")
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not the layout of Stanford Dogs ({error}): take the release's lists") from error
    return files, labels


def _in_folders(kind: str, images: Path, lists: dict[str, list[str]], *, split: str) -> ListedImages:
    """A source of the named files, whose first folder is their class."""
    both = sorted(set(lists["train"]) & set(lists["test"]))
    if both:
        raise InputError(f"{images}: {both[0]!r} stands in the lists of train and test: take the release's lists")
    everything = lists["train"] + lists["test"]
    names = sorted(everything if split == "all" else lists[split])
    classes = _classes(everything)
    return ListedImages(
        kind, images, names, classes=classes, labels=_labels(names, classes), split=split, rule="official"
    )


def _by_rule(kind: str, images: Path, *, split: str) -> ListedImages:
    source = ImageFolder(images)
    if not source.classes:
        raise InputError(f"{images}: images without class folders: give the folder that holds one folder per class")
    names = [name for name, _ in walk_images(images)]
    chosen = names if split == "all" else in_halves(names, split)
    rule, classes = "none" if split == "all" else HALVES_RULE, source.classes
    return ListedImages(kind, images, chosen, classes=classes, labels=_labels(chosen, classes), split=split, rule=rule)


def _classes(names: Iterable[str]) -> list[str]:
    return sorted({name.split("/")[0] for name in names})


def _labels(names: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    number = {name: index for index, name in enumerate(classes)}
    return {name: number[name.split("/")[0]] for name in names}
