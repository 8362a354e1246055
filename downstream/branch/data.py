"""Reads a labelled image set, with or without label maps, into memory, and splits it where there is no test set."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from downstream.branch.config import BranchConfig
from downstream.branch.given_maps import open_labelled, read_maps
from downstream.branch.pictures import PictureSet
from downstream.config import DataConfig
from engine.errors import InputError
from engine.progress import ProgressBar
from shards.decode import decode_rgb
from shards.opening import BadSample
from shards.order import stable_permutation
from shards.reader import ShardSet

MAX_READERS = 8
NUM_NAMED = 5


@dataclass
class FineGrained:
    """Training and test images of a fine-grained task.

    Attributes:
        classes: their names.
        facts: what numbers were measured on: sizes, split, hashes, images left out.
    """

    train: PictureSet
    test: PictureSet
    classes: tuple[str, ...]
    facts: dict[str, Any]


def open_data(data: DataConfig, config: BranchConfig, *, report: Callable[[str], None]) -> FineGrained:
    """Read the images of `data.path` and, where given, `data.val`; else hold a stratified part of each class back.

    Raises:
        InputError: unlabelled images, one class only, sets of other classes, a class without test or training images,
            label maps of other images, or too many images or maps that cannot be read.
    """
    shards = ShardSet(data.path, remote=data.remote)
    labelled = None if config.labels is None else open_labelled(data.path, config.labels, remote=data.remote)
    if len(shards.classes) < 2:
        what = "one class only" if shards.classes else "no class labels"
        raise InputError(f"{data.path}: {what}, so there is nothing to tell apart: pack a folder per class")
    test_shards = None if data.val is None else ShardSet(data.val, remote=data.remote)
    if test_shards is not None and test_shards.classes != shards.classes:
        raise InputError(f"{data.path} and {data.val} have other classes: pack both splits of one data set")
    every, bad = read_pictures(shards, config, labelled=labelled, report=report)
    facts: dict[str, Any] = {"sha256": {"train": shards.digest}}
    if test_shards is None:
        held = stratified(every, share=config.test_share, seed=data.held_out_seed)
        train, test = every.part(np.flatnonzero(~held)), every.part(np.flatnonzero(held))
        facts["split"] = f"{config.test_share:g} of each class, by key, seed {data.held_out_seed}"
    else:
        train = every
        test, more = read_pictures(test_shards, config, report=report)
        facts["split"], facts["sha256"]["test"], bad = "as packed", test_shards.digest, bad + more
    if data.limit is not None and data.limit < len(train):
        train = train.part(np.sort(stable_permutation(len(train), data.held_out_seed, "limit")[: data.limit]))
    _check_classes(train, test, shards)
    if labelled is not None:
        _check_maps(train, config)
        assert labelled.label_manifest is not None
        facts["maps"] = {"digest": labelled.label_manifest.digest, "teacher": labelled.label_manifest.extra["teacher"]}
    facts["sizes"] = {"train": len(train), "test": len(test), "classes": len(shards.classes)}
    facts["bad"] = bad
    return FineGrained(train, test, shards.classes, facts)


def stratified(pictures: PictureSet, *, share: float, seed: int) -> np.ndarray:
    """Which images `(images,)` bool are held back: `share` of each class, rounded, at least 1 and not all.

    Depends on keys, classes and seed alone, not on the order in the shards.
    """
    held = np.zeros(len(pictures), dtype=bool)
    targets = pictures.targets.numpy()
    for number in np.unique(targets):
        rows = sorted(np.flatnonzero(targets == number).tolist(), key=lambda row: pictures.keys[row])
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        held[[rows[i] for i in stable_permutation(len(rows), seed, "split", int(number))[:count]]] = True
    return held


def read_pictures(
    shards: ShardSet, config: BranchConfig, *, labelled: ShardSet | None = None, report: Callable[[str], None]
) -> tuple[PictureSet, list[str]]:
    """All readable images of a set, and why others are left out.

    Args:
        labelled: the same set with label maps.
        report: gets a line for each of the first images that are left out.

    Raises:
        InputError: too many of them, an image without class, or maps of several sizes.
    """
    places = [(shard, row) for shard, count in enumerate(shards.shard_sizes.tolist()) for row in range(count)]
    pixels = torch.empty(len(places), 3, config.stored_size, config.stored_size, dtype=torch.uint8)
    with ProgressBar(len(places), f"reading {shards.root}") as bar, ThreadPoolExecutor(_num_readers()) as pool:

        def read(number: int) -> "_Read | str":
            return _read(shards, *places[number], into=pixels[number].numpy())

        found = []
        for entry in pool.map(read, range(len(places))):
            found.append(entry)
            bar.update(1)
    bad = [entry for entry in found if isinstance(entry, str)]
    for line in bad[:NUM_NAMED]:
        report(f"left out: {line}")
    if len(bad) > config.max_bad_fraction * len(found) or len(bad) == len(found):
        raise InputError(
            f"{len(bad)} of {len(found)} images cannot be read (branch.max_bad_fraction {config.max_bad_fraction}), "
            f"the first: {bad[0]}; run shards/verify.py on {shards.root}"
        )
    numbers = [number for number, entry in enumerate(found) if not isinstance(entry, str)]
    kept = [entry for entry in found if not isinstance(entry, str)]
    for entry in kept:
        if not 0 <= entry.label < len(shards.classes):
            raise InputError(f"{shards.root}: {entry.key[:80]!r} has no class: pack a folder per class")
    maps, has_map = read_maps(labelled, [(places[n][0], entry.key) for n, entry in zip(numbers, kept, strict=True)])
    return PictureSet(
        [entry.key for entry in kept],
        pixels[torch.tensor(numbers)] if bad else pixels,
        np.array([entry.size for entry in kept], dtype=np.int64),
        torch.tensor([entry.label for entry in kept]),
        maps,
        has_map,
    ), bad


def _num_readers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_READERS, cores)


@dataclass
class _Read:
    """One image as read, its pixels elsewhere: `size` is height and width."""

    key: str
    label: int
    size: tuple[int, int]


def _read(shards: ShardSet, shard: int, row: int, *, into: np.ndarray) -> "_Read | str":
    """Decode one image `into` uint8 `(3, side, side)`; the reason where it cannot be read."""
    side = into.shape[1]
    try:
        sample = shards.read(shard, row)
        found = decode_rgb(sample.image)
    except BadSample as error:
        return str(error)
    except ValueError as error:
        return f"{shards.manifest.files[shard]}: sample {shards.key(shard, row)[:80]!r}: {error}"
    size = (found.shape[0], found.shape[1])
    if size != (side, side):
        way = cv2.INTER_AREA if min(size) >= side else cv2.INTER_LINEAR
        found = cv2.resize(found, (side, side), interpolation=way)
    into[:] = found.transpose(2, 0, 1)
    return _Read(sample.key, sample.label, size)


def _check_classes(train: PictureSet, test: PictureSet, shards: ShardSet) -> None:
    """Every class that is tested must be learnt, and more than one."""
    learnt, tested = (set(part.targets.tolist()) for part in (train, test))
    if len(learnt) < 2:
        raise InputError(f"{shards.root}: training images of {len(learnt)} class only, so nothing to tell apart")
    if unknown := sorted(tested - learnt):
        raise InputError(
            f"{shards.root}: class {shards.classes[unknown[0]]!r} has no training image ({len(unknown)} such): give at "
            f"least 2 images of each class, or raise data.limit"
        )


def _check_maps(train: PictureSet, config: BranchConfig) -> None:
    """Enough training images have a map."""
    missing = [train.keys[row] for row in torch.nonzero(~train.has_map).flatten().tolist()]
    if len(missing) > config.max_bad_fraction * len(train):
        raise InputError(
            f"{config.labels}: no usable map for {len(missing)} of {len(train)} training images "
            f"(branch.max_bad_fraction {config.max_bad_fraction}), the first is {missing[0][:80]!r}: label them"
        )
