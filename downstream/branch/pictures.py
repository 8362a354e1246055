"""Images decoded once and kept in memory; crops, mirrors and the maps that go with them are cut on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attention.maps import crop_mass, warp
from engine.loading import TensorBatch
from pretrain.config import ViewsConfig
from pretrain.views import draw_views

MIN_MASS = 0.05


@dataclass
class Batch(TensorBatch):
    """One rank's part of a step: rows of a `PictureSet`, and what is cut out of each.

    Attributes:
        rows: int64 `(batch,)`.
        boxes: float32 `(batch, 4)`: top, left, height, width as shares of the image.
        flips: bool `(batch,)`.
    """

    rows: Tensor
    boxes: Tensor
    flips: Tensor


@dataclass
class ViewBatch:
    """What the network gets of a batch, on the device.

    Attributes:
        images: float32 `(batch, 3, size, size)` in [0, 1].
        targets: int64 `(batch,)`.
        maps: densities of the view `(batch, *grid)`, or None.
        use: float32 `(batch,)`: 1 where the view's map supervises, 0 where there is none or little of it is inside.
    """

    images: Tensor
    targets: Tensor
    maps: Tensor | None
    use: Tensor


@dataclass
class PictureSet:
    """A part of an image set, decoded.

    Attributes:
        keys: of the samples.
        pixels: uint8 `(images, 3, stored_size, stored_size)`: the whole image, whatever its shape was.
        sizes: int64 `(images, 2)` height and width that the image had, pixels.
        targets: int64 `(images,)`.
        maps: uint8 codes (`attention.maps.encode_map`) of label maps `(images, rows, columns)`, or None.
        has_map: bool `(images,)`.
    """

    keys: Sequence[str]
    pixels: Tensor
    sizes: np.ndarray
    targets: Tensor
    maps: Tensor | None
    has_map: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, rows: np.ndarray) -> "PictureSet":
        """The images of some rows."""
        index = torch.from_numpy(rows)
        maps = None if self.maps is None else self.maps[index]
        return PictureSet(
            [self.keys[row] for row in rows],
            self.pixels[index],
            self.sizes[rows],
            self.targets[index],
            maps,
            self.has_map[index],
        )

    def on(self, device: torch.device) -> "PictureSet":
        """The same with its tensors on `device`."""
        maps = None if self.maps is None else self.maps.to(device)
        moved = (tensor.to(device) for tensor in (self.pixels, self.targets, self.has_map))
        pixels, targets, has_map = moved
        return replace(self, pixels=pixels, targets=targets, has_map=has_map, maps=maps)

    def views(self, batch: Batch, *, size: int, grid: tuple[int, int] | None) -> ViewBatch:
        """Cut and mirror images, and with `grid` their maps in the same way."""
        batch = batch.to(self.pixels.device)
        targets = self.targets[batch.rows]
        images = cut(self.pixels[batch.rows], batch.boxes, batch.flips, size=size)
        if grid is None or self.maps is None:
            return ViewBatch(images, targets, None, torch.zeros(len(targets), device=targets.device))
        density = (self.maps[batch.rows].float() / 255).square()
        use = self.has_map[batch.rows] & (crop_mass(density, batch.boxes) >= MIN_MASS)
        return ViewBatch(images, targets, warp(density, batch.boxes, batch.flips, grid), use.float())

    def central(self, rows: np.ndarray, *, share: float) -> Batch:
        """The central square of each image, its side `share` of the image's shorter one."""
        boxes = torch.from_numpy(central_boxes(self.sizes[rows], share=share))
        return Batch(torch.from_numpy(rows), boxes, torch.zeros(len(rows), dtype=torch.bool))


def cut(pixels: Tensor, boxes: Tensor, flips: Tensor, *, size: int) -> Tensor:
    """Crop, mirror and resize images with anti-aliasing, by `attention.maps.warp`.

    Args:
        pixels: uint8 `(batch, 3, height, width)`.
        boxes, flips: see `Batch`.

    Returns:
        float32 `(batch, 3, size, size)` in [0, 1], channels last in memory.
    """
    planes = pixels.flatten(0, 1).float().div_(255)
    with torch.autocast(pixels.device.type, enabled=False):
        found = warp(planes, boxes.repeat_interleave(3, dim=0), flips.repeat_interleave(3), (size, size))
    return found.view(-1, 3, size, size).contiguous(memory_format=torch.channels_last)


def central_boxes(sizes: np.ndarray, *, share: float) -> np.ndarray:
    """Boxes float32 `(images, 4)` of the central squares of images of `sizes` (height, width)."""
    sides = share * sizes.min(axis=1, keepdims=True) / sizes
    return np.concatenate([(1 - sides) / 2, sides], axis=1).astype(np.float32)


class Cropping(Dataset[Batch]):
    """Draws a crop and a mirror for every position; a function of seed, epoch and row alone."""

    def __init__(self, sizes: np.ndarray, *, min_area: float, seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.views = ViewsConfig(min_area=min_area)

    def __getitem__(self, position: tuple[int, int, int]) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[tuple[int, int, int]]) -> Batch:
        """One batch of (epoch, shard, row)."""
        epochs, _, rows = np.array(positions, dtype=np.int64).T
        sizes = self.sizes[rows]
        drawn = draw_views(self.views, seed=self.seed, epochs=epochs, samples=rows, sizes=sizes, num_views=1)
        boxes = drawn.crops[0] / np.tile(sizes, 2)
        return Batch(
            torch.from_numpy(rows), torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(drawn.flips[0])
        )
