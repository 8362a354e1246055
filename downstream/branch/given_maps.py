"""Maps that others made, from any label set: of a teacher, of people, mined surrogates, or a detector's objects."""

from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from attention.maps import encode_map_np
from engine.errors import InputError
from shards.fetch import RemoteOptions
from shards.folder import open_folder
from shards.manifest import holds_objects, read_manifest
from shards.map_png import summed
from shards.objects import read_objects
from shards.opening import BadSample
from shards.reader import ShardSet

OBJECT_GRID = (56, 56)


def open_labelled(images: Path, labels: Path, *, remote: RemoteOptions | None = None) -> ShardSet:
    """An image set with its label maps, or with objects that maps are made of.

    Raises:
        InputError: no label set, or one of other images.
    """
    objects = holds_objects(read_manifest(open_folder(labels, remote=remote), kind="labels"))
    return ShardSet(images, labels=labels, objects=objects, remote=remote)


def read_maps(labelled: ShardSet | None, wanted: list[tuple[int, str]]) -> tuple[Tensor | None, Tensor]:
    """Maps of some images as codes (`attention.maps.encode_map`).

    Args:
        labelled: as `open_labelled` gives it, or None.
        wanted: shard and key of each image.

    Returns:
        uint8 `(images, rows, columns)`, zero where there is none, or None without labels; bool `(images,)`, those that
        have a usable map.

    Raises:
        InputError: no map at all, or maps of several sizes.
    """
    has_map = torch.zeros(len(wanted), dtype=torch.bool)
    if labelled is None:
        return None, has_map
    found: dict[tuple[int, str], np.ndarray] = {}
    for shard in range(labelled.manifest.num_shards):
        for row, key in enumerate(labelled.keys(shard)):
            with suppress(BadSample):  # no map, or a damaged one: counted by who needs it
                codes = _codes(labelled, shard, row)
                if codes is not None:
                    found[shard, key] = codes
    shapes = sorted({codes.shape for codes in found.values()})
    if len(shapes) != 1:
        what = f"maps of several sizes, {shapes[0]} and {shapes[1]}" if shapes else "no map of any of these images"
        raise InputError(f"branch.labels: {what}: label the set again in one go, or give another label set")
    maps = torch.zeros(len(wanted), *shapes[0], dtype=torch.uint8)
    for number, place in enumerate(wanted):
        if place in found:
            maps[number], has_map[number] = torch.from_numpy(found[place]), True
    return maps, has_map


def _codes(labelled: ShardSet, shard: int, row: int) -> np.ndarray | None:
    """Codes of one map; None where a detector found nothing in the image."""
    if not labelled.objects:
        codes = labelled.read_stored(shard, row).codes
        assert codes is not None  # the set was opened with maps
        return summed(codes)
    masks = [one.mask for one in read_objects(labelled, shard, row)]
    if not masks:
        return None
    merged = np.any(masks, axis=0).astype(np.float32)
    return encode_map_np(cv2.resize(merged, OBJECT_GRID[::-1], interpolation=cv2.INTER_AREA))
