"""Maps and sums over their pixels, taken the way that suits the device.

On a CPU, where no gradient is wanted, that is `attention.rows`. On an accelerator, and where a gradient is wanted, the
same sums are torch operators over the whole batch.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from attention.maps import as_float
from attention.rows import PRODUCTS, Look, Numbers, SumsOfRow


class Maps:
    """Maps `(batch, height, width)` and what metrics need of them, each computed once and only when asked for."""

    def __init__(self, maps: Tensor, *, minmax: bool = False) -> None:
        """Wrap maps; with `minmax` the density starts from the least value even where that is above 0."""
        self.size = (maps.shape[1], maps.shape[2])
        self.num_pixels = maps.shape[1] * maps.shape[2]
        self.flat = as_float(maps).flatten(1)
        self.minmax = minmax

    @property
    def in_blocks(self) -> bool:
        """Whether these maps are read block by block."""
        return self.flat.device.type == "cpu" and not (torch.is_grad_enabled() and self.flat.requires_grad)

    @cached_property
    def rows(self) -> np.ndarray:
        """The maps as numpy sees them: `(batch, pixels)`."""
        return self.flat.detach().contiguous().numpy()

    @cached_property
    def _looks(self) -> dict[int, Look]:
        return {}

    def numbers(self, row: int) -> Numbers:
        """What the pixels of one map are centred and scaled with."""
        if row not in self._looks:
            self._looks[row] = Look.at(self.rows[row])
        return Numbers.of(self._looks[row], num_pixels=self.num_pixels, minmax=self.minmax)

    @cached_property
    def _summary(self) -> tuple[Tensor, Tensor, Tensor]:
        """Least value, sum (float64) and whether all values are one, of each map: `(batch,)`."""
        if not self.in_blocks:
            low = self.flat.amin(dim=1)
            return low, self.flat.sum(dim=1, dtype=torch.float64), low == self.flat.amax(dim=1)
        for row in range(len(self.flat)):
            self.numbers(row)
        looks = torch.tensor([self._looks[row] for row in range(len(self.flat))], dtype=torch.float64).view(-1, 3)
        return looks[:, 0].to(self.flat), looks[:, 1], looks[:, 2].bool()

    @property
    def finite(self) -> Tensor:
        """Which maps have a finite sum: `(batch,)` bool."""
        return torch.isfinite(self._summary[1])

    @property
    def constant(self) -> Tensor:
        """Which maps hold one value, told by the values, as the spread of a constant is rounding noise: `(batch,)`."""
        return self._summary[2]

    @cached_property
    def mean(self) -> Tensor:
        """Mean of each map: `(batch, 1)` float64."""
        return self._summary[1][:, None] / self.num_pixels

    @cached_property
    def scaling(self) -> tuple[Tensor, Tensor]:
        """What makes a density of a map, `(m + shift) * scale`: two `(batch, 1)` float64."""
        low, total, _ = self._summary
        shift = -(low if self.minmax else low.clamp(max=0)).double()
        total = total + shift * self.num_pixels
        empty = total == 0
        shift, total = torch.where(empty, shift + 1, shift), torch.where(empty, self.num_pixels, total)
        return shift[:, None], total.reciprocal()[:, None]

    def density(self, values: Tensor) -> Tensor:
        """Turn some of the maps' values `(batch, any)` into densities, as `to_density` except that NaN stays NaN."""
        shift, scale = (each.to(values) for each in self.scaling)
        return (values + shift) * scale


T = TypeVar("T")


class PerThread(Generic[T]):
    """An object for each thread that asks, such as working arrays that two threads must not share."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._local = make, threading.local()

    def get(self) -> T:
        """This thread's object, made when it is first asked for."""
        if not hasattr(self._local, "value"):
            self._local.value = self._make()
        return self._local.value


class Task(Protocol):
    """Something to be found in the pixels of maps."""

    def visit(self, row: int) -> None:
        """Look at one map; maps come in any order, from several threads at a time."""


def visit(tasks: Sequence[Task], maps: Maps) -> None:
    """Let tasks look at map after map on a CPU: all at one, which is then in the cache, before the next.

    The maps are shared out among as many threads as torch uses.
    """
    if maps.flat.device.type != "cpu":
        return

    def look(rows: np.ndarray) -> None:
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for row in rows.tolist():
                for task in tasks:
                    task.visit(row)

    rows = np.arange(len(maps.flat))
    count = min(torch.get_num_threads(), len(rows))
    if count <= 1:
        look(rows)
    else:
        _ = maps.rows  # made once, before threads ask for it
        threads = torch.get_num_threads()
        try:
            # one torch thread inside each of ours: teams of both would fight over the cores
            with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(look, (rows[i::count] for i in range(count))))
        finally:
            torch.set_num_threads(threads)


class PixelSums:
    """Sums over the pixels of maps; a task for `visit`."""

    def __init__(self, names: Sequence[str], *maps: Maps, eps: float = 0.0) -> None:
        """Say what to sum.

        Args:
            names: `square`, of the first centred map; `target_square`, of the second; `product` of both; `overlap`, the
                lesser of the two densities `p` and `q`; `divergence`, `q * log(eps + q / (p + eps))`.
            maps: one or two, of one shape and type.
            eps: of the divergence.
        """
        self._names, self._maps, self._eps = names, maps, eps
        self._of_row: PerThread[SumsOfRow] | None = None
        if self._in_blocks:
            dtype = maps[0].rows.dtype
            self._of_row = PerThread(lambda: SumsOfRow(names, eps=eps, dtype=dtype))
            self._sums = torch.zeros((len(maps[0].flat), len(names)), dtype=torch.float64)

    @property
    def _in_blocks(self) -> bool:
        return all(each.in_blocks for each in self._maps)

    def visit(self, row: int) -> None:
        """Look at one map."""
        if self._of_row is not None:
            numbers = [each.numbers(row) for each in self._maps]
            sums = self._of_row.get()([each.rows[row] for each in self._maps], numbers)
            self._sums[row] = torch.tensor(sums, dtype=torch.float64)

    def result(self) -> list[Tensor]:
        """Return per name `(batch,)` float64."""
        if self._of_row is not None:
            return list(self._sums.unbind(dim=1))
        centred = [each.flat - each.mean.to(each.flat) for each in self._maps]
        density = [each.density(each.flat) for each in self._maps]
        return [self._of_batch(name, centred, density).double() for name in self._names]

    def _of_batch(self, name: str, centred: Sequence[Tensor], density: Sequence[Tensor]) -> Tensor:
        if name in PRODUCTS:
            first, second = PRODUCTS[name]
            return torch.linalg.vecdot(centred[first], centred[second])
        prediction, target = density
        if name == "overlap":
            return torch.minimum(prediction, target).sum(dim=1)
        return torch.linalg.vecdot(target, (target / (prediction + self._eps) + self._eps).log())


def pixel_sums(names: Sequence[str], *maps: Maps, eps: float = 0.0) -> list[Tensor]:
    """`PixelSums` with nothing beside them: per name `(batch,)` float64."""
    sums = PixelSums(names, *maps, eps=eps)
    visit([sums], maps[0])
    return sums.result()
