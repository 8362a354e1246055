"""Do fixations and shipped maps belong together? Catches swapped axes, positions counted from 0, and mixed-up files."""

from collections.abc import Iterable

import numpy as np
from scipy.ndimage import gaussian_filter

from engine.errors import InputError

# A map made from its own fixations scores an NSS well above 1; unrelated maps stay near what the centre bias gives.
MIN_NSS = 0.3
SWAP_MARGIN = 0.1
MIN_FIT = 0.9


def check_agreement(pairs: Iterable[tuple[np.ndarray, np.ndarray]], *, sigma: float, where: str) -> None:
    """Compare fixations with the maps that were shipped for the same images.

    Args:
        pairs: `(num_points, 2)` pixel indices x, y counted from 0, and the map `(height, width)`.
        sigma: pixels of the Gaussian that made the maps.
        where: the gaze folder or file, for the message.

    Raises:
        InputError: the fixations fit better with x and y exchanged, or shifted by one pixel, or not at all.
    """
    straight, swapped, shifts = [], [], []
    for points, shipped in pairs:
        scored = _zscore(shipped)
        straight.append(_mean_at(scored, points))
        swapped.append(_mean_at(scored, points[:, ::-1]))
        shift = _shift(points, shipped, sigma=sigma)
        if shift is not None:
            shifts.append(shift)
    if not straight:
        return
    as_read, exchanged = float(np.mean(straight)), float(np.mean(swapped))
    if exchanged > as_read + SWAP_MARGIN:
        raise InputError(
            f"{where}: x and y look swapped: the shipped maps score NSS {as_read:.2f} at the fixations as read and "
            f"{exchanged:.2f} with the axes exchanged: is it the other edition? see --source.edition"
        )
    if as_read < MIN_NSS:
        raise InputError(
            f"{where}: the shipped maps score only NSS {as_read:.2f} at the fixations: gaze and maps belong to "
            "different images or editions; unpack both from one release, or give --source.compare_maps false"
        )
    if shifts and (np.abs(np.median(shifts, axis=0) - 1) < 0.4).all():
        raise InputError(
            f"{where}: every fixation lies one pixel up and left of the shipped maps: these files count from 0, the "
            "release counts from 1; take the original files, or add 1 to x and y"
        )


def _zscore(values: np.ndarray) -> np.ndarray:
    deviation = float(values.std())
    return (values - values.mean()) / deviation if deviation > 0 else np.zeros_like(values)


def _mean_at(values: np.ndarray, points: np.ndarray) -> float:
    """Mean value at the points; a point outside the map counts with the least value."""
    height, width = values.shape
    x, y = points.T
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if not len(points):
        return 0.0
    found = np.full(len(points), float(values.min()))
    found[inside] = values[y[inside], x[inside]]
    return float(found.mean())


def _shift(points: np.ndarray, shipped: np.ndarray, *, sigma: float) -> tuple[float, float] | None:
    """Least-squares shift (x, y) in pixels from the fixations' own map to the shipped one; None when they fit badly.

    To first order a map shifted by d is `D - d . grad D`, so d follows from a linear fit of the shipped map.
    """
    height, width = shipped.shape
    x, y = points.T
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    counts = np.zeros(shipped.shape)
    np.add.at(counts, (y[inside], x[inside]), 1)
    own = gaussian_filter(counts, sigma, mode="constant")
    grad_y, grad_x = np.gradient(own)
    design = np.column_stack([part.ravel() for part in (own, grad_x, grad_y, np.ones_like(own))])
    target = shipped.astype(np.float64).ravel()
    weights, *_ = np.linalg.lstsq(design, target, rcond=None)
    residual = target - design @ weights
    spread = float(((target - target.mean()) ** 2).sum())
    if weights[0] <= 0 or spread <= 0 or 1 - float((residual**2).sum()) / spread < MIN_FIT:
        return None
    return -float(weights[1] / weights[0]), -float(weights[2] / weights[0])
