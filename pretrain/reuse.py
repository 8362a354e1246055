"""Memory that is used again as soon as nobody holds it any more.

Fresh memory costs a page fault every 4 kB, and the kernel clears each page: for a batch of views that takes as long as
reading its files.
"""

import sys
from typing import Any

import numpy as np

MAX_KEPT = 4
# References to an array that only its pool holds: the pool's list, the loop variable, the argument of getrefcount.
_POOL_ALONE = 3


class ArrayPool:
    """Arrays of one kind, made when needed.

    A tensor made of an array by `torch.from_numpy`, and every view of either, keeps a reference to the array, so an
    array is given out again only after its last user is gone. Pickles empty.
    """

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": []}

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of any content."""
        for array in self._kept:
            if array.shape == shape and array.dtype == dtype and sys.getrefcount(array) == _POOL_ALONE:
                return array
        array = np.empty(shape, dtype=dtype)
        self._kept = [array, *self._kept[: MAX_KEPT - 1]]
        return array
