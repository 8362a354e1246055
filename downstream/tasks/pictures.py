"""Images of a question-answering set, read by row: pixels from files, or feature maps from memory-mapped arrays."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from downstream.protocol import Inputs
from engine.errors import InputError
from shards.decode import decode_rgb


class Pictures(Protocol):
    """Images or their feature maps."""

    @property
    def places(self) -> Mapping[int, int]:
        """Image number to row; an image that cannot be read has none."""

    def inputs(self, rows: np.ndarray) -> Inputs:
        """What a model gets to see of some rows."""


def read_square(path: Path, *, size: int) -> np.ndarray:
    """The whole image at `size` x `size` pixels, uint8 RGB: nothing is cropped, so that maps lie on the whole of it.

    Raises:
        ValueError: missing or damaged.
    """
    try:
        pixels = decode_rgb(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if pixels.shape[:2] != (size, size):
        pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
    return pixels


class ImagesInMemory:
    """Small images, decoded once."""

    def __init__(self, files: Mapping[int, Path], *, size: int) -> None:
        images: list[np.ndarray] = []
        places: dict[int, int] = {}
        for number, path in sorted(files.items()):
            try:
                pixels = read_square(path, size=size)
            except ValueError:
                continue
            places[number] = len(images)
            images.append(pixels)
        self.places: Mapping[int, int] = places
        stacked = np.stack(images) if images else np.empty((0, size, size, 3), dtype=np.uint8)
        self.images = torch.from_numpy(stacked)

    def to(self, device: torch.device) -> "ImagesInMemory":
        """The same images on `device`."""
        placed = copy(self)
        placed.images = self.images.to(device)
        return placed

    def inputs(self, rows: np.ndarray) -> Inputs:
        """uint8 images `(rows, size, size, 3)`."""
        return {"images": self.images[torch.from_numpy(rows)]}


class ImagesOnDisk:
    """Images decoded whenever they are read, for sets that do not fit into memory."""

    def __init__(self, files: Mapping[int, Path], *, size: int) -> None:
        self.size = size
        present = [number for number in sorted(files) if files[number].is_file()]
        self.files = [files[number] for number in present]
        self.places: Mapping[int, int] = {number: row for row, number in enumerate(present)}

    def inputs(self, rows: np.ndarray) -> Inputs:
        """uint8 images `(rows, size, size, 3)`.

        Raises:
            InputError: one of them is damaged.
        """
        try:
            images = [read_square(self.files[row], size=self.size) for row in rows.tolist()]
        except ValueError as error:
            raise InputError(f"an image cannot be read: {error}; fetch it again, or remove the file") from error
        return {"images": torch.from_numpy(np.stack(images))}


@dataclass
class FeatureMaps:
    """Feature maps in one array or several parts of it, memory-mapped: a row is read when it is asked for.

    Attributes:
        parts: `(images, channels, height, width)` each.
    """

    parts: list[np.ndarray]
    places: Mapping[int, int]

    def __post_init__(self) -> None:
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a map."""
        channels, height, width = self.parts[0].shape[1:]
        return int(channels), int(height), int(width)

    def inputs(self, rows: np.ndarray) -> Inputs:
        """Maps of some rows `(rows, channels, height, width)`, in the type that they are stored in."""
        where = np.searchsorted(self.starts, rows, side="right") - 1
        maps = [self.parts[part][row - self.starts[part]] for part, row in zip(where, rows, strict=True)]
        return {"features": torch.from_numpy(np.stack(maps))}


def ready_features(folder: Path, subset: str) -> FeatureMaps:
    """Feature maps that were made elsewhere: `<subset>.npy` and, for the image number of each row, `<subset>.ids.npy`.

    Raises:
        InputError: a file is missing, no array of numbers, or the two do not belong together.
    """
    maps, ids = (_open_array(folder / f"{subset}{end}") for end in (".npy", ".ids.npy"))
    if maps.ndim != 4 or not np.issubdtype(maps.dtype, np.floating):
        raise InputError(
            f"{folder / subset}.npy is {maps.dtype} {maps.shape}: it must hold floats (images, channels, height, width)"
        )
    if ids.shape != (len(maps),) or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{folder / subset}.ids.npy must hold {len(maps)} image numbers, one for each feature map")
    return FeatureMaps([maps], {number: row for row, number in enumerate(ids.tolist())})


def _open_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: vqa.features must hold <subset>.npy and <subset>.ids.npy") from error
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is no array that numpy can map into memory: write it with numpy.save") from error


def map_shape(pictures: Pictures) -> tuple[int, int, int] | None:
    """Channels, height and width of ready feature maps; None for images."""
    return pictures.shape if isinstance(pictures, FeatureMaps) else None


def shown(pictures: Pictures, rows: np.ndarray) -> Tensor | None:
    """uint8 images of some rows, for a report; None where only features are at hand."""
    return pictures.inputs(rows).get("images")
