"""The threads that encode labels: the bytes of one thread, errors that come out, a bound on what waits."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.labels import encode_label, write_label_shard
from shards.reader import ShardSet
from teacher import label_tasks
from teacher.label_tasks import LabelWriter
from teacher.labeller import ImageBatch, ImageDataset, Labeller, Predicted, encode_maps, label
from teacher.saved import load_teacher
from tests.teacher.test_label import config_of, contents


def shards_in(directory: Path) -> dict[str, bytes]:
    """Everything in a label folder but its manifest and settings."""
    return {name: data for name, data in contents(directory).items() if name not in ("manifest.json", ".settings.json")}


def loaded(images: ShardSet, *, batch_size: int) -> Iterator[ImageBatch]:
    """The set's images at 32x48, as the loader brings them."""
    dataset = ImageDataset(images, size=(32, 48))
    for shard, size in enumerate(images.shard_sizes):
        for start in range(0, int(size), batch_size):
            yield dataset.__getitems__([(shard, row) for row in range(start, min(start + batch_size, int(size)))])


@pytest.fixture(scope="module")
def reference(trained: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Label shards made label by label in one thread, of nothing but the model, `encode_label` and the writer."""
    images, directory = ShardSet(data / "images"), tmp_path_factory.mktemp("reference")
    labeller = Labeller(config_of(trained, data, directory), load_teacher(trained), images, directory)
    for shard in range(5):
        batches = [batch for batch in loaded(images, batch_size=2) if batch.shard == shard]
        predicted = [
            (key, row) for one in batches for key, row in zip(one.keys, labeller.predict(one.images).cpu(), strict=True)
        ]
        written = [(str(key), encode_label(density.numpy())) for key, density in predicted]
        write_label_shard(directory, images, shard, written)
    return contents(directory)


def test_encoders_write_what_one_thread_writes(
    reference: dict[str, bytes], trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In four threads that end in disorder."""
    ended: list[str] = []

    def in_disorder(keys: Sequence[str | None], predicted: Predicted) -> Iterator[tuple[str, bytes]]:
        time.sleep(0.03 if int(str(keys[0])) % 4 == 0 else 0)
        yield from encode_maps(keys, predicted)
        ended.append(str(keys[0]))

    monkeypatch.setattr("teacher.labeller.encode_maps", in_disorder)
    monkeypatch.setattr(label_tasks, "default_encoders", lambda: 4)
    assert shards_in(label(config_of(trained, data, tmp_path))) == reference
    order = [str(batch.keys[0]) for batch in loaded(ShardSet(data / "images"), batch_size=2)]
    assert sorted(ended) == sorted(order) and ended != order


@pytest.mark.parametrize("size", [(56, 56), (3, 200)])
def test_maps_encoded_together_are_those_encoded_alone(size: tuple[int, int]) -> None:
    """Unusable ones beside them, and of unreadable images none."""
    rng = np.random.default_rng(0)
    maps = rng.gamma(0.3, size=(21, *size)).astype(np.float32) * np.logspace(-9, 3, 21, dtype=np.float32)[:, None, None]
    maps[3], maps[7, 0, 0], maps[11, 1, 1] = 0, np.nan, np.inf
    keys = [None if row in (0, 20) else str(row) for row in range(21)]
    found = list(encode_maps(keys, Predicted(torch.from_numpy(maps), None)))
    assert found == [(str(row), encode_label(maps[row])) for row in range(1, 20)]
    assert list(encode_maps([], Predicted(torch.zeros(0, *size), None))) == []


def test_large_maps_do_not_depend_on_the_maps_beside_them() -> None:
    """Their sums torch shares among threads, otherwise in a batch than alone: here a code would be another."""
    maps = torch.from_numpy(np.random.default_rng(44).gamma(0.3, size=(6, 190, 200)).astype(np.float32))
    torch.set_num_threads(2)
    try:
        found = dict(encode_maps(list("abcdef"), Predicted(maps, None)))
        assert found == {key: encode_label(density.numpy()) for key, density in zip("abcdef", maps, strict=True)}
    finally:
        torch.set_num_threads(1)


def test_a_failing_encoder_fails_the_task_and_leaves_nothing_half_written(
    reference: dict[str, bytes], trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in the middle of shard 2; shards before it may be there, whole, and the next submission completes."""
    config = config_of(trained, data, tmp_path)
    bad = ShardSet(data / "images").key(2, 2)

    def failing(keys: Sequence[str | None], predicted: Predicted) -> Iterator[tuple[str, bytes]]:
        for key, stored in encode_maps(keys, predicted):
            if key == bad:
                raise ValueError(f"no PNG of {key}")
            yield key, stored

    monkeypatch.setattr(label_tasks, "default_encoders", lambda: 3)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"no PNG of {bad}"):
        patch.setattr("teacher.labeller.encode_maps", failing)
        label(config)
    directory = next(tmp_path.iterdir())
    left = shards_in(directory)
    assert {"shard-000000.tar", "shard-000000.index", "shard-000001.tar", "shard-000001.index"} <= left.keys()
    assert not any("000002" in name or name.endswith(".tmp") for name in left)
    assert left.items() <= reference.items() and not (directory / "manifest.json").exists()
    label(config)
    assert shards_in(directory) == reference and (directory / "manifest.json").exists()


def test_prediction_waits_for_slow_encoders(data: Path, tmp_path: Path) -> None:
    """At most `max_batches` predictions are kept, however slow the encoders; every image comes to them once."""
    images = ShardSet(data / "images")
    waiting, most, lock = 0, 0, threading.Lock()
    seen: list[str | None] = []

    def predict(batch: torch.Tensor) -> int:
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        return len(batch)

    def encode(keys: Sequence[str | None], predicted: int) -> list[tuple[str, bytes]]:
        nonlocal waiting
        time.sleep(0.005)
        with lock:
            waiting -= 1
            seen.extend(keys)
        assert predicted == len(keys)
        return [(str(key), b"label") for key in keys]

    writer = LabelWriter(images, tmp_path, encode=encode, num_encoders=2)
    assert writer.write(range(5), loaded(images, batch_size=1), predict) == []
    assert writer.max_batches == 5 and 2 <= most <= 5
    assert sorted(map(str, seen)) == sorted(key for shard in range(5) for key in images.keys(shard))


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"), [(1, None, 1), (2, None, 1), (6, None, 3), (96, None, 4), (16, "4", 2), (4, "8", 1)]
)
def test_encoders_are_counted_by_the_cores_of_a_rank(
    cores: int, ranks: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_tasks, "available_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert label_tasks.default_encoders() == expected
