"""Ranks of a few values among the pixels of one map, on a CPU: how many pixels are below each, how many not above.

Sorting all pixels would do, and does where nothing better applies. But its time goes into the order of pixels that lie
between the same two values, which nobody asks for. So the pixels are counted by cells. The bits of a float that is
not negative, read as an integer, rise with it: its leading bits are its cell. A table tells, for each cell, how many of
the values lie below it; only pixels in a cell that holds one of the values are compared with it. Every count is exact.
"""

import numpy as np
import torch

CELL_BITS = 16
BLOCK = 65536
# Entries of the table that are no number of values: the cell holds one; the cell holds the least pixel alone.
MIXED, LEAST = 255, 254
MOST_VALUES = 253
# For fewer a sort takes no longer.
FEWEST_PIXELS = 2**14
# Above this share of pixels in mixed cells (a map of few levels, say) sorting is faster.
MOST_MIXED = 1 / 8

Ranks = tuple[np.ndarray, np.ndarray]


def _ranks_in_order(ordered: np.ndarray, values: np.ndarray) -> Ranks:
    return ordered.searchsorted(values), ordered.searchsorted(values, side="right")


class Counter:
    """Ranks values among pixels; keeps working arrays from map to map, as fresh memory costs as much as the work."""

    def __init__(self, num_pixels: int, dtype: np.dtype) -> None:
        """Make the working arrays for maps of this many pixels."""
        self.ordered = np.empty(num_pixels, dtype)
        self.integer = np.dtype(f"i{self.ordered.itemsize}")
        self.entries = np.empty(num_pixels, np.uint8)
        self.cells = np.empty(min(BLOCK, num_pixels), self.integer)

    def ranks(self, pixels: np.ndarray, values: np.ndarray) -> Ranks:
        """Count the pixels below each value, and those not above it.

        Args:
            pixels: `(num_pixels,)`.
            values: `(num_values,)` ascending.

        Returns:
            Two `(num_values,)` int64.
        """
        known = np.unique(values[np.isfinite(values)])
        if len(pixels) >= FEWEST_PIXELS and 0 < len(known) <= MOST_VALUES:
            counts = self._by_table(pixels, known)
            if counts is not None:
                place = known.searchsorted(values)
                below, up_to = (np.append(each, len(pixels))[place] for each in counts)
                return below, up_to
        np.copyto(self.ordered, pixels)
        self.ordered.sort()
        return _ranks_in_order(self.ordered, values)

    def ranks_among(self, pixels: np.ndarray, index: np.ndarray, usable: np.ndarray, values: np.ndarray) -> Ranks:
        """`ranks` among some of the pixels: those at `index`, each in range, where `usable`, both `(num,)`."""
        chosen = self.ordered[: len(index)] if len(index) <= len(self.ordered) else np.empty(len(index), pixels.dtype)
        # The mode "raise" would take the way over a copy.
        np.take(pixels, index, out=chosen, mode="wrap")
        np.copyto(chosen, np.inf, where=~usable)
        chosen.sort()
        return _ranks_in_order(chosen, values)

    def _by_table(self, pixels: np.ndarray, values: np.ndarray) -> Ranks | None:
        """Rank distinct values, or return None where sorting is the way."""
        bits, asked = pixels.view(self.integer), values.view(self.integer).astype(np.int64)
        least, most = int(bits.min()), int(bits.max())
        # A sign (that of -0 too) would turn the order around; a NaN or an infinity makes no metric.
        if least < 0 or most >= int(np.array(np.inf, pixels.dtype).view(self.integer)):
            return None
        if asked[0] < least or asked[-1] > most:
            return None
        shift = max(0, (most - least).bit_length() - CELL_BITS)
        # The least pixel has cell 0 to itself: backgrounds hold one value, which may be one of those asked for.
        offset = least + 1 - (1 << shift)
        at, last = (asked - offset) >> shift, (most - offset) >> shift
        table = np.repeat(np.arange(len(values) + 1, dtype=np.uint8), np.diff([0, *(at + 1), last + 1]))
        table[at], table[0] = MIXED, LEAST
        self._look_up(bits, torch.from_numpy(table), offset=offset, shift=shift)
        histogram = torch.bincount(torch.from_numpy(self.entries), minlength=256).numpy()
        if histogram[MIXED] > MOST_MIXED * len(pixels):
            return None
        mixed = np.sort(pixels[np.flatnonzero(self.entries == MIXED)])
        counted = histogram[: len(values)].cumsum()
        below, up_to = (counted + among_mixed for among_mixed in _ranks_in_order(mixed, values))
        return below + np.where(at > 0, histogram[LEAST], 0), up_to + histogram[LEAST]

    def _look_up(self, bits: np.ndarray, table: torch.Tensor, *, offset: int, shift: int) -> None:
        for start in range(0, len(bits), BLOCK):
            block = bits[start : start + BLOCK]
            cells = self.cells[: len(block)]
            np.right_shift(np.subtract(block, offset, out=cells), shift, out=cells)
            out = torch.from_numpy(self.entries[start : start + BLOCK])
            torch.index_select(table, 0, torch.from_numpy(cells), out=out)
