"""Object labels: what a detector found in an image, as a category, a score and a mask each.

They lie in label sets of the same kind as attention maps do, with another member in each sample: a small JSON that
holds the masks as COCO's compressed run lengths. `ShardSet(IMAGES, labels=OBJECTS, objects=True)` opens such a set.

    {"height": 375, "width": 500, "objects": [{"category": "dog", "score": 0.93, "counts": "oX..."}]}
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from engine.errors import InputError
from shards.decode import MAX_PIXELS
from shards.opening import BadSample
from shards.reader import ShardSet

OBJECTS = "objects.json"
# Five bits a character: seven of them hold any run of an image of MAX_PIXELS, with its sign.
_MAX_CHARACTERS = 7
# Of all masks of one image together: a few bytes of JSON could else ask for any amount of memory.
MAX_MASK_PIXELS = 1 << 32


@dataclass(frozen=True, slots=True)
class ObjectMask:
    """One object in one image.

    Attributes:
        category: name of its class, as the detector has it ("traffic light").
        score: the detector's confidence, 0 to 1; 1 for objects that people drew.
        mask: bool `(height, width)`, in pixels of the image as it lies in the shards.
    """

    category: str
    score: float
    mask: np.ndarray


def read_objects(shards: ShardSet, shard: int, row: int) -> list[ObjectMask]:
    """Objects of one usable sample, the highest score first; empty where the detector found none.

    Args:
        shards: an image set that was opened with `labels=..., objects=True`.

    Raises:
        BadSample: damaged, or none were written for this image (it is not in the detector's results).
        RemoteFault: the server cannot be reached.
    """
    data = shards.read_label(shard, row)
    try:
        if data is None:
            raise ValueError("none were written for this image")
        return decode_objects(data)
    except ValueError as error:
        raise BadSample(shards.key(shard, row), shards.manifest.files[shard], f"objects: {error}") from error


def encode_objects(objects: Iterable[ObjectMask], *, size: tuple[int, int]) -> bytes:
    """The stored form of an image's objects, sorted by falling score. Equal objects give equal bytes.

    Args:
        size: (height, width) of the image, which every mask must have.

    Raises:
        ValueError: a mask of another size, a score outside [0, 1], or a category without a name.
        InputError: pycocotools is not installed.
    """
    entries = []
    for one in objects:
        if one.mask.shape != size:
            raise ValueError(f"mask of {one.mask.shape[1]}x{one.mask.shape[0]}, the image is {size[1]}x{size[0]}")
        rle = coco_masks().encode(np.asfortranarray(one.mask, dtype=np.uint8))
        entries.append({"category": one.category, "score": one.score, "counts": rle["counts"].decode()})
    return store_objects(entries, size=size)


def store_objects(entries: list[dict[str, Any]], *, size: tuple[int, int]) -> bytes:
    """As `encode_objects`, of masks that are compressed already: `category`, `score`, `counts` each."""
    _check(entries, size=size)
    ordered = sorted(entries, key=lambda entry: -float(entry["score"]))
    content = {"height": size[0], "width": size[1], "objects": ordered}
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def decode_objects(data: bytes) -> list[ObjectMask]:
    """Objects from their stored form.

    Raises:
        ValueError: damaged; the message says in what.
    """
    return list(_decoded(data))


def check_objects(data: bytes) -> None:
    """As `decode_objects`, keeping one mask at a time."""
    for _ in _decoded(data):
        pass


def _decoded(data: bytes) -> Iterator[ObjectMask]:
    try:
        content = json.loads(data)
        height, width, entries = content["height"], content["width"], content["objects"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError("damaged JSON of objects") from error
    if not (type(height) is int and type(width) is int and isinstance(entries, list)):
        raise ValueError("damaged JSON of objects")
    _check(entries, size=(height, width))
    for entry in entries:
        mask = mask_of_counts(entry["counts"], size=(height, width))
        yield ObjectMask(entry["category"], float(entry["score"]), mask)


def mask_of_counts(counts: str, *, size: tuple[int, int]) -> np.ndarray:
    """Mask bool `(height, width)` of COCO's compressed run lengths.

    Everything is checked before memory is filled, as the text may come from anywhere.

    Raises:
        ValueError: no such text, or its runs are not those of an image of that size.
    """
    runs = _runs(counts.encode("ascii", "replace"))
    height, width = size
    if len(runs) == 0 or (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths that are not those of a mask of {width}x{height}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(text: bytes) -> np.ndarray:
    """Run lengths int64, by columns, background first, from COCO's text: numbers of five bits a character, the lowest
    first, a sixth that says that more follow; from the fourth on, a number is the difference to the last but one."""
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    lengths = np.diff(ends, prepend=-1)
    if (codes < 0).any() or (codes > 63).any() or len(codes) == 0 or ends[-1:].tolist() != [len(codes) - 1]:
        raise ValueError("run lengths that do not decode")
    if lengths.max() > _MAX_CHARACTERS:
        raise ValueError("a run length that is no size of an image")
    starts = ends - lengths + 1
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shift, starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)  # the highest bit is the sign
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values


def _check(entries: list[Any], *, size: tuple[int, int]) -> None:
    height, width = size
    if not (height > 0 and width > 0 and height * width <= MAX_PIXELS):
        raise ValueError(f"objects in an image of {width}x{height} pixels")
    if len(entries) * height * width > MAX_MASK_PIXELS:
        raise ValueError(f"{len(entries)} masks of {width}x{height} pixels are too many")
    for entry in entries:
        _check_entry(entry)


def _check_entry(entry: Any) -> None:
    if not (isinstance(entry, dict) and {"category", "score", "counts"} <= entry.keys()):
        raise ValueError("an object without category, score or mask")
    category, score = entry["category"], entry["score"]
    if not (isinstance(category, str) and category.strip() and isinstance(entry["counts"], str)):
        raise ValueError("an object without the name of its category or without mask")
    if type(score) not in (int, float) or not 0 <= score <= 1:
        raise ValueError(f"score {str(score)[:20]!r} of {category[:40]!r} is not in [0, 1]")


def coco_masks() -> ModuleType:
    """`pycocotools.mask`, which compresses masks. Reading stored objects does without.

    Raises:
        InputError: not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise InputError(
            "pycocotools is not installed, which object labels are written with: python -m pip install -e "
            "'.[captioning]'"
        ) from error
    module: ModuleType = mask
    return module
