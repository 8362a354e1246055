"""Object masks of captioned images: from a detector's label set, or from a COCO JSON file."""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from downstream.captioning.config import CaptionConfig
from downstream.captioning.layouts import CaptionedImage
from downstream.captioning.matching import grid_coverage
from engine.errors import InputError
from engine.files import sha256_of
from shards.coco import from_coco_results
from shards.decode import image_size
from shards.fetch import RemoteOptions
from shards.keys import make_key
from shards.objects import ObjectMask, read_objects
from shards.opening import BadSample
from shards.reader import ShardSet

SHAPE_TOLERANCE = 0.02  # of the sides' ratio: images are resized to whole pixels


class ObjectSource(Protocol):
    """Object masks by image.

    Attributes:
        categories: names of classes that occur.
        digest: what identifies the content.
    """

    categories: set[str]
    digest: str

    @property
    def num_images(self) -> int:
        """Images that there are masks or an empty result for."""

    def key(self, name: str) -> str | None:
        """What an image is known by, from its path below the folder of images; None if it is not one of them."""

    def find(self, name: str, *, size: tuple[int, int]) -> list[ObjectMask]:
        """Objects of an image of `size`, none where nothing was found or the image is not known.

        Raises:
            ValueError: one of them cannot be decoded, or they are those of an image of another size.
        """


@dataclass
class ObjectGrids:
    """Masks on the attention grid.

    Attributes:
        coverage: image name to class to the share of each cell `(height, width)` that its instances cover together.
        num_known: images that the source knows.
        num_unusable: those of them whose masks do not decode or are of another size; `first_fault` says what the first
            of them has.
    """

    coverage: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    num_known: int = 0
    num_unusable: int = 0
    first_fault: str = ""


def open_objects(caption: CaptionConfig, *, remote: RemoteOptions | None = None) -> ObjectSource:
    """The masks in the label set or COCO JSON file that `caption.objects` names.

    Args:
        remote: how a label set and its images on a server are read.

    Raises:
        InputError: nothing there, another layout, or a label set without its images.
    """
    path = caption.objects
    assert path is not None
    if path.is_file():
        return CocoFile(path, names=caption.object_names, min_score=caption.min_score)
    if caption.object_images is None:
        raise InputError(
            f"caption.objects {path}: give a COCO JSON file, or a label set together with caption.object_images, the "
            "image shards that it was made for"
        )
    return LabelledObjects(path, caption.object_images, remote=remote)


def find_grids(
    source: ObjectSource,
    images: Sequence[CaptionedImage],
    wanted: Mapping[str, set[str]],
    *,
    grid: tuple[int, int],
    min_score: float,
) -> ObjectGrids:
    """Masks of the classes that an image's captions name, its instances merged, on the grid.

    An image with a mask that does not decode or is of another size has none, and is counted.

    Args:
        wanted: image name to the classes that its captions name.

    Raises:
        InputError: the source holds none of the images; see `known_images`.
    """
    known = known_images(source, images)
    if not known:
        raise InputError(
            f"caption.objects holds {source.num_images} images, and none of those with captions (such as "
            f"{images[0].name}): give the file that belongs to these images"
        )
    found = ObjectGrids(num_known=len(known))
    for image in known:
        try:
            objects = source.find(image.name, size=image_size(image.path.read_bytes()))
        except ValueError as error:
            found.num_unusable += 1
            found.first_fault = found.first_fault or f"{image.name}: {error}"
            continue
        merged = _merged(objects, wanted[image.name], min_score=min_score)
        found.coverage[image.name] = {name: grid_coverage(mask, grid) for name, mask in merged.items()}
    return found


def known_images(source: ObjectSource, images: Iterable[CaptionedImage]) -> list[CaptionedImage]:
    """Those of the images that the source knows.

    Raises:
        InputError: two of them would get the same objects.
    """
    found: dict[str, CaptionedImage] = {}
    for image in images:
        key = source.key(image.name)
        if key is not None and found.setdefault(key, image) is not image:
            raise InputError(
                f"caption.objects: {found[key].name} and {image.name} would both get the objects of {key!r}: name the "
                "images there by their paths below caption.images, or give the two images different names"
            )
    return list(found.values())


def _key(name: str, known: Container[str]) -> str | None:
    """What an image is known by: its path without extension, or else its file name alone without it."""
    path = PurePosixPath(name)
    return next((key for key in (make_key(path.as_posix()), make_key(path.name)) if key in known), None)


def _merged(objects: Iterable[ObjectMask], wanted: set[str], *, min_score: float) -> dict[str, np.ndarray]:
    """Class to the union of its instances' masks."""
    merged: dict[str, np.ndarray] = {}
    for one in objects:
        if one.score >= min_score and one.category in wanted and one.mask.any():
            before = merged.get(one.category)
            merged[one.category] = one.mask if before is None else before | one.mask
    return merged


class LabelledObjects:
    """Objects in a label set, joined with the image shards that it was made for."""

    def __init__(self, path: Path, images: Path, *, remote: RemoteOptions | None = None) -> None:
        self.shards = ShardSet(images, labels=path, objects=True, remote=remote)
        assert self.shards.label_manifest is not None
        self.digest = hashlib.sha256(self.shards.label_manifest.hashes["sha256"].tobytes()).hexdigest()
        self.places: dict[str, tuple[int, int]] = {}
        self.categories: set[str] = set()
        for shard, count in enumerate(self.shards.shard_sizes.tolist()):
            for row in range(count):
                self.places[self.shards.key(shard, row)] = (shard, row)
                self.categories |= self._categories(shard, row)

    @property
    def num_images(self) -> int:
        """Size of the image set."""
        return len(self.places)

    def key(self, name: str) -> str | None:
        """The image's key in the image set."""
        return _key(name, self.places)

    def find(self, name: str, *, size: tuple[int, int]) -> list[ObjectMask]:
        """Objects of an image; the shards may hold it at another size, but not in other proportions."""
        key = self.key(name)
        if key is None:
            return []
        try:
            objects = read_objects(self.shards, *self.places[key])
        except BadSample as error:
            raise ValueError(str(error)) from error
        for one in objects:
            height, width = one.mask.shape
            if abs(height * size[1] - width * size[0]) > SHAPE_TOLERANCE * max(height * size[1], width * size[0]):
                raise ValueError(f"its objects are those of an image of {width}x{height}, it is {size[1]}x{size[0]}")
        return objects

    def _categories(self, shard: int, row: int) -> set[str]:
        """Class names of one sample, its masks not decoded; none where `find` will complain."""
        try:
            found = json.loads(self.shards.read_label(shard, row) or b"{}")
            return {str(one["category"]) for one in found.get("objects", ())}
        except (ValueError, TypeError, KeyError, AttributeError):
            return set()


class CocoFile:
    """Objects in a COCO JSON file."""

    def __init__(self, path: Path, *, names: Path | None, min_score: float) -> None:
        self.objects = from_coco_results(path, names, threshold=min_score)
        self.digest = sha256_of(path)
        self.categories = self.objects.categories
        self.files: dict[str, str] = {}
        for name in self.objects.sizes:
            other = self.files.setdefault(make_key(name), name)
            if other != name:
                raise InputError(
                    f"caption.objects {path}: {other} and {name} are one image by name: rename one of them"
                )

    @property
    def num_images(self) -> int:
        """Images that the file lists."""
        return len(self.objects.sizes)

    def key(self, name: str) -> str | None:
        """The key of the image's name in the file."""
        return _key(name, self.files)

    def find(self, name: str, *, size: tuple[int, int]) -> list[ObjectMask]:
        """Objects of an image."""
        key = self.key(name)
        return [] if key is None else self.objects.masks(self.files[key], size=size)
