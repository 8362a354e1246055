"""The order of samples: a pure function of (seed, epoch, shard sizes), and nothing else.

Positions run on over the epochs: position `p` belongs to epoch `p // num_samples`. In each epoch the shards are
permuted, cut into windows of `window` shards, and the samples of a window are shuffled together; each window is a
permutation of its samples and the windows partition the epoch, so an epoch holds every sample exactly once. A global
batch is a range of positions and a rank takes an equal part of it, so neither ranks nor workers nor stops can change
which samples a step uses.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from engine.errors import InputError

KEPT_WINDOWS = 3
MAX_WINDOW = 64  # shards that a reader keeps open: of a wider window it would open one anew for almost every sample


def stable_permutation(count: int, *key: int | str) -> np.ndarray:
    """Permutation of `range(count)` fixed by `key`, the same for every version of numpy.

    numpy promises stable raw bits of a bit generator but not of `Generator.permutation`, and a resumed run may meet a
    newer numpy: so the raw bits are sorted here.
    """
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    bits = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    return np.argsort(bits.random_raw(count), kind="stable") if count else np.zeros(0, dtype=np.int64)


class SampleOrder:
    """Which sample stands at which position, for all epochs.

    Args:
        shard_sizes: samples in each shard, `(shards,)`.
        seed: any integer.
        window: shards whose samples are shuffled together, `MAX_WINDOW` at most where the set has more; memory grows
            with the samples of one window.
        shuffle: False keeps the order on disk, in every epoch.

    Raises:
        InputError: no samples, negative sizes, or a window below 1 or too wide.
    """

    def __init__(self, shard_sizes: np.ndarray, *, seed: int, window: int = 16, shuffle: bool = True) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        if self.shard_sizes.ndim != 1 or (self.shard_sizes < 0).any():
            raise InputError("shard sizes: a list of counts of 0 or more is needed")
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples == 0:
            raise InputError("shard sizes: the set holds no samples; pack a set with at least one")
        if window < 1:
            raise InputError(f"window: {window} shards; give 1 or more")
        if shuffle and min(window, len(self.shard_sizes)) > MAX_WINDOW:
            raise InputError(
                f"window: {window} shards are more than the {MAX_WINDOW} that are kept open: give {MAX_WINDOW} or "
                "fewer, of larger shards where samples must be mixed more widely"
            )
        self.seed, self.window, self.shuffle = seed, window, shuffle
        self._epoch_key: int | None = None
        self._shards = self._window_starts = np.zeros(0, dtype=np.int64)
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Samples at positions `start` to `stop - 1`: `(stop - start, 3)` int64 of (epoch, shard, row)."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions {start} to {stop} are no range")
        parts = [np.zeros((0, 3), dtype=np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            starts = self._plan(epoch)
            number = int(np.searchsorted(starts, offset, side="right")) - 1
            begin, end = int(starts[number]), int(starts[number + 1])
            count = min(stop - start, end - offset)
            rows = self._window(epoch, number)[offset - begin : offset - begin + count]
            parts.append(np.column_stack([np.full(count, epoch, dtype=np.int64), rows]))
            start += count
        return np.concatenate(parts)

    def _plan(self, epoch: int) -> np.ndarray:
        """Start of each window within the epoch, with the total at the end; permutes the shards when needed."""
        if epoch != self._epoch_key:
            count = len(self.shard_sizes)
            self._shards = stable_permutation(count, self.seed, epoch, "shards") if self.shuffle else np.arange(count)
            totals = np.concatenate([[0], np.cumsum(self.shard_sizes[self._shards])])
            ends = np.append(np.arange(0, count, self.window), count)
            self._window_starts, self._epoch_key = totals[ends], epoch
        return self._window_starts

    def _window(self, epoch: int, number: int) -> np.ndarray:
        """Samples of one window in order: `(samples, 2)` of (shard, row)."""
        key = (epoch, number)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        shards = self._shards[number * self.window : (number + 1) * self.window]
        sizes = self.shard_sizes[shards]
        starts = np.cumsum(sizes) - sizes
        rows = np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
        samples = np.column_stack([np.repeat(shards, sizes), rows])
        if self.shuffle:
            samples = samples[stable_permutation(len(samples), self.seed, epoch, number, "samples")]
        self._windows[key] = samples
        while len(self._windows) > KEPT_WINDOWS:
            self._windows.popitem(last=False)
        return samples


class StepBatches:
    """Batch sampler for `torch.utils.data.DataLoader`: one rank's part of each global batch.

    Step `s` uses positions `s * batch_size` to `(s + 1) * batch_size - 1`; rank `r` takes the `r`-th equal part.
    Batches may straddle epochs, so no remainder is dropped between them. Yields lists of (epoch, shard, row).

    Args:
        batch_size: samples per step over all ranks.
        start_step, stop_step: first step, and the step to end before.

    Raises:
        InputError: the ranks do not divide the batch, the batch exceeds the set, or the rank is out of range.
    """

    def __init__(
        self, order: SampleOrder, *, batch_size: int, rank: int, world_size: int, start_step: int, stop_step: int
    ) -> None:
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise InputError(
                f"batch size {batch_size} over {world_size} ranks: the number of ranks must divide the global batch"
            )
        if batch_size > order.num_samples:
            raise InputError(
                f"batch size {batch_size} is more than the set's {order.num_samples} samples: "
                "give a smaller batch size or a larger set"
            )
        if not 0 <= rank < world_size or not 0 <= start_step <= stop_step:
            raise InputError(f"rank {rank} of {world_size}, steps {start_step} to {stop_step}: out of range")
        self.order, self.batch_size, self.rank, self.world_size = order, batch_size, rank, world_size
        self.start_step, self.stop_step = start_step, stop_step

    def __len__(self) -> int:
        return self.stop_step - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        share = self.batch_size // self.world_size
        for step in range(self.start_step, self.stop_step):
            first = step * self.batch_size + self.rank * share
            yield [(epoch, shard, row) for epoch, shard, row in self.order.slice(first, first + share).tolist()]


def shard_rows_for_rank(shard_sizes: np.ndarray, *, rank: int, world_size: int) -> np.ndarray:
    """One rank's part for evaluation: each sample on exactly one rank, in order on disk.

    Parts differ by at most one sample, so a rank may have one fewer than another. `(samples, 3)` of (0, shard, row),
    the same columns as `SampleOrder.slice`.
    """
    order = SampleOrder(shard_sizes, seed=0, window=1, shuffle=False)
    first = rank * order.num_samples // world_size
    return order.slice(first, (rank + 1) * order.num_samples // world_size)
