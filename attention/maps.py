"""Attention maps as densities: normalise, warp with an augmentation, store in 8 bits, build from fixations.

A map is a tensor `(..., height, width)`; row 0 is the top of the image, column 0 its left edge. Positions in an image
are `(x, y)` pixels counted from 0: pixel `i` covers `[i, i + 1)`, so the point `x` lies in pixel `floor(x)`.
"""

import math

import numpy as np
import torch
from torch import Tensor

MAX_CODE = 255


def as_float(maps: Tensor) -> Tensor:
    """Return float32 or float64 maps as they are, and every other type (half, integer, bool) as float32."""
    return maps if maps.dtype in (torch.float32, torch.float64) else maps.float()


def check_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two maps in their common floating type; `(batch, height, width)` of one shape or ValueError."""
    if first.ndim != 3 or first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"both maps must be (batch, height, width) of one shape, got {shapes}")
    first, second = as_float(first), as_float(second)
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


def to_density(maps: Tensor, *, eps: float = 0.0) -> Tensor:
    """Scale maps so that each sums to 1: `p = (m + eps) / sum(m + eps)`.

    A map with negative values is first shifted so that its least value is 0 (as pysaliency does). A map that says
    nothing (all zero, empty of mass, or holding a NaN or an infinity) becomes the uniform density.

    Args:
        maps: `(..., height, width)`.
        eps: added to every value before scaling, in the units of the map.

    Returns:
        `(..., height, width)`, values in [0, 1], float32 (float64 where the input is).
    """
    maps = as_float(maps)
    maps = maps + (eps - maps.amin(dim=(-2, -1), keepdim=True).clamp(max=0))
    total = maps.sum(dim=(-2, -1), keepdim=True)
    usable = torch.isfinite(total) & (total > 0)
    num_positions = maps.shape[-2] * maps.shape[-1]
    # Dividing by 1 where the map is unusable keeps NaN out of the gradient of the branch that is not taken.
    return torch.where(usable, maps / torch.where(usable, total, 1.0), 1.0 / num_positions)


def zscore(maps: Tensor, *, ddof: int = 0) -> Tensor:
    """Standardise each map: `z = (m - mean(m)) / std(m)`. A constant map, one pixel included, gives zeros.

    Args:
        maps: `(..., height, width)`.
        ddof: the standard deviation divides by `height * width - ddof` (0: numpy and pysaliency, 1: MATLAB).

    Returns:
        `(..., height, width)`, mean 0 and standard deviation 1. A map with a NaN gives NaN.
    """
    maps = as_float(maps)
    num_positions = maps.shape[-2] * maps.shape[-1]
    centred = maps - maps.mean(dim=(-2, -1), keepdim=True)
    constant = is_constant(maps)[..., None, None]
    variance = centred.square().sum(dim=(-2, -1), keepdim=True) / max(num_positions - ddof, 1)
    # The square root has no gradient at 0, so constant maps take a standard deviation of 1 and are then set to 0.
    return torch.where(constant, 0.0, centred / torch.where(constant, 1.0, variance).sqrt())


def is_constant(maps: Tensor) -> Tensor:
    """Which maps `(..., height, width)` hold one value only: `(...)` bool. A map with a NaN does not."""
    return maps.amin(dim=(-2, -1)) == maps.amax(dim=(-2, -1))


def log_density(logits: Tensor) -> Tensor:
    """Log-softmax over positions: `log p = l - log sum exp(l)`.

    Args:
        logits: `(..., height, width)`, computed in float32 at least.

    Returns:
        `(..., height, width)` log-probabilities; their exponentials sum to 1 over the last two dimensions.
    """
    return torch.log_softmax(as_float(logits).flatten(-2), dim=-1).view(logits.shape)


def _overlap(start: Tensor, length: Tensor, num_cells: int) -> Tensor:
    """Share of each cell of an axis that `[start, start + length]` (fractions) covers: `(batch, num_cells)`."""
    edges = torch.arange(num_cells + 1, dtype=start.dtype, device=start.device)
    low, high = (start * num_cells)[:, None], ((start + length) * num_cells)[:, None]
    return (torch.minimum(edges[1:], high) - torch.maximum(edges[:-1], low)).clamp(0, 1)


def _resampling(start: Tensor, length: Tensor, *, num_cells: int, num_outputs: int) -> Tensor:
    """Weights `(batch, outputs, cells)` of an anti-aliased linear resize of `[start, start + length]` of an axis."""
    step = length * num_cells / num_outputs
    cells, outputs = (torch.arange(n, dtype=start.dtype, device=start.device) + 0.5 for n in (num_cells, num_outputs))
    centres = (start * num_cells)[:, None] + step[:, None] * outputs
    distance = cells - centres[:, :, None]
    # Shrinking widens the triangle to the size of an output cell: every input cell then has its say (area-correct).
    support = step.clamp(min=1.0)[:, None, None]
    weights = (1 - distance.abs() / support).clamp(min=0) * _overlap(start, length, num_cells)[:, None, :]
    total = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def _check_boxes(maps: Tensor, boxes: Tensor) -> None:
    if maps.ndim != 3 or boxes.shape != (maps.shape[0], 4):
        shapes = f"{tuple(maps.shape)} and {tuple(boxes.shape)}"
        raise ValueError(f"maps must be (batch, height, width) and boxes (batch, 4), got {shapes}")


def warp(maps: Tensor, boxes: Tensor, flips: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop, flip and resize maps as a view of their image was cropped, flipped and resized.

    On boxes that fall between cells it equals torchvision's `resized_crop(antialias=True)` followed by `hflip`; a
    cell that the box cuts counts by the share of it inside. Values are interpolated, not normalised: a constant map
    keeps its constant. `to_density` makes a target of the result and `crop_mass` says how much attention the crop
    holds.

    Args:
        maps: `(batch, height, width)`.
        boxes: `(batch, 4)`: top, left, height, width as fractions of the map, in [0, 1].
        flips: `(batch,)` bool, mirror left and right after the crop.
        size: height and width of the result.

    Returns:
        `(batch, *size)`. Output cells that nothing of the map falls into are 0.

    Raises:
        ValueError: the shapes disagree.
    """
    maps = as_float(maps)
    _check_boxes(maps, boxes)
    top, left, height, width = boxes.to(maps).unbind(dim=1)
    rows = _resampling(top, height, num_cells=maps.shape[1], num_outputs=size[0])
    columns = _resampling(left, width, num_cells=maps.shape[2], num_outputs=size[1])
    columns = torch.where(flips.to(maps.device).bool()[:, None, None], columns.flip(1), columns)
    return rows @ maps @ columns.transpose(1, 2)


def crop_mass(maps: Tensor, boxes: Tensor) -> Tensor:
    """Share of each map's mass inside its box; a cell that the box cuts counts by the share of it inside.

    Args:
        maps: `(batch, height, width)`, non-negative; a map without mass counts as uniform (see `to_density`).
        boxes: `(batch, 4)`: top, left, height, width as fractions of the map, in [0, 1].

    Returns:
        `(batch,)` in [0, 1].

    Raises:
        ValueError: the shapes disagree.
    """
    _check_boxes(maps, boxes)
    density = to_density(maps)
    top, left, height, width = boxes.to(density).unbind(dim=1)
    rows = _overlap(top, height, density.shape[1])
    columns = _overlap(left, width, density.shape[2])
    return torch.einsum("bh,bhw,bw->b", rows, density, columns)


def encode_map(maps: Tensor, *, step: int = 1) -> Tensor:
    """Quantise maps to 8 bits by square-root companding: `q = s * round(floor(255 / s) * sqrt(m / max(m)))`.

    The square root spends the codes where densities have most of their area, near zero. Only ratios within a map
    survive.

    Args:
        maps: `(..., height, width)`, non-negative; unusable maps count as uniform (see `to_density`).
        step: s; coarser codes take fewer bytes when they are compressed.

    Returns:
        `(..., height, width)` uint8; the peak is 255, or the largest multiple of `step` below.
    """
    density = to_density(maps)
    peak = density.amax(dim=(-2, -1), keepdim=True)
    return (MAX_CODE // step * (density / peak).sqrt()).round().mul(step).to(torch.uint8)


def decode_map(codes: Tensor) -> Tensor:
    """Undo `encode_map`: `p = (q / 255)^2`, scaled to sum 1; all-zero codes give the uniform density.

    Args:
        codes: `(..., height, width)` uint8.

    Returns:
        `(..., height, width)` float32 densities.
    """
    return to_density((codes.float() / MAX_CODE).square())


def encode_map_np(maps: np.ndarray, *, step: int = 1) -> np.ndarray:
    """`encode_map` for numpy arrays."""
    return encode_map(torch.from_numpy(np.ascontiguousarray(maps)), step=step).numpy()


def decode_map_np(codes: np.ndarray) -> np.ndarray:
    """`decode_map` for numpy arrays, in plain numpy: what reads sample by sample calls it once for each."""
    squares = np.square(codes.astype(np.float32))
    total = squares.sum(axis=(-2, -1), keepdims=True)
    uniform = np.float32(1.0 / (codes.shape[-2] * codes.shape[-1]))
    return np.divide(squares, total, out=np.full_like(squares, uniform), where=total > 0)


def inside_image(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which points `(num_points, 2)` of x, y lie in an image of `size` (height, width): `(num_points,)` bool."""
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    x, y = points.T
    return (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])


def fixation_density(points: np.ndarray, *, size: tuple[int, int], sigma: float, grid: tuple[int, int]) -> np.ndarray:
    """Sum of Gaussians at the fixations, integrated over the cells of a grid, mirrored at the border, scaled to sum 1.

    Each fixation stands at the centre of the pixel it falls in. Mass that a Gaussian would lose over the border is
    mirrored back, as `scipy.ndimage.gaussian_filter` does by default. Points outside the image are ignored
    (`inside_image` tells which); with no point left the density is uniform.

    Args:
        points: `(num_points, 2)` x, y in pixels of the image, counted from 0.
        size: height and width of the image in pixels.
        sigma: standard deviation of the Gaussian in pixels of the image.
        grid: height and width of the result.

    Returns:
        `grid` float32, sum 1.

    Raises:
        ValueError: sigma is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0 pixels, got {sigma}")
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    centres = torch.from_numpy(np.floor(points[inside_image(points, size)]) + 0.5)
    columns = _gaussian_cells(centres[:, 0], length=size[1], sigma=sigma, num_cells=grid[1])
    rows = _gaussian_cells(centres[:, 1], length=size[0], sigma=sigma, num_cells=grid[0])
    return to_density(rows.T @ columns).float().numpy()


def _gaussian_cells(centres: Tensor, *, length: int, sigma: float, num_cells: int) -> Tensor:
    """Mass of Gaussians, mirrored at both ends, in the cells of an axis of `length` pixels: `(centres, num_cells)`."""
    edges = torch.linspace(0, length, num_cells + 1, dtype=torch.float64)
    images = torch.stack([centres, -centres, 2 * length - centres])
    cumulative = 0.5 * torch.erf((edges - images[..., None]) / (sigma * math.sqrt(2)))
    return cumulative.diff(dim=-1).sum(dim=0)


def center_bias(grid: tuple[int, int], *, sigma: float = 0.2) -> Tensor:
    """Gaussian centre prior for when no data are at hand; `attention.baselines` measures the real one.

    Args:
        grid: height and width of the result.
        sigma: standard deviation as a share of the side, along each axis [our choice; OSIE has 0.21 and 0.20].

    Returns:
        `grid` float32 density, sum 1.
    """
    rows, columns = (
        torch.exp(-0.5 * (((torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5) / sigma).square()) for n in grid
    )
    return to_density(rows[:, None] * columns).float()
