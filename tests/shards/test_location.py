"""URLs and paths: which is which, what is refused, and what never reaches a message."""

from pathlib import Path

import fsspec
import pytest

from engine.errors import InputError
from shards.fetch import Fetcher, RemoteFault, RemoteOptions
from shards.location import is_remote, local_folder, url_of
from shards.pack import PackConfig, main
from shards.reader import ShardSet


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("s3://bucket/train", "s3://bucket/train"),
        ("s3://bucket/train/", "s3://bucket/train"),
        (Path("s3://bucket/train"), "s3://bucket/train"),
        (Path("gs://bucket") / "a b", "gs://bucket/a b"),
        (Path("https://host:81/x"), "https://host:81/x"),
        ("HTTP://host/x", "http://host/x"),
        ("memory://set", "memory://set"),
    ],
)
def test_urls_come_as_text_or_as_paths(given: Path | str, url: str) -> None:
    assert is_remote(given) and url_of(given) == url


@pytest.mark.parametrize("given", ["data/train", "/data/train", "c:/x", "a:b/c", "pipe:id", ".", "", "s3:bucket"])
def test_paths_are_paths(given: str) -> None:
    assert not is_remote(given) and not is_remote(Path(given))
    assert local_folder(given, what="x") == Path(given)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("https://user:sesame@host/x", "user name, password or query"),
        ("https://host/x?X-Amz-Signature=sesame", "user name, password or query"),
        ("https://host/x#sesame", "user name, password or query"),
        ("s3://key:sesame@bucket/x", "user name, password or query"),
        ("file:///etc", "plain paths"),
        ("local:///etc", "plain paths"),
        ("pipe://id", "unknown protocol"),
        ("zip://a.zip::https://host", "unknown protocol"),
        ("simplecache::s3://bucket", "no such folder"),
        ("s3://bucket/a\nb", "control characters"),
        ("s3://", "names no host or bucket"),
        ("https:///x", "names no host or bucket"),
    ],
)
def test_urls_that_cannot_be_used_are_one_line_without_secrets(given: str, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        ShardSet(given)
    assert "\n" not in str(caught.value) and "sesame" not in str(caught.value)


def test_programs_that_write_refuse_urls(tmp_path: Path, image_folder: Path) -> None:
    config = PackConfig(output="s3://bucket/out", workers=1)
    config.source.kind, config.source.path = "image_folder", str(image_folder)
    with pytest.raises(InputError, match="s3://bucket/out: a packed set can only be written to a local folder"):
        main(config)


def test_any_protocol_of_fsspec_will_do(packed: ShardSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for path in Path(packed.root).iterdir():
        memory.pipe_file(f"/any/{path.name}", path.read_bytes())
    remote = ShardSet("memory://any")
    assert [remote.read(1, row).image for row in range(3)] == [packed.read(1, row).image for row in range(3)]


def test_secrets_in_a_client_s_messages_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise ConnectionError("GET https://user:sesame@host/x?X-Amz-Signature=sesame\nfailed")

    monkeypatch.setattr(Fetcher, "_request", fail)
    with pytest.raises(
        RemoteFault, match=r"^https://host/x/a: ConnectionError \(GET https://host/x\?\.\.\. failed\)"
    ) as e:
        Fetcher("https://host/x", RemoteOptions(retries=1, backoff_s=0.001)).read("a")
    assert "sesame" not in str(e.value) and "\n" not in str(e.value)


def test_pauses_double_and_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def fail(*_: object) -> bytes:
        raise ConnectionError

    monkeypatch.setattr(Fetcher, "_request", fail)
    monkeypatch.setattr("time.sleep", pauses.append)
    with pytest.raises(RemoteFault):
        Fetcher("https://host/x", RemoteOptions(retries=9, backoff_s=1.0)).read("a")
    assert len(pauses) == 9 and len(set(pauses)) == 9
    for pause, middle in zip(pauses, [1, 2, 4, 8, 16, 30, 30, 30, 30], strict=True):
        assert 0.75 * middle <= pause <= 1.25 * middle


def test_the_bound_comes_from_option_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SACCADE_CACHE_GB", raising=False)
    assert RemoteOptions().cache_bytes == 32_000_000_000
    monkeypatch.setenv("SACCADE_CACHE_GB", "1.5")
    assert RemoteOptions().cache_bytes == 1_500_000_000 and RemoteOptions(cache_gb=2).cache_bytes == 2_000_000_000
    monkeypatch.setenv("SACCADE_CACHE_GB", "much")
    with pytest.raises(InputError, match="SACCADE_CACHE_GB is 'much'"):
        ShardSet("s3://bucket/x")
