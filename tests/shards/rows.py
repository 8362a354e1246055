"""What is read from a set, in a form that two sets can be compared by."""

import hashlib
from typing import Any

from torch.utils.data import DataLoader

from shards.fetch import RemoteOptions
from shards.order import SampleOrder, StepBatches
from shards.reader import ShardSet
from tests.shards.servers import SpoilingProxy

Row = tuple[str, str, int, str]


def options(**changes: Any) -> RemoteOptions:
    return RemoteOptions(**({"backoff_s": 0.01, "timeout_s": 5.0} | changes))


def on_web(proxy: SpoilingProxy, **changes: Any) -> ShardSet:
    base = f"http://127.0.0.1:{proxy.port}"
    return ShardSet(f"{base}/set", labels=f"{base}/labels/5accade05accade0", remote=options(**changes))


def row_of(shard_set: ShardSet, shard: int, row: int) -> Row:
    sample = shard_set.read(shard, row)
    assert sample.map is not None
    return sample.key, hashlib.sha256(sample.image).hexdigest(), sample.label, str(sample.map.sum(axis=0).tolist())


def all_rows(shard_set: ShardSet) -> list[Row]:
    return [row_of(shard_set, s, r) for s, size in enumerate(shard_set.shard_sizes.tolist()) for r in range(size)]


class Rows:
    """A data set of (epoch, shard, row) positions."""

    def __init__(self, shard_set: ShardSet) -> None:
        self.shard_set = shard_set

    def __getitem__(self, position: tuple[int, int, int]) -> Row:
        return row_of(self.shard_set, *position[1:])


def trained_on(shard_set: ShardSet, *, workers: int) -> list[list[Row]]:
    """What two epochs of training would read, batch by batch, read by worker processes."""
    order = SampleOrder(shard_set.shard_sizes, seed=3, window=2)
    steps = StepBatches(order, batch_size=5, rank=0, world_size=1, start_step=0, stop_step=9)
    loader: Any = DataLoader(Rows(shard_set), batch_sampler=steps, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
    batches = iter(loader)
    try:
        return list(batches)
    finally:
        if workers:
            batches._shutdown_workers()  # now, and not when the garbage collector runs in a thread of the server


def downloads(proxy: SpoilingProxy, file: str) -> int:
    """How often a shard of that name was fetched as a whole, of images and labels together."""
    return sum(n for (name, part), n in proxy.seen.items() if name == file and part.startswith("bytes=0-"))
