"""A run folder belongs to one config and keeps one history."""

import resource
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.files import append_lines
from engine.runs import RunFolder, check_run_name

CONFIG = {"optim": {"lr": 0.1}, "loop": {"log_every": 5}}


def test_the_same_config_may_come_back_and_another_may_not(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "a")
    run.claim(CONFIG)
    run.claim(CONFIG)
    run.claim({"optim": {"lr": 0.1}, "loop": {"log_every": 7}}, free=frozenset({"loop"}))
    with pytest.raises(InputError, match=r"optim\.lr is 0\.1 there and 0\.2 here"):
        run.claim({"optim": {"lr": 0.2}, "loop": {"log_every": 5}})
    assert run.read_config() == CONFIG


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "x" * 200, "a b"])
def test_names_that_are_no_folder_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="not usable"):
        check_run_name(name)


def test_metrics_rewind_to_the_checkpoint_and_survive_a_cut_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.claim(CONFIG)
    for step in (1, 2, 3):
        run.log({"loss": 1.0 / step, "bad": float("inf")}, step=step)
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 4, "lo')
    run.rewind(2)
    run.log({"loss": 9.0}, step=3)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    assert [line["loss"] for line in run.metrics()] == [1.0, 0.5, 9.0]
    assert next(run.metrics())["bad"] == "inf"


def test_summary_merges_what_probes_add_later(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.claim(CONFIG)
    run.write_summary({"loss": 1.0}, step=3, data={"n": 1})
    run.write_summary({"linear_probe/top1": 50.0}, step=3)
    summary = run.read_summary()
    assert summary["metrics"] == {"loss": 1.0, "linear_probe/top1": 50.0}
    assert summary["run"] == "a" and summary["step"] == 3 and summary["data"] == {"n": 1}
    assert {"commit", "torch", "python"} <= summary["environment"].keys()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run in"):
        RunFolder(tmp_path / "nothing").read_config()


def test_the_summary_has_medians_of_times_over_the_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step, seconds in enumerate((9.0, 1.0, 2.0, 1.5, 40.0)):
        run.log({"time/step_s": seconds, "train/loss": seconds}, step=step)
    run.write_summary({"time/step_s": 40.0, "train/loss": 40.0}, step=4)
    assert run.read_summary()["metrics"] == {"time/step_s": 2.0, "train/loss": 40.0}


def test_a_line_that_cannot_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    append_lines(file, "{}", "{}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append_lines(file, '{"a": "0123456789"}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "{}\n{}\n"
