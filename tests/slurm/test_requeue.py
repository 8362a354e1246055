"""What the batch scripts decide after a training has ended, without Slurm."""

import json
from pathlib import Path

import pytest

from engine.requeue import judge, main
from tests.tools import REPOSITORY


def marker(run: Path, code: int, reason: str = "why") -> None:
    (run / "exit.json").write_text(json.dumps({"code": code, "reason": reason, "step": 3}))


def attempt(run: Path, number: int) -> None:
    with open(run / "attempts.jsonl", "a") as file:
        file.write(json.dumps({"attempt": number, "start": 0}) + "\n")


@pytest.mark.parametrize(("code", "expected"), [(75, 75), (2, 2), (1, 75)])
def test_the_runs_own_exit_code_counts_not_the_launchers(tmp_path: Path, code: int, expected: int) -> None:
    marker(tmp_path, code, "stopped there")
    verdict = judge(tmp_path, 1)
    assert verdict.code == expected and "stopped there" in verdict.line


def test_launchers_that_ended_well_are_believed(tmp_path: Path) -> None:
    assert judge(tmp_path, 0).code == 0 and not (tmp_path / "failures.jsonl").exists()


def test_a_launcher_that_failed_after_the_run_was_done_is_no_success(tmp_path: Path) -> None:
    """The marker says 0, a launcher 1: trying again costs little, since a finished run is left as it is."""
    marker(tmp_path, 0, "done")
    assert judge(tmp_path, 1).code == 75


@pytest.mark.parametrize("content", [None, "", "[1]", '{"reason": "cut'])
def test_a_killed_run_is_tried_again_and_the_third_failure_that_came_to_nothing_ends_the_job(
    tmp_path: Path, content: str | None
) -> None:
    run = tmp_path / "not-yet-there"
    if content is not None:
        run.mkdir()
        (run / "exit.json").write_text(content)
    assert [judge(run, 137).code for _ in range(4)] == [75, 75, 1, 1]
    assert "status 137" in judge(run, 137).line


def test_failures_with_progress_between_them_go_on(tmp_path: Path) -> None:
    """A new checkpoint, or an attempt that began: the training's own guard ends a crash loop of those."""
    codes = []
    for number in range(6):
        if number % 2:
            attempt(tmp_path, number)
        else:
            (tmp_path / "checkpoints" / f"step-{number:09d}").mkdir(parents=True)
        codes += [judge(tmp_path, 1).code, judge(tmp_path, 1).code]
    assert codes == [75] * 12
    assert judge(tmp_path, 1).code == 1


def test_locate_names_the_run_folder_of_a_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("RANK", "3")
    assert main(["locate", "pretrain/main.py", "--run", "big", "--runs", "elsewhere", "--optim.lr", "0.2"]) == 0
    assert capsys.readouterr().out == "elsewhere/big\n"
    assert main(["locate", "pretrain/main.py", "--optim.lrr", "0.2"]) == 2
    assert capsys.readouterr().err == "error: Unknown key: 'optim.lrr'. Did you mean 'optim.lr'?\n"
    assert main(["locate", "pretrain/mian.py"]) == 2
    assert "pretrain/mian.py does not exist" in capsys.readouterr().err
    assert main(["locate", "shards/verify.py"]) == 2


def test_judge_leaves_with_the_jobs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker(tmp_path, 75, "after step 3")
    assert main(["judge", str(tmp_path), "1"]) == 75
    assert capsys.readouterr().err == f"{tmp_path.name}: after step 3\n"
