"""Sets behind URLs give what the local sets give, whatever servers and networks do in between."""

import os
import random
import shutil
import threading
from http.server import HTTPServer
from pathlib import Path

import pytest

import shards.fetch
from engine.errors import InputError
from shards.fetch import RemoteFault
from shards.labels import seal_labels, write_label_shard
from shards.quarantine import BadEntry, write_quarantine
from shards.reader import BadSample, ShardSet
from shards.verify import VerifyConfig
from shards.verify import main as verify
from tests.shards.rows import all_rows, on_web, options, row_of, trained_on
from tests.shards.servers import Redirecting, SpoilingProxy, spoiling

BUCKET = "saccade-test"
EVERY_FAULT = ["ok", "drop", "ok", "short", "ok", "503", "ok", "stale", "ok", "cut", "ok"]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "ranges"])
def test_training_reads_the_same_from_a_failing_web_server(local: ShardSet, web: SpoilingProxy, whole: bool) -> None:
    expected = trained_on(local, workers=0)
    web.faults, web.in_a_row = EVERY_FAULT, 2
    assert trained_on(on_web(web, whole_shards=whole), workers=2) == expected
    assert all(web.spoiled[fault] >= 1 for fault in EVERY_FAULT)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "ranges"])
def test_training_reads_the_same_from_a_failing_s3(
    alone: None, local: ShardSet, s3_port: int, monkeypatch: pytest.MonkeyPatch, whole: bool
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
        proxy.faults, proxy.in_a_row = EVERY_FAULT, 2
        assert trained_on(remote, workers=2) == expected
        assert all(proxy.spoiled[fault] >= 1 for fault in EVERY_FAULT)
        proxy.faults, proxy.in_a_row = ["503"], None
        with pytest.raises(RemoteFault, match=r"s3://saccade-test/set/manifest.json: .* after 3 tries") as caught:
            ShardSet(f"{base}/set", remote=options(retries=2))
        assert "\n" not in str(caught.value) and "sesame" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["503", "drop", "short", "slow"])
def test_a_fault_that_lasts_is_one_clear_line(web: SpoilingProxy, fault: str, workers: int) -> None:
    remote = on_web(web, retries=2, timeout_s=0.3)
    web.faults = [fault]
    with pytest.raises(RemoteFault) as caught:
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
    in_order, count = on_web(web, whole_shards=False), web.requests("shard-000000.tar")
    assert [row_of(in_order, 0, row) for row in range(3)] == [row_of(local, 0, row) for row in range(3)]
    assert web.requests("shard-000000.tar") - count <= 10  # it stops trying to read ahead


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
def test_redirects_lead_to_http_only(alone: None, target: str) -> None:
    handler = type("Handler", (Redirecting,), {"target": target})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        with pytest.raises(RemoteFault, match="manifest") as caught:
            ShardSet(f"http://127.0.0.1:{server.server_address[1]}/set", remote=options(retries=1))
        server.shutdown()
    assert "\n" not in str(caught.value)
