"""The cache of a node: bounded, shared, checked, and never in the way."""

import multiprocessing
import os
import resource
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from shards.cache import Cache
from shards.index import read_index, write_index
from shards.reader import BadSample, ShardSet
from shards.writer import index_path
from tests.shards.rows import all_rows, downloads, on_web, options, row_of, trained_on
from tests.shards.servers import SpoilingProxy


def held(cache: Path) -> int:
    """Bytes in the cache, parts included."""
    total = 0
    for path in cache.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_each_index_and_shard_is_fetched_once_for_all_workers_and_runs(local: ShardSet, web: SpoilingProxy) -> None:
    expected = trained_on(local, workers=0)
    assert trained_on(on_web(web), workers=2) == expected
    count = web.turn
    assert trained_on(on_web(web), workers=2) == expected
    assert web.turn == count + 4  # two manifests, two lists of bad samples that are not there
    for file in local.manifest.files:
        # Images and labels of a name; while one worker fetches, the other may read a few ranges.
        assert web.seen[index_path(Path(file)).name, ""] == 2 and downloads(web, file) == 2


def test_a_set_whose_index_and_shard_disagree_is_not_fetched_over_and_over(
    local: ShardSet, web: SpoilingProxy, nginx_port: tuple[int, Path]
) -> None:
    """Packed wrongly: every hash of the manifest is right, one CRC of the index is not."""
    root = nginx_port[1] / "set"
    (root / local.manifest.files[0]).with_suffix(".index").unlink()
    index = read_index(index_path(Path(local.root) / local.manifest.files[0]))
    index.crc.setflags(write=True)
    index.crc[1] ^= 1
    sha256 = write_index(root / "shard-000000.index", index)
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text.replace(local.manifest.hash_of(0, "index_sha256"), sha256))
    remote = on_web(web)
    assert remote.read(0, 0).image
    count = downloads(web, "shard-000000.tar")
    for _ in range(3):
        with pytest.raises(BadSample, match="not the bytes that the manifest or index names"):
            remote.read(0, 1)
    assert downloads(web, "shard-000000.tar") == count and remote.read(0, 2).image


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder"])
def test_damaged_copies_are_fetched_again(local: ShardSet, web: SpoilingProxy, tmp_path: Path, damage: str) -> None:
    expected = [row_of(local, 0, row) for row in range(3)]
    assert row_of(on_web(web), 0, 0) == expected[0]
    for copy in (tmp_path / "cache").glob("[0-9a-f]*"):
        data = copy.read_bytes()
        if damage == "folder":
            copy.unlink()
            copy.mkdir()
            continue
        copy.write_bytes({"flip": bytes(b ^ 1 for b in data), "cut": data[: len(data) // 2], "empty": b""}[damage])
    with warnings.catch_warnings():
        warnings.simplefilter("error" if damage != "folder" else "ignore")
        assert [row_of(on_web(web), 0, row) for row in range(3)] == expected


def test_the_cache_stays_within_its_bound(local: ShardSet, web: SpoilingProxy, tmp_path: Path) -> None:
    """Room for two of the four image shards: reading goes on, and old copies make room."""
    bound = int(local.manifest.num_bytes_of.max()) * 2 + 20_000
    remote = on_web(web, cache_gb=bound / 1e9)
    for files in (remote._images, remote._maps):
        files.folder.cache.idle_s = 0.0  # type: ignore[union-attr]
    expected = trained_on(local, workers=0)
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], held(tmp_path / "cache"))
            time.sleep(0.002)

    (tmp_path / "cache").mkdir()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert trained_on(remote, workers=2) == expected
    finally:
        stop.set()
        watcher.join()
    assert bound // 3 < most[0] <= bound
    assert max(downloads(web, file) for file in local.manifest.files) > 2  # something had to go and come back


def test_files_that_are_no_copies_are_neither_deleted_nor_counted(tmp_path: Path) -> None:
    """Somebody's scratch folder is named for the cache: only old copies, and parts of killed writers, make room."""
    copies = [f"{digit * 64}.{ending}" for digit, ending in (("a", "tar"), ("b", "file"), ("c", "tar.part"))]
    foreign = ["thesis.tex", "download.part", ".lock", "e" * 64, f"{'f' * 63}.tar", f"{'a' * 64}.tar.bak"]
    for name in copies + foreign:
        (tmp_path / name).write_bytes(b"x" * 900)
        os.utime(tmp_path / name, (1, 1))
    assert Cache(tmp_path, 1000).fill("d" * 64 + ".tar", 500, lambda file: file.write(bytes(500))) == "stored"
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, "d" * 64 + ".tar"}
    assert all((tmp_path / name).read_bytes() == b"x" * 900 for name in foreign)


def test_a_cache_smaller_than_what_is_read_is_not_emptied_over_and_over(local: ShardSet, web: SpoilingProxy) -> None:
    remote = on_web(web, cache_gb=(int(local.manifest.num_bytes_of.max()) * 2 + 20_000) / 1e9)
    assert trained_on(remote, workers=0) == trained_on(local, workers=0)
    assert sum(downloads(web, file) for file in local.manifest.files) <= 8


def _read_all(proxy_port: int, changes: dict[str, Any], limit: int | None, results: Any) -> None:
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    base = f"http://127.0.0.1:{proxy_port}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shard_set = ShardSet(f"{base}/set", labels=f"{base}/labels/5accade05accade0", remote=options(**changes))
        rows = all_rows(shard_set)
    results.put((rows, [str(warning.message) for warning in caught]))


def start_reader(proxy: SpoilingProxy, results: Any, *, limit: int | None = None, **changes: Any) -> Any:
    """Another process that reads everything."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_read_all, args=(proxy.port, changes, limit, results), daemon=True)
    process.start()
    return process


def test_processes_that_want_the_same_shards_fetch_them_once(local: ShardSet, web: SpoilingProxy) -> None:
    web.delay_s = 0.01
    results = multiprocessing.get_context("fork").Queue()
    readers = [start_reader(web, results) for _ in range(3)]
    found = [results.get(timeout=60)[0] for _ in readers]
    for reader in readers:
        reader.join(timeout=10)
    assert found == [all_rows(local)] * 3
    for file in local.manifest.files:
        assert downloads(web, file) == 2  # once for the images, once for the labels


def test_a_process_killed_while_fetching_leaves_nothing_that_hinders(
    local: ShardSet, web: SpoilingProxy, tmp_path: Path
) -> None:
    web.delay_s = 0.05
    results = multiprocessing.get_context("fork").Queue()
    reader = start_reader(web, results)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "cache").glob("*.tar.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.06)
    os.kill(reader.pid, signal.SIGKILL)
    reader.join(timeout=10)
    assert list((tmp_path / "cache").glob("*.part"))
    web.delay_s = 0.0
    assert all_rows(on_web(web)) == all_rows(local)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_full_disk_costs_time_and_nothing_else(local: ShardSet, web: SpoilingProxy) -> None:
    """The operating system itself refuses to let files grow beyond 4 kB."""
    results = multiprocessing.get_context("fork").Queue()
    reader = start_reader(web, results, limit=4096)
    rows, messages = results.get(timeout=60)
    reader.join(timeout=10)
    assert rows == all_rows(local)
    assert len(messages) == 2 and all("File too large: reading http://" in message for message in messages)


def test_old_copies_make_room_on_a_full_disk(
    local: ShardSet, web: SpoilingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that holds 40 kB beside whatever else is on it: yesterday's copies go first."""
    (tmp_path / "cache").mkdir()
    old = tmp_path / "cache" / f"{'0' * 64}.tar"
    old.write_bytes(bytes(200_000))
    os.utime(old, (1, 1))
    real = os.posix_fallocate

    def full(descriptor: int, offset: int, size: int) -> None:
        if old.exists():
            raise OSError(28, "No space left on device")
        real(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all_rows(on_web(web)) == all_rows(local)
    assert not old.exists() and list((tmp_path / "cache").glob("*.tar"))


def test_a_cache_that_cannot_be_written_is_done_without(local: ShardSet, web: SpoilingProxy, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")  # a file where the folder should be
    with pytest.warns(RuntimeWarning, match="reading .* by range instead") as caught:
        remote = on_web(web)
        assert all_rows(remote) == all_rows(local)
    assert len(caught) == 2  # one for the images, one for the labels
