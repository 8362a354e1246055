"""The order of several sets with weights: a pure function of (seed, position), like the order of each set.

Weights become whole numbers, 0.7 and 0.3 become 7 and 3. Positions are cut into blocks of their sum, here of 10, and in
each block the sets take turns in an order of that block's own: every block holds exactly 7 and 3. So the number of
positions before `p` that belong to a set follows from `p` alone, and with it the place in that set's own endless order.
Resuming, on any number of ranks, needs the position and nothing else.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from engine.errors import InputError
from shards.order import SampleOrder, stable_permutation

MAX_BLOCK = 1 << 16
KEPT_BLOCKS = 4
SEEDS_APART = 1 << 64


def exact_shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers that stand to each other as the weights do, taken as they are written.

    Raises:
        InputError: weights that are not above 0, or that need a block of more than `MAX_BLOCK` positions.
    """
    if not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"data.train: weights {list(weights)}: give numbers above 0")
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    shares = [int(fraction * scale) for fraction in fractions]
    common = math.gcd(*shares)
    shares = [share // common for share in shares]
    if sum(shares) > MAX_BLOCK:
        raise InputError(
            f"data.train: weights {list(weights)} come out exactly only over {sum(shares)} images: give rounder ones"
        )
    return shares


class MixedOrder(SampleOrder):
    """Order of the samples of several sets, whose shards are numbered through. Of one set it is that set's order.

    Args:
        sizes: for each set the samples in each of its shards, `(shards,)`.
        weights: one for each set, above 0.
        seed, window: see `SampleOrder`.

    Raises:
        InputError: see `exact_shares` and `SampleOrder`.
    """

    def __init__(self, sizes: Sequence[np.ndarray], *, weights: Sequence[float], seed: int, window: int = 16) -> None:
        super().__init__(np.concatenate([np.asarray(one, dtype=np.int64) for one in sizes]), seed=seed, window=window)
        self.shares = exact_shares(weights)
        self.block = sum(self.shares)
        # sets of the same sizes shall not go through their samples in step
        self.orders = [
            SampleOrder(one, seed=seed + number * SEEDS_APART, window=window) for number, one in enumerate(sizes)
        ]
        self._first_shards = np.cumsum([0, *(len(one) for one in sizes)])
        self._turns = np.repeat(np.arange(len(self.shares)), self.shares)
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()

    def sets(self, start: int, stop: int) -> np.ndarray:
        """Number of the set that each of the positions `start` to `stop - 1` takes from, `(stop - start,)`."""
        if len(self.orders) == 1:
            return np.zeros(stop - start, dtype=np.int64)
        first, last = start // self.block, -(-stop // self.block)
        parts = [np.zeros(0, dtype=np.int64), *(self._turns_of(block) for block in range(first, last))]
        return np.concatenate(parts)[start - first * self.block : stop - first * self.block]

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Samples at positions `start` to `stop - 1`: `(stop - start, 3)` int64 of (epoch of its set, shard, row)."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions {start} to {stop} are no range")
        taken = self.sets(start, stop)
        before = self.sets(start - start % self.block, start)
        result = np.zeros((stop - start, 3), dtype=np.int64)
        for number, (order, share) in enumerate(zip(self.orders, self.shares, strict=True)):
            mine = taken == number
            begin = start // self.block * share + int((before == number).sum())
            rows = order.slice(begin, begin + int(mine.sum()))
            result[mine] = rows + np.array([0, self._first_shards[number], 0])
        return result

    def _turns_of(self, block: int) -> np.ndarray:
        """The sets of one block in their order."""
        if block not in self._blocks:
            self._blocks[block] = self._turns[stable_permutation(self.block, self.seed, block, "mixture")]
            while len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[block]
