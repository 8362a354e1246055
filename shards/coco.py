"""Objects from COCO's JSON files: what a detector wrote as results, and what people drew (`instances_*.json`).

Two shapes are read. COCO's layout is an object with `images`, `categories` and `annotations`, which may have a `score`
each. COCO's results are a bare list of `image_id`, `category_id`, `score` and `segmentation`; the names of images and
categories then come from a second file in COCO's layout. Masks may be compressed or plain run lengths, or polygons.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from engine.errors import InputError
from shards.keys import make_key
from shards.objects import ObjectMask, coco_masks, decode_objects, mask_of_counts, store_objects
from shards.plain import read_plain

Size = tuple[int, int]
_MIN_POLYGON = 6


@dataclass
class CocoObjects:
    """Objects of many images, still in the form they came in.

    Attributes:
        where: the file, for messages.
        sizes: image's file name -> (height, width), None where the file does not say. An image that stands here without
            objects is one where the detector found none.
        num_objects: objects of these images, those below the threshold left out.
        num_below: objects below the threshold.
        num_unknown: objects of images that the file does not list.
    """

    where: str
    sizes: dict[str, Size | None]
    num_objects: int = 0
    num_below: int = 0
    num_unknown: int = 0
    _found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def categories(self) -> set[str]:
        """Names of the categories that objects have."""
        return {entry["category"] for entries in self._found.values() for entry in entries}

    def stored(self, name: str, *, size: Size) -> bytes:
        """The objects of one image as label sets hold them (`shards/objects.py`).

        Args:
            name: the image's file name, as in `sizes`.
            size: (height, width) of the image at hand.

        Raises:
            ValueError: they were found in an image of another size, or a mask does not decode; the message says which.
            KeyError: no such image.
        """
        _same_size(self.sizes[name] or size, size)
        entries = []
        for entry in self._found.get(name, []):
            try:
                counts = _compressed(entry["segmentation"], size)
            except ValueError as error:
                raise ValueError(f"object {entry['category'][:40]!r}: {error}") from error
            entries.append({"category": entry["category"], "score": entry["score"], "counts": counts})
        return store_objects(entries, size=size)

    def masks(self, name: str, *, size: Size) -> list[ObjectMask]:
        """The objects of one image, the highest score first; raises as `stored` does."""
        return decode_objects(self.stored(name, size=size))

    def names_of(self, keys: Iterable[str]) -> dict[str, str]:
        """Sample key -> image's file name, for the samples that the file has.

        The whole key decides, or else its last part, where that is the only one of its kind on both sides: COCO's
        `train2017/000000000009` is the file's `000000000009.jpg`.
        """
        whole = {make_key(name): name for name in self.sizes}
        listed = _last_parts(whole)
        wanted = list(keys)
        last = {key: short for short, key in _last_parts(wanted).items() if key is not None}
        found = {}
        for key in wanted:
            other = key if key in whole else listed.get(last.get(key, ""))
            if other is not None:
                found[key] = whole[other]
        return found


def from_coco_results(results: Path, annotations: Path | None = None, *, threshold: float = 0.0) -> CocoObjects:
    """Read a COCO file.

    Args:
        results: a file in COCO's layout, or a bare list of results.
        annotations: the file in COCO's layout that names the images and categories of a bare list; None where `results`
            has them.
        threshold: score below which objects are left out and counted; objects that people drew have score 1.

    Raises:
        InputError: missing or damaged files, another layout, unknown categories, or boxes without masks.
    """
    content = _read(results)
    if isinstance(content, dict):
        entries, names = content.get("annotations"), content
    elif annotations is None:
        raise InputError(
            f"{results}: a bare list of results, which names neither images nor categories: give the file that does, "
            "in COCO's layout, as --annotations"
        )
    else:
        entries, names = content, _read(annotations)
    try:
        images = _images(names)
        categories = {int(one["id"]): str(one["name"]) for one in names["categories"]}
        sizes = {name: size for name, size in images.values()}
        if len(sizes) != len(images):
            raise ValueError("two images have the same file name")
        found = CocoObjects(str(results), sizes)
        for entry in _list(entries):
            _sort_in(found, entry, images=images, categories=categories, threshold=threshold)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)[:160]
        raise InputError(
            f"{results}: not COCO's layout ({reason}): give instances_*.json, or a detector's results with masks"
        ) from error
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(read_plain(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): correct the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no JSON ({str(error)[:80]}): give a file in COCO's layout") from error


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("its annotations are no list")
    return value


def _images(content: Any) -> dict[int | str, tuple[str, Size | None]]:
    images: dict[int | str, tuple[str, Size | None]] = {}
    for one in content["images"]:
        size = (one.get("height"), one.get("width"))
        images[one["id"]] = str(one["file_name"]), size if all(type(side) is int for side in size) else None
    return images


def _sort_in(
    found: CocoObjects,
    entry: Any,
    *,
    images: dict[int | str, tuple[str, Size | None]],
    categories: dict[int, str],
    threshold: float,
) -> None:
    score = entry.get("score", 1.0)
    if type(score) not in (int, float) or not 0 <= score <= 1:
        raise ValueError(f"score {str(score)[:20]!r} is not in [0, 1]")
    if "segmentation" not in entry:
        raise ValueError("objects with boxes, but without masks ('segmentation')")
    if entry["category_id"] not in categories:
        raise ValueError(f"category {str(entry['category_id'])[:20]} has no name in it")
    image = images.get(entry["image_id"])
    if image is None:
        found.num_unknown += 1
    elif score < threshold:
        found.num_below += 1
    else:
        found.num_objects += 1
        kept = {"category": categories[entry["category_id"]], "score": score, "segmentation": entry["segmentation"]}
        found._found.setdefault(image[0], []).append(kept)


def _last_parts(keys: Iterable[str]) -> dict[str, str | None]:
    """Last part of a key -> the key; None where several end in it."""
    found: dict[str, str | None] = {}
    for key in keys:
        short = key.rpartition("/")[2]
        found[short] = None if short in found else key
    return found


def _same_size(there: Size, here: Size) -> None:
    if there != here:
        raise ValueError(f"its objects are those of an image of {there[1]}x{there[0]}, it is {here[1]}x{here[0]}")


def _compressed(segmentation: Any, size: Size) -> str:
    """COCO's compressed run lengths of any of its three forms. All is checked first: pycocotools is C and trusts."""
    if isinstance(segmentation, list):
        polygons = [_polygon(points, size) for points in segmentation]
        if not polygons:
            raise ValueError("no polygon")
        parts = coco_masks().frPyObjects(polygons, *size)
        return str(coco_masks().merge(parts)["counts"].decode())
    if not isinstance(segmentation, dict) or not isinstance(given := segmentation.get("size"), list) or len(given) != 2:
        raise ValueError("neither polygons nor run lengths with their size")
    _same_size((given[0], given[1]), size)
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        mask_of_counts(counts, size=size)
        return counts
    if not isinstance(counts, list) or not all(type(run) is int and run >= 0 for run in counts):
        raise ValueError("run lengths that are no whole numbers")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(f"run lengths that are not those of a mask of {size[1]}x{size[0]}")
    plain = {"size": list(size), "counts": counts}
    return str(coco_masks().frPyObjects(plain, *size)["counts"].decode())


def _polygon(points: Any, size: Size) -> list[float]:
    if not isinstance(points, list) or len(points) < _MIN_POLYGON or len(points) % 2:
        raise ValueError("a polygon of fewer than 3 points, or with half a point")
    for number, value in enumerate(points):
        side = size[1 - number % 2]
        if type(value) not in (int, float) or not isfinite(value) or not -side <= value <= 2 * side:
            raise ValueError(f"a polygon that leaves the image, at {str(value)[:20]}")
    return points
