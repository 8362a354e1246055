"""Sums over the pixels of one prediction and its target on a CPU, in numpy; `attention.blocks` is the door to it.

Maps are read block by block: a dozen passes over whole maps would spend their time on memory and on fresh arrays, while
a block and the working arrays stay in a core's cache. numpy's and OpenCV's loops are up to eight times faster there
than torch's on one thread.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

# Lines of a block. Above some 10,000 numbers OpenBLAS wakes its threads for a dot product, which takes longer than it.
LINE = 8192
# Lines: the blocks of a prediction and its target and two working arrays fill 1 MB of a core's cache in float32.
BLOCK = 8
# Sums of products of the centred maps, by the places of the factors: 0 the prediction, 1 the target.
PRODUCTS = {"square": (0, 0), "target_square": (1, 1), "product": (0, 1)}
# Outside these bounds a constant like `eps` could leave the range of float32 where it is scaled.
USUAL_SCALES = (1e-12, 1e12)


class Look(NamedTuple):
    """What one look at a map tells."""

    low: float
    total: float
    constant: bool

    @classmethod
    def at(cls, row: np.ndarray) -> "Look":
        """Look at a map `(pixels,)`."""
        low, total = float(row.min()), _sum(row)
        # The pixels of a constant map sum to their number times the least: rarely is a further look needed.
        nearly = abs(total - low * len(row)) <= 1e-3 * abs(total)
        return cls(low, total, nearly and low == float(row.max()))


class Numbers(NamedTuple):
    """What the pixels of one map are centred and scaled with: a density is `(m + shift) * scale`."""

    mean: float
    shift: float
    scale: float

    @classmethod
    def of(cls, look: Look, *, num_pixels: int, minmax: bool) -> "Numbers":
        """Take the numbers of a map; see `attention.blocks.Maps.scaling`."""
        shift = -look.low if minmax else -min(look.low, 0.0)
        total = look.total + shift * num_pixels
        if total == 0:
            shift, total = shift + 1, num_pixels
        return cls(look.total / num_pixels, shift, 1 / total)


def _sum(values: np.ndarray) -> float:
    # In float64, and yet several times faster than numpy's own.
    return cv2.sumElems(values)[0]


def _dot(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.add.reduce(np.vecdot(first, second), dtype=np.float64))


def _blocks(row: np.ndarray) -> list[np.ndarray]:
    """Cut a map `(pixels,)` into blocks `(lines, pixels of a line)`; the last is one shorter line."""
    whole = len(row) // LINE * LINE
    lines = row[:whole].reshape(-1, LINE)
    blocks = [lines[start : start + BLOCK] for start in range(0, len(lines), BLOCK)]
    return [*blocks, row[None, whole:]] if whole < len(row) else blocks


class SumsOfRow:
    """Sums over the pixels of a prediction and its target, or of a prediction alone."""

    def __init__(self, names: Sequence[str], *, eps: float, dtype: np.dtype) -> None:
        """Make the working arrays, which all maps share; see `attention.blocks.PixelSums` for the names."""
        self.products = {name: places for name, places in PRODUCTS.items() if name in names}
        self.names, self.eps = names, eps
        self.work = np.empty((3, BLOCK, LINE), dtype)

    def __call__(self, rows: Sequence[np.ndarray], numbers: Sequence[Numbers]) -> list[float]:
        """Sum over maps `(pixels,)`, in the order of the names."""
        sums = dict.fromkeys(self.names, 0.0)
        for blocks in zip(*map(_blocks, rows), strict=True):
            for name, (first, second) in self.products.items():
                sums[name] += _dot(blocks[first], blocks[second])
            if len(self.products) < len(sums):
                self._add_densities(sums, blocks, numbers)
        if self.products:
            sums |= self._centred(sums, rows, numbers)
        return list(sums.values())

    def _workspace(self, block: np.ndarray) -> np.ndarray:
        """Working arrays of the shape of a block."""
        return self.work[:, : block.shape[0], : block.shape[1]]

    def _centred(
        self, sums: dict[str, float], rows: Sequence[np.ndarray], numbers: Sequence[Numbers]
    ) -> dict[str, float]:
        """Sums of products of the centred maps out of those of the maps as they are."""
        num_pixels = len(rows[0])
        centred, flat = {}, False
        for name, (first, second) in self.products.items():
            centred[name] = sums[name] - num_pixels * numbers[first].mean * numbers[second].mean
            flat |= first == second and not centred[name] > sums[name] / 2
        # A difference of near-equal numbers has lost digits, and squares can leave the range of float32.
        return self._centred_first(rows, numbers) if flat else centred

    def _centred_first(self, rows: Sequence[np.ndarray], numbers: Sequence[Numbers]) -> dict[str, float]:
        """The same, slower and in float64."""
        sums = dict.fromkeys(self.products, 0.0)
        for blocks in zip(*map(_blocks, rows), strict=True):
            centred = [
                np.subtract(block, each.mean, dtype=np.float64) for block, each in zip(blocks, numbers, strict=True)
            ]
            for name, (first, second) in self.products.items():
                sums[name] += _dot(centred[first], centred[second])
        return sums

    def _add_densities(self, sums: dict[str, float], blocks: Sequence[np.ndarray], numbers: Sequence[Numbers]) -> None:
        """Add a block's share of the overlap and of the divergence; destroys the working arrays."""
        (_, shift, scale), (_, target_shift, unit) = numbers
        prediction, target, lesser = self._workspace(blocks[0])
        if target_shift == 0 and USUAL_SCALES[0] < unit < USUAL_SCALES[1]:
            # Both densities in units of the target's: its pixels serve as they are.
            target = blocks[1]
        else:
            np.multiply(np.add(blocks[1], target_shift, out=target), unit, out=target)
            unit = 1.0
        if shift:
            np.add(blocks[0], shift, out=prediction)
        np.multiply(prediction if shift else blocks[0], scale / unit, out=prediction)
        if "overlap" in sums:
            sums["overlap"] += unit * _sum(np.minimum(prediction, target, out=lesser))
        if "divergence" in sums:
            np.add(prediction, self.eps / unit, out=prediction)
            ratio = np.divide(target, prediction, out=prediction)
            np.add(ratio, self.eps, out=ratio)
            cv2.log(ratio, ratio)
            sums["divergence"] += unit * _dot(target, ratio)
