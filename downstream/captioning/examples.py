"""Images and captions of a part of the data, read by row."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from downstream.captioning.layouts import CaptionedImage
from downstream.captioning.vocabulary import PADDING
from downstream.protocol import Inputs
from downstream.tasks.pictures import FeatureMaps, Pictures

MEMORY_SHARE = 4 << 30  # bytes of features that are put on a GPU


class CaptionPictures:
    """Images of a part by row, as the captioner's inputs."""

    def __init__(self, pictures: Pictures, images: Sequence[CaptionedImage], numbers: Sequence[int]) -> None:
        self.pictures, self.images = pictures, images
        self.rows = np.array([pictures.places[number] for number in numbers], dtype=np.int64)
        self.placed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def inputs(self, rows: np.ndarray) -> Inputs:
        """Features or images of some rows."""
        if self.placed is not None:
            return {"features": self.placed[torch.from_numpy(rows).to(self.placed.device)]}
        return self.pictures.inputs(self.rows[rows])

    def to(self, device: torch.device) -> "CaptionPictures":
        """The same with its features on `device`, if they are few enough; pixels stay in their files."""
        moved = copy(self)
        if isinstance(self.pictures, FeatureMaps):
            channels, height, width = self.pictures.shape
            if len(self) * channels * height * width * 2 <= MEMORY_SHARE:
                moved.placed = self.pictures.inputs(self.rows)["features"].to(device)
        return moved


@dataclass
class CaptionExamples:
    """Captions of a part, one row each, with the objects that their words name.

    Attributes:
        keys: image name and number of the caption.
        words: as they were written.
        tokens: int64 `(captions, longest)`, from the start token on, 0 behind the end.
        image_rows: `(captions,)`, row in `pictures`.
        positions: int64 `(captions, most)`, step whose word names an object; -1 where there is none.
        grids: int64 `(captions, most)`, row in `coverage`.
        coverage: float32 `(masks, height, width)`, see `matching.grid_coverage`.
    """

    keys: Sequence[str]
    words: list[list[str]]
    tokens: Tensor
    image_rows: np.ndarray
    pictures: CaptionPictures
    positions: Tensor
    grids: Tensor
    coverage: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def targets(self) -> Tensor:
        """The tokens again: what a caption predicts is itself."""
        return self.tokens

    def inputs(self, rows: np.ndarray) -> Inputs:
        """What the captioner and its loss get of some captions, cut to the longest of them."""
        index = torch.from_numpy(rows)
        tokens, positions = self.tokens[index], self.positions[index]
        longest = int((tokens != PADDING).sum(1).max())
        most = max(int((positions >= 0).sum(1).max()), 1)
        return {
            **self.pictures.inputs(self.image_rows[rows]),
            "tokens": tokens[:, :longest],
            "positions": positions[:, :most],
            "coverage": self.coverage[self.grids[index][:, :most]],
        }


@dataclass
class Part:
    """One part of a captioned set: its images, and all their captions."""

    images: list[CaptionedImage]
    pictures: CaptionPictures
    captions: CaptionExamples

    def to(self, device: torch.device) -> "Part":
        """The part with its features on `device`."""
        pictures = self.pictures.to(device)
        return Part(self.images, pictures, replace(self.captions, pictures=pictures))


def padded(rows: Sequence[Sequence[int]], *, fill: int) -> Tensor:
    """Rows of several lengths as int64 `(rows, longest)`, filled up behind their ends."""
    longest = max((len(row) for row in rows), default=0)
    padded = torch.full((len(rows), max(longest, 1)), fill, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded
