"""Where an evaluator's images come from: shards, folders of JPEGs, or arrays, each numbered from 0."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.errors import InputError
from pretrain.evaluators.base import Evaluator
from pretrain.evaluators.classes import unseen_classes
from pretrain.probe_config import ProbeConfig
from shards.decode import decode_rgb
from shards.gaze import check_gaze
from shards.reader import ShardSet
from shards.sources.base import walk_images


class ImageSource(Protocol):
    """Images by number; sent to loader processes, so it must pickle.

    `name`: for messages. `digest`: identity of what it holds, hexadecimal. `classes`: names, empty without classes.
    """

    name: str
    digest: str
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """Upright RGB uint8 `(height, width, 3)` and class index (-1: none).

        Raises:
            ValueError: that image cannot be read.
        """
        ...

    def part(self, numbers: list[int]) -> "ImageSource":
        """What reads these images under the same numbers; sent to a loader process with every batch, so small."""
        ...


class ShardImages:
    """A shard set in the order of its shards.

    Args:
        limit: use this many, evenly spaced; 0 uses all.
    """

    def __init__(self, shards: ShardSet, *, limit: int = 0) -> None:
        self.shards, self.name, self.classes = shards, str(shards.root), shards.classes
        self.ends = np.cumsum(shards.shard_sizes)
        total = shards.num_samples
        self.numbers = np.arange(total) if not 0 < limit < total else np.arange(limit) * total // limit
        self.digest = shards.digest
        if len(self.numbers) < total:
            self.digest = hashlib.sha256(f"{shards.digest} {limit}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, number: int) -> tuple[int, int]:
        """Shard and row of an image."""
        position = int(self.numbers[number])
        shard = int(np.searchsorted(self.ends, position, side="right"))
        return shard, position - int(self.shards.shard_starts[shard])

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """See `ImageSource`."""
        sample = self.shards.read(*self.place(number))
        return decode_rgb(sample.image), sample.label

    def part(self, numbers: list[int]) -> "ShardImages":
        """See `ImageSource`."""
        return self


class FolderImages:
    """`root/<class>/*.JPEG`, as one severity of the released ImageNet-C lies on disk.

    Its digest is of names, sizes and times of change: to read every file for it would cost as much as to measure it.

    Args:
        classes: names of the class folders; their order numbers the classes.

    Raises:
        InputError: no folder, a class that is not among `classes`, a class without folder or without images.
    """

    def __init__(self, root: Path, *, classes: tuple[str, ...]) -> None:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder of corrupted images")
        self.root, self.name, self.classes = root, str(root), classes
        self.files = [name for name, _ in sorted(walk_images(root))]
        self._check()
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = [numbers[name.split("/")[0]] for name in self.files]
        states = ((name, (root / name).stat()) for name in self.files)
        listing = "\n".join(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states)
        self.digest = hashlib.sha256(listing.encode()).hexdigest()

    def _check(self) -> None:
        """Refuse a folder whose mean over its images would not be one over the validation set's classes."""
        root, classes = self.root, set(self.classes)
        folders = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        if not folders:
            raise InputError(
                f"{root}: no class folders in it; the released layout is <corruption>/<severity>/<class>/*.JPEG"
            )
        unknown, absent = sorted(folders - classes), sorted(classes - folders)
        if unknown:
            raise InputError(
                f"{root}: class folder {unknown[0]!r} is no class of the validation set ({len(unknown)} such)"
            )
        if absent:
            raise InputError(
                f"{root}: no folder for class {absent[0]!r} ({len(absent)} such): copy the set again, or remove this "
                "severity for a partial result"
            )
        empty = sorted(folders - {name.split("/")[0] for name in self.files})
        if empty:
            raise InputError(f"{root / empty[0]}: a class without images ({len(empty)} such): copy the set again")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """See `ImageSource`."""
        return _read_file(self.root / self.files[number]), self.labels[number]

    def part(self, numbers: list[int]) -> "FilePart":
        """See `ImageSource`."""
        files = {number: (self.root / self.files[number], self.labels[number]) for number in numbers}
        return FilePart(files, self.name, self.digest, self.classes)


@dataclass
class FilePart:
    """Some of a folder's images: number to file and class."""

    files: dict[int, tuple[Path, int]]
    name: str
    digest: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """See `ImageSource`."""
        path, label = self.files[number]
        return _read_file(path), label

    def part(self, numbers: list[int]) -> "FilePart":
        """See `ImageSource`."""
        return replace(self, files={number: self.files[number] for number in numbers})


class ArrayImages:
    """Rows `start` to `stop` of `<corruption>.npy`, uint8 `(50000, 32, 32, 3)`: one severity of CIFAR-10-C.

    Raises:
        InputError: an array of another type or shape, labels that are no class numbers, or other ones at another
            severity.
    """

    def __init__(self, file: Path, labels: Path, *, severity: int, classes: tuple[str, ...]) -> None:
        self.file, self.name, self.classes = file, f"{file} severity {severity}", classes
        images, answers = load_array(file), load_array(labels)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) % 5:
            raise InputError(
                f"{file}: {images.dtype} {images.shape} is not CIFAR-10-C's layout: uint8 (5 x images, 32, 32, 3)"
            )
        count = len(images) // 5
        if len(answers) not in (count, len(images)) or answers.ndim != 1:
            raise InputError(f"{labels}: {answers.shape} labels do not match the {len(images)} images of {file.name}")
        if not (answers.reshape(-1, count) == answers[:count]).all():
            raise InputError(
                f"{labels}: the labels of the five severities differ, whose images are the same ones: copy it again"
            )
        if answers.min() < 0 or answers.max() >= len(classes):
            raise InputError(f"{labels}: class {answers.max()} is beyond the validation set's {len(classes)} classes")
        self.start = (severity - 1) * count
        self.labels = answers[:count].astype(np.int64)
        self.images = images  # mapped, not read: workers share the pages
        digest = hashlib.sha256(images[self.start : self.start + count].tobytes())
        digest.update(self.labels.tobytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """See `ImageSource`."""
        return np.array(self.images[self.start + number]), int(self.labels[number])

    def part(self, numbers: list[int]) -> "ArrayPart":
        """See `ImageSource`."""
        rows = {number: (self.start + number, int(self.labels[number])) for number in numbers}
        return ArrayPart(self.file, rows, self.name, self.digest, self.classes)


@dataclass
class ArrayPart:
    """Some of an array's images: number to row and class."""

    file: Path
    rows: dict[int, tuple[int, int]]
    name: str
    digest: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def images(self) -> np.ndarray:
        """The array, mapped when it is first read: the rows alone are sent."""
        return load_array(self.file)

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """See `ImageSource`."""
        row, label = self.rows[number]
        return np.array(self.images[row]), label

    def part(self, numbers: list[int]) -> "ArrayPart":
        """See `ImageSource`."""
        return ArrayPart(
            self.file, {number: self.rows[number] for number in numbers}, self.name, self.digest, self.classes
        )


def load_array(file: Path) -> np.ndarray:
    """A `.npy` file, mapped into memory; never unpickled.

    Raises:
        InputError: missing or damaged.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: cannot be read as an array ({error}): copy the set again") from error


def _read_file(path: Path) -> np.ndarray:
    try:
        return decode_rgb(path.read_bytes())
    except OSError as error:
        raise ValueError(str(error)) from error


def train_images(probe: ProbeConfig) -> ShardImages:
    """The images that probes are trained on."""
    return ShardImages(ShardSet(probe.train, remote=probe.remote), limit=probe.max_train)


def val_images(probe: ProbeConfig) -> ShardImages:
    """The images that probes are measured on."""
    return ShardImages(ShardSet(probe.val, remote=probe.remote), limit=probe.max_val)


def labelled_pair(probe: ProbeConfig) -> tuple[ShardImages, ShardImages]:
    """Training and validation images of one data set with classes.

    Raises:
        InputError: no classes, one class only, a class without training images, or classes that differ between the two.
    """
    train, val = train_images(probe), val_images(probe)
    if train.classes != val.classes:
        raise InputError(f"{probe.train} and {probe.val} have different classes: probe within one data set")
    if len(train.classes) < 2:
        raise InputError(
            f"{probe.train}: {len(train.classes)} classes: this evaluator needs labelled shards of at least two"
        )
    empty = unseen_classes(train.shards)
    if empty:
        raise InputError(
            f"{probe.train}: no training image of class {empty[0]!r} ({len(empty)} such): pack the set again with "
            "images of every class, or without the empty ones"
        )
    return train, val


def limit_notes(evaluators: Sequence[Evaluator], probe: ProbeConfig) -> list[str]:
    """A line where max_train leaves classes without a training image, which is no error: the user asked for it."""
    train = train_images(probe) if any("train" in evaluator.needs for evaluator in evaluators) else None
    unseen = unseen_classes(train.shards, train.numbers) if train is not None else []
    if train is None or not unseen:
        return []
    first, count, total = unseen[0], len(unseen), len(train.classes)
    return [f"{probe.train}: max_train {probe.max_train} leaves {count} of {total} classes without image ('{first}')"]


def check_needs(evaluator: Evaluator, probe: ProbeConfig) -> list[str]:
    """Open what an evaluator needs.

    Returns:
        A line for each data set.

    Raises:
        InputError: shards that are missing, without classes or without gaze.
    """
    lines = []
    if {"train", "val"} <= set(evaluator.needs):
        labelled_pair(probe)
    for need in evaluator.needs:
        shards = ShardSet(getattr(probe, need), remote=probe.remote)
        if need == "gaze":
            check_gaze(shards)
        lines.append(f"shards: {shards.root}, {shards.num_samples} samples")
    return lines
