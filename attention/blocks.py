"""Sums over the pixels of maps, taken in blocks that stay in a CPU's cache.

A batch of full-size maps is larger than any cache, and a dozen passes over it spend their time on memory. Block by
block the same passes run several times faster. On an accelerator, and where a gradient is wanted, one block holds
everything.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from attention.maps import as_float

# Above this torch's operators split their work: over blocks this small, threads would only wait for each other.
ONE_THREAD_ELEMENTS = 32768


class Maps:
    """Maps `(batch, height, width)` and what metrics need of them, each computed once and only when asked for."""

    def __init__(self, maps: Tensor, *, minmax: bool = False) -> None:
        """Wrap maps; with `minmax` the density starts from the least value even where that is above 0."""
        self.maps = as_float(maps)
        self.size = (maps.shape[1], maps.shape[2])
        self.num_pixels = maps.shape[1] * maps.shape[2]
        self.flat = self.maps.flatten(1)
        self.minmax = minmax

    def blocks(self) -> Iterator[Tensor]:
        """Yield the pixels `(batch, block)`, the same split for all maps of one shape and kind."""
        if self.flat.device.type != "cpu" or torch.is_grad_enabled():
            return iter([self.flat])
        elements = ONE_THREAD_ELEMENTS * (2 if torch.get_num_threads() == 1 else 1)
        return iter(self.flat.split(max(1, elements // max(len(self.flat), 1)), dim=1))

    @cached_property
    def _summary(self) -> tuple[Tensor, Tensor, Tensor]:
        parts = [(block.amin(dim=1), block.amax(dim=1), block.sum(dim=1)) for block in self.blocks()]
        low, high, total = (torch.stack(each, dim=1) for each in zip(*parts, strict=True))
        return low.amin(dim=1), high.amax(dim=1), total.sum(dim=1, dtype=torch.float64)

    @property
    def finite(self) -> Tensor:
        """Which maps have a finite sum: `(batch,)` bool."""
        return torch.isfinite(self._summary[2])

    @property
    def constant(self) -> Tensor:
        """Which maps hold one value, told by the values, as the spread of a constant is rounding noise: `(batch,)`."""
        return self._summary[0] == self._summary[1]

    @cached_property
    def mean(self) -> Tensor:
        """Mean of each map: `(batch, 1)`."""
        return (self._summary[2] / self.num_pixels).to(self.flat)[:, None]

    @cached_property
    def _scaling(self) -> tuple[Tensor, Tensor, bool]:
        low, _, total = self._summary
        shift = -low if self.minmax else -low.clamp(max=0)
        total = total + shift.double() * self.num_pixels
        empty = total == 0
        shift, total = torch.where(empty, shift + 1, shift), torch.where(empty, self.num_pixels, total)
        shifts = shift.device.type != "cpu" or torch.is_grad_enabled() or bool(shift.any())
        return shift[:, None], total.reciprocal().to(self.flat)[:, None], shifts

    def density(self, values: Tensor) -> Tensor:
        """Turn some of the maps' values `(batch, any)` into densities, as `to_density` except that NaN stays NaN."""
        shift, scale, shifts = self._scaling
        return ((values + shift) if shifts else values) * scale


class Block:
    """The pixels of one block of maps, as densities and centred, each computed once."""

    def __init__(self, maps: Maps, values: Tensor) -> None:
        self._maps, self._values = maps, values

    @cached_property
    def density(self) -> Tensor:
        return self._maps.density(self._values)

    @cached_property
    def centred(self) -> Tensor:
        return self._values - self._maps.mean


def block_sums(terms: Sequence[Callable[..., Tensor]], *maps: Maps) -> list[Tensor]:
    """Sum each of several terms over all blocks.

    Args:
        terms: each takes one `Block` of every one of `maps` and returns that block's share of a sum, `(batch,)`.
        maps: all of one shape.

    Returns:
        Per term `(batch,)` float64.
    """
    shares: list[list[Tensor]] = [[] for _ in terms]
    for values in zip(*(each.blocks() for each in maps), strict=True):
        blocks = [Block(each, block) for each, block in zip(maps, values, strict=True)]
        for share, term in zip(shares, terms, strict=True):
            share.append(term(*blocks))
    return [torch.stack(share, dim=1).sum(dim=1, dtype=torch.float64) for share in shares]
