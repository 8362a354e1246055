"""A training on a web server's shards: the same samples, or one clear line."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.program import parse_config
from engine.requeue import judge
from pretrain.config import Config
from pretrain.trainer import open_data, train
from tests.conftest import TEACHER, TinySample
from tests.pretrain.runs import losses, order
from tests.pretrain.test_bad_input import refused
from tests.shards.servers import SpoilingProxy, nginx, spoiling
from tests.shards.test_remote import EVERY_FAULT


@pytest.fixture
def web(tiny_sample: TinySample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpoilingProxy]:
    """The tiny sample on nginx, behind a proxy that may spoil it."""
    if shutil.which("nginx") is None:
        pytest.skip("no nginx on the PATH (Debian: apt-get install nginx-light)")
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    (tmp_path / "nginx").mkdir()
    with nginx(tiny_sample.root, tmp_path / "nginx") as port, spoiling(port) as proxy:
        yield proxy


def on_web(proxy: SpoilingProxy, tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Options for `student_config`."""
    base = f"http://127.0.0.1:{proxy.port}"
    return {
        "data__shards": f"{base}/train",
        "data__labels": f"{base}/labels/{TEACHER[:16]}",
        "data__remote__cache": str(tmp_path / "cache"),
        "data__remote__backoff_s": 0.01,
        "loop__num_workers": 1,
        **more,
    }


def read(path: Path) -> Config:
    return parse_config(Config, argv=["--config", str(path)])[0]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "ranges"])
def test_a_failing_server_changes_nothing_about_the_training(
    student_config: Callable[..., Path], web: SpoilingProxy, tmp_path: Path, whole: bool
) -> None:
    """Order of keys and losses are those of the local files, and no sample is left out."""
    local = read(student_config(run="local", max_steps=8, loop__record_order=True))
    train(local)
    web.faults, web.in_a_row = EVERY_FAULT, 2
    given = on_web(web, tmp_path, data__remote__whole_shards=whole)
    remote = read(student_config(run="remote", max_steps=8, loop__record_order=True, **given))
    train(remote)
    assert all(web.spoiled[fault] >= 1 for fault in EVERY_FAULT)
    assert bool(list((tmp_path / "cache").glob("*.tar"))) == whole
    orders = []
    for config in (local, remote):
        shards = open_data(config)
        run = config.runs / config.run
        orders.append([shards.key(s, r) for positions in order(run).values() for _, s, r in positions])
    assert orders[0] == orders[1] and len(orders[0]) == 8 * 12
    runs = [config.runs / config.run for config in (local, remote)]
    assert losses(runs[0]).tolist() == losses(runs[1]).tolist()
    assert losses(runs[1], "data/num_bad").max() == 0
    # how the set is reached is no part of what a run is
    train(replace(remote, data=replace(remote.data, remote=replace(remote.data.remote, retries=3))))


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("stale", 2, ["samples could not be read (data.max_bad_fraction 0.001)", ": sample ", "not the bytes that"]),
        ("503", 1, ["HTTP status 503", "gave up after 3 tries", "run the same command again"]),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_that_lasts_is_one_clear_line(
    student_config: Callable[..., Path],
    web: SpoilingProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    code: int,
    words: list[str],
    workers: int,
) -> None:
    """A server that does not answer is no fault of the samples: none is counted as bad, and a job is requeued."""
    answer = web.next_fault

    def spoil_shards(path: str, byte_range: str) -> str:
        answer(path, byte_range)
        return fault if path.endswith(".tar") else "ok"

    monkeypatch.setattr(web, "next_fault", spoil_shards)
    given = on_web(web, tmp_path, arm="contrastive", data__remote__retries=2, loop__num_workers=workers)
    config = student_config(**given)
    refused("--config", config, code=code, words=[f"http://127.0.0.1:{web.port}/train/shard-00000", *words])
    run = read(config).runs / read(config).run
    assert judge(run, 1).code == (2 if code == 2 else 75)
