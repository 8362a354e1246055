"""Sets on gs:// and behind TLS, against servers on loopback."""

import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import shards.fetch
from engine.errors import InputError
from shards.fetch import RemoteFault
from shards.reader import BadSample, ShardSet
from tests.shards.rows import options, trained_on
from tests.shards.servers import SpoilingProxy, google_storage, nginx, self_signed, spoiling
from tests.tools import REPOSITORY, clean_environment

BUCKET = "saccade-test"
EVERY_FAULT = ["ok", "drop", "ok", "short", "ok", "503", "ok", "stale", "ok", "cut", "ok"]


@pytest.fixture(scope="module")
def storage(local: ShardSet) -> Iterator[int]:
    """The local set and its labels in a bucket; the server's port."""
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is missing (pip install -e '.[test]')")
    pytest.importorskip("gcsfs", reason="gcsfs is missing (pip install -e '.[remote]')")
    root = Path(local.root).parent
    with google_storage(BUCKET) as port:
        for path in [*(root / "set").iterdir(), *(root / "labels").glob("*/*")]:
            name = urllib.parse.quote(str(path.relative_to(root)), safe="")
            put(port, name, path.read_bytes())
        yield port


def put(port: int, name: str, data: bytes) -> None:
    """Upload an object."""
    url = f"http://127.0.0.1:{port}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
    headers = {"Content-Type": "application/octet-stream"}
    with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers), timeout=10) as answer:
        assert answer.status == 200


@pytest.fixture
def google(alone: None, storage: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpoilingProxy]:
    """A proxy before the bucket, to which clients without credentials are led."""
    monkeypatch.setitem(shards.fetch.fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setattr(shards.fetch, "_clients", {})  # one made before knows another server
    with spoiling(storage) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{proxy.port}")
        yield proxy


def on_google(**changes: object) -> ShardSet:
    labels = f"gs://{BUCKET}/labels/5accade05accade0"
    return ShardSet(f"gs://{BUCKET}/set", labels=labels, remote=options(**changes))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "ranges"])
def test_training_reads_the_same_from_a_failing_google_storage(
    local: ShardSet, google: SpoilingProxy, whole: bool
) -> None:
    remote = on_google(whole_shards=whole)
    google.faults, google.in_a_row = EVERY_FAULT, 2
    assert trained_on(remote, workers=2) == trained_on(local, workers=0)
    assert all(google.spoiled[fault] >= 1 for fault in EVERY_FAULT)


def test_google_storage_s_faults_that_last_are_one_clear_line(google: SpoilingProxy) -> None:
    remote = on_google(retries=2)
    google.faults = ["503"]
    with pytest.raises(RemoteFault, match=r"^gs://saccade-test/set/shard-.* after 3 tries") as caught:
        remote.read(0, 0)
    assert "\n" not in str(caught.value) and google.spoiled["503"] == 3  # gcsfs's own tries are off
    google.faults = ["403"]
    with pytest.raises(RemoteFault, match=r"access denied: check the credentials, then run the same"):
        remote.read(0, 0)
    google.faults = ["ok"]
    with pytest.raises(InputError, match=r"gs://saccade-test/nothing: no manifest.json in it"):
        ShardSet(f"gs://{BUCKET}/nothing", remote=options(retries=1))


def test_a_shard_cut_short_on_google_storage_costs_its_lost_samples(
    local: ShardSet, google: SpoilingProxy, storage: int
) -> None:
    tar = (Path(local.root) / "shard-000003.tar").read_bytes()
    put(storage, "set%2Fshard-000003.tar", tar[: tar.index(local.read(3, 1).image)])
    try:
        remote = on_google(whole_shards=False)
        assert remote.read(3, 0).image == local.read(3, 0).image
        with pytest.raises(BadSample, match=r"shorter than the manifest says|of .* bytes came"):
            remote.read(3, 1)
    finally:
        put(storage, "set%2Fshard-000003.tar", tar)


@pytest.fixture(scope="module")
def secure(local: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The local set on nginx behind a certificate that nobody vouches for: the URL, and the certificate."""
    if shutil.which("nginx") is None:
        pytest.skip("no nginx on the PATH (Debian: apt-get install nginx-light)")
    pytest.importorskip("cryptography", reason="cryptography is missing (pip install -e '.[test]')")
    folder, root = tmp_path_factory.mktemp("tls"), tmp_path_factory.mktemp("secure")
    shutil.copytree(local.root, root / "set")
    certificate, key = self_signed(folder)
    with nginx(root, folder, tls=(certificate, key)) as port:
        yield f"https://127.0.0.1:{port}/set", certificate


@pytest.mark.parametrize("protocol", ["https", "s3", "gs"])
def test_a_certificate_that_nobody_vouches_for_is_one_clear_line(
    alone: None, secure: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    url, certificate = secure
    if protocol != "https":
        pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[protocol], reason="pip install -e '.[remote]'")
        monkeypatch.setattr(shards.fetch, "_clients", {})
        for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
            monkeypatch.setenv(name, url.removesuffix("/set"))
        for name, value in (
            ("ACCESS_KEY_ID", "test"),
            ("SECRET_ACCESS_KEY", "sesame"),
            ("DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setitem(shards.fetch.fsspec.config.conf, "gs", {"token": "anon"})
        url = f"{protocol}://bucket/set"
    with pytest.raises(RemoteFault, match=r"certificate is not trusted: .*set SSL_CERT_FILE") as caught:
        ShardSet(url, remote=options(backoff_s=30.0))
    assert str(caught.value).startswith(url) and "\n" not in str(caught.value)
    if protocol == "s3":
        monkeypatch.setattr(shards.fetch, "_clients", {})
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        with pytest.raises(InputError, match=r"no manifest\.json in it"):  # nginx knows no buckets
            ShardSet(url, remote=options(retries=1))


def test_a_certificate_named_by_ssl_cert_file_is_trusted(
    alone: None, local: ShardSet, secure: tuple[str, Path]
) -> None:
    """In a process of its own: clients read the variable as they start."""
    url, certificate = secure
    script = (
        "import sys; from shards.fetch import Fetcher, RemoteOptions;"
        "sys.stdout.buffer.write(Fetcher(sys.argv[1], RemoteOptions()).read('manifest.json'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, url],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=60,
        env=clean_environment() | {"SSL_CERT_FILE": str(certificate), "PYTHONPATH": str(REPOSITORY)},
    )
    assert result.stdout == (Path(local.root) / "manifest.json").read_bytes(), result.stderr
