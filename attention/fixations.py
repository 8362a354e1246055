"""Fixations as tensors: points `(batch, num_points, 2)` and a mask of the real ones.

Points are x, y in pixels of the map, counted from 0. A point lies in pixel `(floor(x), floor(y))`. Padding, points
outside the map and NaN points are left out everywhere.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Located = tuple[Tensor, Tensor]
"""Flat pixel index and which points count, as `locate` gives them."""


def pad_fixations(
    points: Sequence[np.ndarray], *, size: tuple[int, int] | None = None, grid: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Stack the fixations of several images, padded to the longest.

    Args:
        points: per image `(num_points, 2)` x, y.
        size: height and width of the images in pixels; with `grid`, points are moved from the image to the grid.
        grid: height and width of the maps the points are to be read on.

    Returns:
        Points `(batch, longest, 2)` float64 and mask `(batch, longest)` bool.
    """
    arrays = [np.asarray(image, dtype=np.float64).reshape(-1, 2) for image in points]
    longest = max((len(image) for image in arrays), default=0)
    padded = torch.zeros(len(arrays), longest, 2, dtype=torch.float64)
    valid = torch.zeros(len(arrays), longest, dtype=torch.bool)
    for row, image in enumerate(arrays):
        padded[row, : len(image)] = torch.from_numpy(image)
        valid[row, : len(image)] = True
    if size is not None and grid is not None:
        scale = torch.tensor([grid[1] / size[1], grid[0] / size[0]], dtype=torch.float64)
        padded = (padded.floor() + 0.5) * scale
    return padded, valid


def fixations_from_maps(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Read fixation maps as points: a pixel of value `n` becomes `n` points.

    Args:
        counts: `(batch, height, width)` numbers of fixations (or a bool map).

    Returns:
        Points `(batch, longest, 2)` float64 at pixel centres and mask `(batch, longest)`, on the device of the maps.
    """
    whole = counts.long().clamp(min=0)
    row, y, x = whole.nonzero(as_tuple=True)
    row, y, x = (index.repeat_interleave(whole[whole > 0]) for index in (row, y, x))
    totals = whole.sum(dim=(1, 2))
    longest = int(totals.max()) if len(totals) else 0
    column = torch.arange(len(row), device=row.device) - (totals.cumsum(0) - totals)[row]
    points = torch.zeros(len(counts), longest, 2, dtype=torch.float64, device=counts.device)
    points[row, column] = torch.stack([x, y], dim=1).double() + 0.5
    return points, torch.arange(longest, device=counts.device) < totals[:, None]


def locate(points: Tensor, valid: Tensor | None, size: tuple[int, int]) -> Located:
    """Find the pixel of each point.

    Args:
        points: `(..., num_points, 2)` x, y.
        valid: `(..., num_points)` bool, or None where all are real.
        size: height and width of the map.

    Returns:
        Flat pixel index `(..., num_points)` int64 (0 where unusable) and which points count, bool.

    Raises:
        ValueError: the shapes are not these.
    """
    if points.shape[-1] != 2 or (valid is not None and valid.shape != points.shape[:-1]):
        shape = None if valid is None else tuple(valid.shape)
        raise ValueError(
            f"fixations must be (..., num_points, 2) and valid (..., num_points), got {tuple(points.shape)} and {shape}"
        )
    height, width = size
    x, y = points.unbind(dim=-1)
    usable = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if valid is not None:
        usable = usable & valid
    # NaN has no integer: it is set aside before the conversion.
    index = torch.where(usable, y, 0).long() * width + torch.where(usable, x, 0).long()
    return index, usable


def fixation_counts(points: Tensor, valid: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Count fixations per pixel: the map form of points.

    Args:
        points: `(batch, num_points, 2)` x, y.
        valid: `(batch, num_points)` bool, or None.
        size: height and width of the map.

    Returns:
        `(batch, *size)` float32 counts.
    """
    index, usable = locate(points, valid, size)
    counts = torch.zeros(len(points), size[0] * size[1], device=points.device)
    return counts.scatter_add_(1, index, usable.float()).view(len(points), *size)


def shuffled_negatives(
    points: Tensor, valid: Tensor | None = None, *, num: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """For each image of a set, fixations of the other images: the negatives of shuffled AUC.

    Args:
        points: `(num_images, num_points, 2)`, all on maps of one size.
        valid: `(num_images, num_points)` bool, or None.
        num: how many to draw for each image, with replacement; None for all there are, exact but large.
        generator: source of the draws, on the device of the points; by default one seeded with 0.

    Returns:
        With `num` None the pool `(total, 2)` of all real points, else `(num_images, num, 2)`; and mask `(num_images,
        total)` or `(num_images, num)`: the ones of other images.
    """
    device = points.device
    if valid is None:
        valid = torch.ones(points.shape[:-1], dtype=torch.bool, device=device)
    pool, own = points[valid], valid.sum(dim=1)
    starts = own.cumsum(0) - own
    if num is None:
        position = torch.arange(len(pool), device=device)
        return pool, (position < starts[:, None]) | (position >= (starts + own)[:, None])
    others = len(pool) - own
    if generator is None:
        generator = torch.Generator(device=device).manual_seed(0)
    share = torch.rand(len(points), num, generator=generator, device=device, dtype=torch.float64)
    drawn = (share * others[:, None]).long()
    # An image's own points are one block of the pool: draws from there on step over it.
    drawn = drawn + torch.where(drawn >= starts[:, None], own[:, None], 0)
    usable = (others > 0)[:, None].expand(-1, num)
    return pool[torch.where(usable, drawn, 0)] if len(pool) else points.new_zeros(len(points), num, 2), usable
