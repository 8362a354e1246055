"""Sweep files: every line checked before anything is submitted."""

import contextlib
import io
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.resolve import check
from engine.sweep import Config, digest, main, read_sweep, sbatch_line, task_words
from tests.tools import REPOSITORY

PROGRAM = Path("pretrain/main.py")
parse_sweep = partial(read_sweep, parse_only=True)
SWEEPS = sorted((REPOSITORY / "configs" / "sweeps").glob("*.txt"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str) -> Path:
        file = tmp_path / "sweep.txt"
        file.write_text("\n".join(lines) + "\n")
        return file

    return write


@pytest.mark.parametrize("file", SWEEPS, ids=[file.name for file in SWEEPS])
def test_the_ready_sweeps_are_right(file: Path) -> None:
    tasks = parse_sweep(file, program=PROGRAM)
    assert len({task.folder for task in tasks}) == len(tasks) >= 6


def test_lines_common_options_comments_and_quotes(sweep: Callable[..., Path]) -> None:
    file = sweep("# two arms", "", "--run a --seed 1  # the first", '  --run b --model.backbone "resnet18" --seed 2')
    tasks = parse_sweep(file, program=PROGRAM, options="--seed 9 --epochs 2")
    assert [(task.line, str(task.folder)) for task in tasks] == [(3, "runs/a"), (4, "runs/b")]
    assert tasks[1].words == (
        "--seed",
        "9",
        "--epochs",
        "2",
        *["--run", "b", "--model.backbone", "resnet18", "--seed", "2"],
    )
    config = Config(file, options="--seed 9 --epochs 2", sbatch="--partition=gpu --array=%4 --time=1-0")
    line = sbatch_line(config, tasks)
    assert line[:4] == ["sbatch", "--array=0-1%4", "--partition=gpu", "--time=1-0"]
    assert line[line.index("--digest") + 1] == digest(file) and line[-1] == "--options=--seed 9 --epochs 2"
    checked = Config(file, options=config.options, digest=digest(file))
    assert task_words(config, 1) == task_words(checked, 1) == [str(PROGRAM), *tasks[1].words]


def test_all_lines_that_the_parser_refuses_are_named_at_once(sweep: Callable[..., Path]) -> None:
    file = sweep(
        "--run a --optim.lrr 3",
        "--run b",
        "--run ./c/../b",
        "--run b --seed 3",
        "--run d --temperature -1",
        '--run e --arm "contrastive',
        "--run f --config nowhere.yaml",
    )
    with pytest.raises(InputError) as caught:
        parse_sweep(file, program=PROGRAM)
    expected = {
        1: "Unknown key: 'optim.lrr'. Did you mean 'optim.lr'?",
        3: "run name",
        4: "run folder runs/b is line 2's as well",
        5: "temperature",
        6: "No closing quotation",
        7: "nowhere.yaml",
    }
    assert_lines(str(caught.value), file, expected)


def assert_lines(message: str, file: Path, expected: dict[int, str]) -> None:
    """The one line that names every wrong line of a file, and no other, holds these words about each."""
    assert "\n" not in message
    parts = dict(part.split(": ", 1) for part in message.removeprefix(f"{file}: ").split("; line "))
    found = {int(number.removeprefix("line ")): text for number, text in parts.items()}
    assert found.keys() == expected.keys() and all(text in found[line] for line, text in expected.items()), message


def submit(file: Path, *options: str) -> tuple[int, str]:
    """`engine/sweep.py --submit true`, run in this process: exit code and what it wrote to stderr."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["engine/sweep.py", "--file", str(file), "--submit", "true", *options])
        with pytest.raises(SystemExit) as left:
            runpy.run_path("engine/sweep.py", run_name="__main__")
    return int(left.value.code or 0), errors.getvalue()


def test_every_line_passes_the_programs_own_check_or_nothing_is_submitted(
    sweep: Callable[..., Path], student_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, label sets, models, and options that exclude each other: what a parser cannot know."""
    sbatch, called = tmp_path / "bin" / "sbatch", tmp_path / "called"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\necho $* >> {called}\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("engine.resolve.check", lambda program, words: asked.append(words) or check(program, words))
    base = f"--config {student_config()}"
    wrong = {
        "--model.backbone resnet18x": "'resnet18x' is no timm model",
        "--optim.fused true --optim.name lars": "LARS has no fused form",
        "--data.shards no/such/shards": "no/such/shards",
        "--data.labels no/such/labels": "no/such/labels",
        "--data.control shuffled": "data.control 'shuffled'",
        "--data.batch_size 1000": "1000",
        "--model.backbone coat_tiny": "gives no feature maps of images of 32 px",
        "--loop.keep_best smallest": "loop.keep_best",
        "--online.evaluators knm": "knm",
        "--precision bf16 --attention.stages [9]": "attention.stages",
        "--temperature -1": "temperature",
    }
    right = [f"{base} --run a --seed 1", f"{base} --run b --seed 2", f"{base} --run c --precision bf16"]
    file = sweep(*right, *(f"{base} --run wrong{number} {line}" for number, line in enumerate(wrong)))
    code, errors = submit(file)
    assert code == 2 and not called.exists()
    assert errors.startswith("error: ") and errors.endswith("\n")
    assert_lines(errors.removeprefix("error: ").rstrip(), file, dict(enumerate(wrong.values(), start=4)))
    assert len(asked) == 2 + len(wrong) - 1, "seeds and names share a check, and what cannot be parsed needs none"

    assert submit(sweep(*right)) == (0, "") and "--array=0-2 " in called.read_text()
    assert not (tmp_path / "runs").exists()
    # data that another job has yet to write
    later = sweep(f"{base} --run a --data.shards written/later")
    assert submit(later)[0] == 2 and submit(later, "--parse_only", "true")[0] == 0
    assert len(called.read_text().splitlines()) == 2


def test_a_file_that_changed_after_submission_is_refused(sweep: Callable[..., Path]) -> None:
    config = Config(sweep("--run a", "--run b"), digest=digest(sweep("--run a", "--run b")))
    assert task_words(config, 1) == [str(PROGRAM), "--run", "b"]
    with pytest.raises(InputError, match="no task 2"):
        task_words(config, 2)
    sweep("--run b", "--run a")
    with pytest.raises(InputError, match="has changed since the array was submitted"):
        task_words(config, 1)


def test_without_a_digest_a_task_checks_the_whole_file(sweep: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"line 2: .*seed"):
        task_words(Config(sweep("--run a", "--run b --seed x")), 0)


@pytest.mark.parametrize("lines", [(), ("# nothing",)])
def test_an_empty_file_is_refused(sweep: Callable[..., Path], lines: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="no line with options"):
        parse_sweep(sweep(*lines), program=PROGRAM)


def test_a_missing_file_or_program_is_refused(sweep: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_sweep(tmp_path / "none.txt", program=PROGRAM)
    with pytest.raises(InputError, match=r"none\.py does not exist"):
        read_sweep(sweep("--run a"), program=Path("none.py"))


def test_without_submit_the_sbatch_line_is_only_printed(
    sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    main(Config(sweep("--run a"), parse_only=True))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "task 0: line 1, runs/a" and printed[1].startswith("sbatch --array=0-0 ")
    with pytest.raises(InputError, match="sbatch is not installed here"):
        main(Config(sweep("--run a"), parse_only=True, submit=True))
