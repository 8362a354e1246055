"""Evaluators on sets behind URLs: the numbers of the local sets, every set opened with the options that were given."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from engine.program import parse_config
from engine.runs import RunFolder
from pretrain.config import Config
from pretrain.evaluators.offline import check_probe, probe_run
from pretrain.evaluators.shared_work import describe_share, run_share
from pretrain.probe_array_config import ProbeArrayConfig
from pretrain.probe_config import GazeConfig
from pretrain.trainer import train
from shards import reader
from shards.fetch import RemoteOptions
from tests.conftest import TEACHER, TinySample
from tests.pretrain.evaluators.conftest import tiny_probe, write_run


@pytest.fixture
def remote_sample(tiny_sample: TinySample) -> Iterator[dict[str, Path]]:
    """URLs of the tiny sample's sets and label set, in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    for path in [path for name in ("train", "val", "gaze", "labels") for path in (tiny_sample.root / name).rglob("*")]:
        if path.is_file():
            memory.pipe_file(f"/tiny/{path.relative_to(tiny_sample.root)}", path.read_bytes())
    sets = {name: Path(f"memory://tiny/{name}") for name in ("train", "val", "gaze")}
    yield sets | {"labels": Path(f"memory://tiny/labels/{TEACHER[:16]}")}
    memory.rm("/tiny", recursive=True)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[RemoteOptions | None]]:
    """With which options each set is opened, by its URL."""
    seen: dict[str, list[RemoteOptions | None]] = {}
    open_folder = reader.open_folder

    def noted(where: Path | str, *, remote: RemoteOptions | None = None) -> Any:
        folder = open_folder(where, remote=remote)
        seen.setdefault(str(folder.where), []).append(remote)
        return folder

    monkeypatch.setattr(reader, "open_folder", noted)
    return seen


def test_a_probe_on_remote_sets(
    remote_sample: dict[str, Path],
    opened: dict[str, list[RemoteOptions | None]],
    tiny_sample: TinySample,
    tmp_path: Path,
) -> None:
    """A probe and an array, with a read-out to train; how the sets are reached is no part of what was measured."""
    runs = [write_run(tmp_path / name, tiny_sample, arm="contrastive").path for name in ("local", "remote", "array")]
    options = GazeConfig(readout_steps=2, rows=["grad_cam"])
    local = tiny_probe(runs[0], tiny_sample, evaluators="knn,alignment,retrieval", gaze_options=options)
    probe_run(local)
    opened.clear()
    remote = RemoteOptions(cache=str(tmp_path / "cache"), retries=0)
    probe = replace(local, run=runs[1], remote=remote, **remote_sample)
    check_probe(probe)
    probe_run(probe)
    array = ProbeArrayConfig(**vars(probe), runs=runs[2:])
    run_share(array)
    urls = {str(url).replace(":/", "://") for url in remote_sample.values()}
    assert urls <= opened.keys() and all(set(opened[url]) == {remote} for url in urls)
    assert list((tmp_path / "cache").glob("*.tar"))
    summaries = [RunFolder(run).read_summary() for run in runs]
    assert all(each["metrics"] == summaries[0]["metrics"] for each in summaries)
    other = replace(array, remote=replace(remote, retries=1))
    assert all(line.endswith(": finished") for line in describe_share(other)[1:])


def test_evaluators_in_a_training_reach_their_sets_as_the_training_does(
    remote_sample: dict[str, Path],
    opened: dict[str, list[RemoteOptions | None]],
    student_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    text = {name: str(url) for name, url in remote_sample.items()}
    config = student_config(
        max_steps=1,
        data__shards=text["train"],
        data__labels=text["labels"],
        data__remote__cache=str(tmp_path / "cache"),
        online={"evaluators": "knn,alignment", "val": text["val"], "gaze": text["gaze"], "options": {"knn.k": 5}},
    )
    read = parse_config(Config, argv=["--config", str(config)])[0]
    train(read)
    assert len(opened) == 4 and all(set(found) == {read.data.remote} for found in opened.values())
    assert (tmp_path / "runs" / "student" / "probe" / "online.jsonl").is_file()
