"""A run folder belongs to one config and keeps one history."""

from pathlib import Path

import pytest

from engine.errors import InputError
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
    run.rewind_metrics(2)
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
