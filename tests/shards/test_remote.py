"""Sets behind URLs give what the local sets give, whatever servers, networks and disks do in between."""

import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

import shards.fetch
import shards.remote
from engine.errors import InputError
from shards.fetch import RemoteFault, RemoteOptions
from shards.index import read_index, write_index
from shards.labels import seal_labels, write_label_shard
from shards.order import SampleOrder, StepBatches
from shards.pack import pack
from shards.quarantine import BadEntry, write_quarantine
from shards.reader import BadSample, ShardSet
from shards.sources.image_folder import ImageFolder
from shards.verify import VerifyConfig
from shards.verify import main as verify
from shards.writer import index_path
from tests.conftest import write_labels
from tests.shards.conftest import jpeg
from tests.shards.servers import Redirecting, SpoilingProxy, moto_s3, nginx, spoiling

BUCKET = "saccade-test"
EVERY_FAULT = ["ok", "drop", "ok", "short", "ok", "503", "ok", "stale", "ok", "cut", "ok"]
Row = tuple[str, str, int, str]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxies, caches or credentials of the user; downloads in several pieces."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AWS_", "FSSPEC_", "SACCADE_CACHE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards.remote, "CHUNK_BYTES", 10_000)


@pytest.fixture(scope="module")
def nginx_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A real nginx: its port, and the folder that it serves."""
    if shutil.which("nginx") is None:
        pytest.skip("no nginx on the PATH (Debian: apt-get install nginx-light)")
    root, folder = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("nginx")
    with nginx(root, folder) as port:
        yield port, root


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    """A real S3 API."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed (pip install -e '.[test]')")
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install -e '.[remote]')")
    with moto_s3() as port:
        yield port


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """23 images in 4 shards, with label maps."""
    root = tmp_path_factory.mktemp("local")
    for number in range(23):
        path = root / "images" / ["cat", "dog", "owl"][number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed=number))
    pack(ImageFolder(root / "images"), root / "set", shard_samples=7, workers=1)
    return ShardSet(root / "set", labels=write_labels(root / "set", root / "labels"))


@pytest.fixture
def web(local: ShardSet, nginx_port: tuple[int, Path]) -> Iterator[SpoilingProxy]:
    """The local set on nginx as /set and /labels/<teacher>, behind a proxy that may spoil it."""
    port, root = nginx_port
    for name in ("set", "labels"):
        shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(Path(local.root).parent / name, root / name)
    with spoiling(port) as proxy:
        yield proxy


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


def held(cache: Path) -> int:
    """Bytes in the cache, parts included."""
    total = 0
    for path in cache.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "ranges"])
def test_training_reads_the_same_from_a_failing_web_server(local: ShardSet, web: SpoilingProxy, whole: bool) -> None:
    expected = trained_on(local, workers=0)
    web.faults = EVERY_FAULT
    assert trained_on(on_web(web, whole_shards=whole), workers=2) == expected
    assert all(web.spoiled[fault] >= 1 for fault in EVERY_FAULT)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "ranges"])
def test_training_reads_the_same_from_a_failing_s3(
    local: ShardSet, s3_port: int, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    import boto3

    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "sesame"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(shards.fetch, "_clients", {})  # one made before knows another server
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}")
    client.create_bucket(Bucket=BUCKET)
    root = Path(local.root).parent
    for path in [*(root / "set").iterdir(), *(root / "labels").glob("*/*")]:
        client.put_object(Bucket=BUCKET, Key=str(path.relative_to(root)), Body=path.read_bytes())
    expected = trained_on(local, workers=0)
    with spoiling(s3_port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        base = f"s3://{BUCKET}"
        labels = f"{base}/labels/5accade05accade0"
        remote = ShardSet(Path(base) / "set", labels=Path(labels), remote=options(whole_shards=whole))
        assert str(remote.root) == f"{base}/set"
        proxy.faults = EVERY_FAULT
        assert trained_on(remote, workers=2) == expected
        assert all(proxy.spoiled[fault] >= 1 for fault in EVERY_FAULT)
        proxy.faults = ["503"]
        with pytest.raises(RemoteFault, match=r"s3://saccade-test/set/manifest.json: .* after 3 tries") as caught:
            ShardSet(f"{base}/set", remote=options(retries=2))
        assert "\n" not in str(caught.value) and "sesame" not in str(caught.value)


def test_each_index_and_shard_is_fetched_once_for_all_workers_and_runs(local: ShardSet, web: SpoilingProxy) -> None:
    expected = trained_on(local, workers=0)
    assert trained_on(on_web(web), workers=2) == expected
    count = web.turn
    assert trained_on(on_web(web), workers=2) == expected
    assert web.turn == count + 4  # two manifests, two lists of bad samples that are not there
    for file in local.manifest.files:
        # Images and labels of a name; while one worker fetches, the other may read a few ranges.
        assert web.seen[index_path(Path(file)).name, ""] == 2 and downloads(web, file) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["503", "drop", "short", "slow"])
def test_a_fault_that_lasts_is_one_clear_line(web: SpoilingProxy, fault: str, workers: int) -> None:
    remote = on_web(web, retries=2, timeout_s=0.3)
    web.faults = [fault]
    with pytest.raises(InputError) as caught:
        trained_on(remote, workers=workers)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"http://127.0.0.1:{web.port}/set/shard-"), message
    assert "gave up after 3 tries" in message and "run the same command again" in message


def test_a_server_that_is_not_there_is_one_clear_line(web: SpoilingProxy) -> None:
    remote = on_web(web, retries=1)
    web.shutdown()
    web.server_close()
    with pytest.raises(RemoteFault, match=r"^http://.*shard-.*gave up after 2 tries"):
        remote.read(0, 0)
    with pytest.raises(RemoteFault, match=r"^http://.*manifest.json.*gave up after 2 tries"):
        on_web(web, retries=1)


def test_training_goes_on_after_an_outage(local: ShardSet, web: SpoilingProxy) -> None:
    remote = on_web(web)
    expected = all_rows(local)
    web.faults = ["503"] * 6 + ["ok"] * 100_000
    web.turn = 0
    assert all_rows(remote) == expected


def test_pauses_leave_the_random_state_alone(web: SpoilingProxy) -> None:
    remote = on_web(web)
    state = random.getstate()
    web.faults = ["503", "ok"]
    remote.read(0, 0)
    assert web.spoiled["503"] > 0 and random.getstate() == state


def test_files_that_are_not_on_the_server_are_bad_samples(web: SpoilingProxy, nginx_port: tuple[int, Path]) -> None:
    root = nginx_port[1] / "set"
    (root / "shard-000001.tar").unlink()
    (root / "shard-000002.index").unlink()
    remote = on_web(web)
    for shard, word in ((1, "no such file on the server"), (2, "the whole shard is unreadable: .*no such file")):
        with pytest.raises(BadSample, match=word):
            remote.read(shard, 0)
    assert remote.read(0, 0).image
    with pytest.raises(InputError, match=r"/nothing: no manifest.json in it"):
        ShardSet(f"http://127.0.0.1:{web.port}/nothing")


def test_no_right_to_read_ends_the_run(web: SpoilingProxy) -> None:
    """An expired credential is no fault of the samples: none may be counted as bad and left out."""
    remote = on_web(web)
    web.faults = ["403"]
    with pytest.raises(RemoteFault, match=r"shard-.*: access denied: check the credentials, then run the same"):
        remote.read(0, 0)
    with pytest.raises(InputError, match=r"manifest.json: cannot be read .*access denied"):
        on_web(web)


def test_a_changed_shard_on_the_server_costs_its_changed_samples_only(
    local: ShardSet, web: SpoilingProxy, nginx_port: tuple[int, Path]
) -> None:
    path = nginx_port[1] / "set" / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    where = data.index(local.read(0, 2).image) + 30
    data[where] ^= 1
    path.write_bytes(data)
    remote = on_web(web, retries=3)
    with pytest.warns(RuntimeWarning, match="SHA-256 is not the manifest's; reading it sample by sample"):
        assert row_of(remote, 0, 0) == row_of(local, 0, 0)
    with pytest.raises(BadSample, match="not the bytes that the manifest or index names, 4 times"):
        remote.read(0, 2)
    assert row_of(remote, 0, 3) == row_of(local, 0, 3)


def test_a_shard_that_is_cut_short_on_the_server_costs_the_lost_samples_only(
    local: ShardSet, web: SpoilingProxy, nginx_port: tuple[int, Path]
) -> None:
    path = nginx_port[1] / "set" / "shard-000000.tar"
    os.truncate(path, path.read_bytes().index(local.read(0, 3).image) + 100)
    with pytest.warns(RuntimeWarning, match="sample by sample"):
        remote = on_web(web)
        assert row_of(remote, 0, 2) == row_of(local, 0, 2)
    for row, word in ((3, "of .* bytes came"), (4, "shorter than the manifest says")):
        with pytest.raises(BadSample, match=word):
            remote.read(0, row)
    in_order = on_web(web, whole_shards=False)
    assert [row_of(in_order, 0, row) for row in range(3)] == [row_of(local, 0, row) for row in range(3)]


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


@pytest.mark.filterwarnings("ignore:.*sample by sample")
def test_json_members_come_along(local: ShardSet, web: SpoilingProxy) -> None:
    expected = local.read(1, 1).info()
    web.faults = ["ok", "stale", "ok", "cut"]
    for whole in (False, True):
        assert on_web(web, whole_shards=whole).read(1, 1).info() == expected


def test_neighbours_in_order_are_fetched_together(local: ShardSet, web: SpoilingProxy) -> None:
    expected = all_rows(local)
    web.seen.clear()
    assert all_rows(on_web(web, whole_shards=False)) == expected
    for file in local.manifest.files:
        assert web.requests(file) <= 4  # for up to seven images and as many maps, two each


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


def test_lists_of_bad_samples_are_respected(local: ShardSet, web: SpoilingProxy, nginx_port: tuple[int, Path]) -> None:
    write_quarantine(nginx_port[1] / "set", local.manifest, [BadEntry(0, 1, "x", "test")])
    remote = on_web(web)
    assert remote.num_quarantined == 1 and remote.num_samples == 22 and remote.digest != local.digest


def test_verify_checks_a_set_on_a_server(
    web: SpoilingProxy, nginx_port: tuple[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{web.port}/set"
    verify(VerifyConfig(path=url, workers=1))
    assert "images: 23 samples in 1 sets" in capsys.readouterr().out
    with pytest.raises(InputError, match="only local sets can be repaired"):
        verify(VerifyConfig(path=url, workers=1, repair=True))
    shutil.rmtree(Path(os.environ["SACCADE_CACHE"]))
    path = nginx_port[1] / "set" / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="faults"):
        verify(VerifyConfig(path=url, workers=1))


def test_labels_can_be_written_for_images_on_a_server(local: ShardSet, web: SpoilingProxy, tmp_path: Path) -> None:
    remote = on_web(web)
    made = tmp_path / "made"
    for shard in range(4):
        maps = [(key, local.stored_map(shard, row) or b"") for row, key in enumerate(local.keys(shard))]
        write_label_shard(made, remote, shard, maps)
    sealed = seal_labels(made, remote, teacher={"hash": "5accade0" * 8}, settings={"size": [56, 56]})
    assert local.label_manifest is not None and sealed.digest == local.label_manifest.digest
    with pytest.raises(InputError, match="can only be written to a local folder"):
        write_label_shard("s3://bucket/labels", remote, 0, [])


def test_a_server_that_ignores_ranges_is_named(web: SpoilingProxy) -> None:
    remote = on_web(web)
    web.faults = ["ok"] + ["whole"] * 1000
    web.turn = 0
    with pytest.raises(RemoteFault, match="ignores byte ranges: use one that serves them"):
        remote.read(0, 0)


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "pipe:id"])
def test_redirects_lead_to_http_only(target: str) -> None:
    handler = type("Handler", (Redirecting,), {"target": target})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        with pytest.raises(InputError, match="manifest") as caught:
            ShardSet(f"http://127.0.0.1:{server.server_address[1]}/set", remote=options(retries=1))
        server.shutdown()
    assert "\n" not in str(caught.value)
