"""The order of samples: exactly once, the same for any ranks, workers and stops."""

import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from engine.errors import InputError
from shards.opening import MAX_OPEN_SHARDS
from shards.order import SampleOrder, StepBatches, shard_rows_for_rank, stable_permutation
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)

Triple = tuple[int, int, int]


def every_sample(sizes: list[int]) -> set[tuple[int, int]]:
    return {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}


def batches(order: SampleOrder, batch_size: int, world_size: int, start: int, stop: int) -> list[list[Triple]]:
    """Global batches: the ranks' parts in rank order."""
    ranks = [
        list(
            StepBatches(
                order, batch_size=batch_size, rank=rank, world_size=world_size, start_step=start, stop_step=stop
            )
        )
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {stop - start}
    return [[sample for part in step for sample in part] for step in zip(*ranks, strict=True)]


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 5), window=st.integers(1, 14), shuffle=st.booleans(), epoch=st.integers(0, 3))
def test_each_epoch_holds_every_sample_once(
    sizes: list[int], seed: int, window: int, shuffle: bool, epoch: int
) -> None:
    order = SampleOrder(np.array(sizes), seed=seed, window=window, shuffle=shuffle)
    count = sum(sizes)
    rows = order.slice(epoch * count, (epoch + 1) * count)
    assert (rows[:, 0] == epoch).all()
    assert len(rows) == count
    assert {(shard, row) for _, shard, row in rows.tolist()} == every_sample(sizes)


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 5), window=st.integers(1, 14), data=st.data())
def test_any_slice_equals_the_part_of_the_whole(sizes: list[int], seed: int, window: int, data: st.DataObject) -> None:
    total = 3 * sum(sizes)
    whole = SampleOrder(np.array(sizes), seed=seed, window=window).slice(0, total)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    fresh = SampleOrder(np.array(sizes), seed=seed, window=window)
    np.testing.assert_array_equal(fresh.slice(start, stop), whole[start:stop])


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 5), window=st.integers(1, 14), data=st.data())
def test_stop_and_go_on_with_other_ranks_gives_the_same_batches(
    sizes: list[int], seed: int, window: int, data: st.DataObject
) -> None:
    """Any number of stops, each time with another number of ranks: the global batches do not change at all."""
    count = sum(sizes)
    batch_size = data.draw(st.integers(1, count))
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    total = data.draw(st.integers(1, 2 * count // batch_size + 2))
    reference = batches(SampleOrder(np.array(sizes), seed=seed, window=window), batch_size, 1, 0, total)
    stops = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=3))})
    found: list[list[Triple]] = []
    for start, stop in pairwise(stops):
        order = SampleOrder(np.array(sizes), seed=seed, window=window)
        found += batches(order, batch_size, data.draw(st.sampled_from(divisors)), start, stop)
    assert found == reference
    seen = Counter((shard, row) for batch in found for _, shard, row in batch)
    passes, rest = divmod(total * batch_size, count)
    # After p whole epochs and a bit, every sample was used p or p + 1 times: none lost, none doubled.
    assert set(seen.values()) <= {passes, passes + 1} and sum(seen.values()) == passes * count + rest
    assert passes == 0 or seen.keys() == every_sample(sizes)


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, world_size=st.integers(1, 40))
def test_evaluation_parts_cover_the_set_once_and_differ_by_one(sizes: list[int], world_size: int) -> None:
    parts = [shard_rows_for_rank(np.array(sizes), rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = np.concatenate(parts)
    assert {(shard, row) for _, shard, row in whole.tolist()} == every_sample(sizes)
    assert len(whole) == sum(sizes)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert (np.diff(whole[:, 1]) >= 0).all()


def test_the_shuffle_mixes_within_a_window_and_changes_with_epoch_and_seed() -> None:
    sizes = np.full(32, 50)
    order = SampleOrder(sizes, seed=0, window=4)
    first, second = order.slice(0, 1600)[:, 1:], order.slice(1600, 3200)[:, 1:]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, SampleOrder(sizes, seed=1, window=4).slice(0, 1600)[:, 1:])
    for start in range(0, 1600, 200):
        assert len(np.unique(first[start : start + 200, 0])) == 4  # one window: 4 shards, no other
    assert all(len(np.unique(first[start : start + 20, 0])) > 1 for start in range(0, 1600, 20))


def test_the_permutation_is_uniform_and_never_changes() -> None:
    """Frozen values: a change would break the resuming of every run begun before it."""
    assert stable_permutation(8, 0, 0, "shards").tolist() == [1, 5, 0, 6, 3, 2, 4, 7]
    counts = np.zeros((5, 5))
    for seed in range(4000):
        counts[np.arange(5), stable_permutation(5, seed)] += 1
    # 25 cells of binomial(4000, 0.2): five standard deviations are 126.
    assert np.abs(counts - 800).max() < 126


@pytest.mark.parametrize(
    ("batch_size", "world_size", "word"),
    [(10, 3, "divide"), (0, 1, "divide"), (200, 1, "more than"), (4, 0, "divide")],
)
def test_impossible_batches_are_refused(batch_size: int, world_size: int, word: str) -> None:
    order = SampleOrder(np.array([50, 50]), seed=0)
    with pytest.raises(InputError, match=word):
        StepBatches(order, batch_size=batch_size, rank=0, world_size=world_size, start_step=0, stop_step=1)


def test_empty_sets_and_windows_are_refused() -> None:
    with pytest.raises(InputError, match="no samples"):
        SampleOrder(np.array([0, 0]), seed=0)
    with pytest.raises(InputError, match="window"):
        SampleOrder(np.array([3]), seed=0, window=0)
    with pytest.raises(InputError, match="counts"):
        SampleOrder(np.array([3, -1]), seed=0)


def test_a_window_wider_than_the_reader_keeps_open_is_refused() -> None:
    """It would open a shard anew, its index read and hashed, for almost every sample."""
    sizes = np.full(MAX_OPEN_SHARDS + 1, 3)
    with pytest.raises(InputError, match=r"window: 65 shards .* give 64 or fewer"):
        SampleOrder(sizes, seed=0, window=MAX_OPEN_SHARDS + 1)
    assert SampleOrder(sizes[1:], seed=0, window=10**6).slice(0, 3 * MAX_OPEN_SHARDS).shape == (192, 3)
    assert SampleOrder(sizes, seed=0, window=MAX_OPEN_SHARDS).num_samples == len(sizes) * 3
    assert SampleOrder(sizes, seed=0, window=10**6, shuffle=False).num_samples == len(sizes) * 3


class Keys(Dataset[str]):
    """Reads the keys of samples from a shard set."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards

    def __getitem__(self, place: Triple) -> str:
        return self.shards.read(place[1], place[2]).key


def load(root: Path, *, workers: int, prefetch: int, world_size: int, start: int, stop: int) -> list[list[str]]:
    """Keys of the global batches, read through real worker processes."""
    shards = ShardSet(root)
    parts = []
    for rank in range(world_size):
        sampler = StepBatches(
            SampleOrder(shards.shard_sizes, seed=3, window=2),
            batch_size=6,
            rank=rank,
            world_size=world_size,
            start_step=start,
            stop_step=stop,
        )
        loader = DataLoader(
            Keys(shards),
            batch_sampler=sampler,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=list,
        )
        parts.append(list(loader))
    return [[key for part in step for key in part] for step in zip(*parts, strict=True)]


def test_worker_processes_and_prefetch_do_not_change_the_batches(packed: ShardSet) -> None:
    reference = load(packed.root, workers=0, prefetch=2, world_size=1, start=0, stop=8)
    first = load(packed.root, workers=2, prefetch=3, world_size=1, start=0, stop=5)
    rest = load(packed.root, workers=1, prefetch=1, world_size=3, start=5, stop=8)
    assert first + rest == reference
    assert len({key for batch in reference[:4] for key in batch}) == 23  # 24 positions: one epoch and one sample


TRAINER = """
import os, sys
from pathlib import Path
import test_order
from shards.reader import ShardSet
from shards.opening import MAX_OPEN_SHARDS
from shards.order import SampleOrder, StepBatches
from torch.utils.data import DataLoader
root, log, stop = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
done = len(log.read_text().splitlines()) if log.exists() else 0
shards = ShardSet(root)
sampler = StepBatches(SampleOrder(shards.shard_sizes, seed=3, window=2), batch_size=6, rank=0, world_size=1,
                      start_step=done, stop_step=stop)
loader = DataLoader(test_order.Keys(shards), batch_sampler=sampler, num_workers=int(sys.argv[4]), collate_fn=list)
with open(log, "a") as file:
    for batch in loader:
        file.write(" ".join(batch) + "\\n")
        file.flush()
        print("step", flush=True)
        sys.stdin.readline()  # the test decides when the next step may be taken
"""


def test_sigkill_of_trainer_and_workers_loses_and_doubles_nothing(packed: ShardSet, tmp_path: Path) -> None:
    """A trainer that logs each step is killed with its workers, then goes on from its log with other workers."""
    log = tmp_path / "steps.log"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["", str(Path(__file__).parent), *sys.path])}
    for steps, workers in ((3, 2), (2, 1), (3, 0)):
        command = [sys.executable, "-c", TRAINER, str(packed.root), str(log), "8", str(workers)]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            assert process.stdout is not None and process.stdin is not None
            for step in range(steps):
                assert process.stdout.readline() == "step\n"
                if step < steps - 1:
                    process.stdin.write("\n")
                    process.stdin.flush()
            # Workers are prefetching the following steps at this moment; their session dies at once.
            os.killpg(process.pid, signal.SIGKILL)
    found = [line.split() for line in log.read_text().splitlines()]
    assert found == load(packed.root, workers=0, prefetch=2, world_size=1, start=0, stop=8)


def test_a_killed_worker_is_an_error_and_not_a_lost_batch(packed: ShardSet) -> None:
    """torch notices a dead worker; the steps delivered before it are right, and reading goes on in a new loader."""
    sampler = StepBatches(
        SampleOrder(packed.shard_sizes, seed=3, window=2),
        batch_size=6,
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=400,
    )
    loader = DataLoader(Keys(packed), batch_sampler=sampler, num_workers=1, prefetch_factor=1, collate_fn=list)
    iterator = iter(loader)
    found = [next(iterator)]
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        os.kill(iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[attr-defined]
        for batch in iterator:
            found.append(batch)
    rest = load(packed.root, workers=1, prefetch=2, world_size=1, start=len(found), stop=8)
    assert found + rest == load(packed.root, workers=0, prefetch=2, world_size=1, start=0, stop=max(8, len(found)))


def test_fewer_shards_than_ranks(image_folder: Path, tmp_path: Path) -> None:
    """One shard, six ranks: each gets its sample of every step."""
    pack(ImageFolder(image_folder), tmp_path / "one", workers=1)
    shards = ShardSet(tmp_path / "one")
    assert shards.manifest.num_shards == 1
    order = SampleOrder(shards.shard_sizes, seed=0)
    found = batches(order, 6, 6, 0, 23)
    assert Counter((shard, row) for batch in found for _, shard, row in batch) == Counter(
        {(0, row): 6 for row in range(23)}
    )
