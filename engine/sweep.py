"""Submit a file of runs as one Slurm array: `python engine/sweep.py --file configs/sweeps/arms_x_seeds.txt`."""

import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt

from engine.errors import InputError
from engine.program import REPOSITORY, run_program
from engine.resolve import check, resolve, run_folder
from engine.runs import check_run_name


@dataclass
class Config:
    """Check a sweep file and submit it as a Slurm array, one task a line."""

    file: Path
    """Sweep file: each line holds the options of one run, as on the command line; # begins a comment."""
    program: Path = Path("pretrain/main.py")
    """The program that each line's options are for."""
    options: str = ""
    """Options for every line, quoted as one word (--options="--epochs 1"); a line's own options win."""
    sbatch: str = ""
    """Options of sbatch, quoted as one word with a = before it (--sbatch="--partition=gpu --gpus-per-node=8")."""
    script: Path = REPOSITORY / "slurm" / "sweep.sbatch"
    """The batch script of one task."""
    parse_only: bool = False
    """Check options alone, not data and model: for a sweep that waits for a job which has yet to write the data."""
    submit: bool = False
    """Call sbatch; otherwise only print its line."""
    task: NonNegativeInt | None = None
    """For the batch script: print the program and the options of this task, one word a line, and stop."""
    digest: str | None = None
    """For the batch script: refuse the file if it is not the one that was submitted."""


@dataclass(frozen=True)
class Task:
    """One run of a sweep.

    Attributes:
        line: its number in the file, from 1.
        words: all its options.
        folder: its run folder.
        config: what the words mean.
    """

    line: int
    words: tuple[str, ...]
    folder: Path
    config: dict[str, Any]


def read_sweep(file: Path, *, program: Path, options: str = "", parse_only: bool = False) -> list[Task]:
    """Every task of a sweep file, in order, each checked by the program's own parser and its `--check`.

    Args:
        parse_only: leave it at the parser.

    Raises:
        InputError: naming all wrong lines: bad quoting, options, data or models that the program refuses, or two lines
            with one run folder.
    """
    tasks, errors, owners, checked = list[Task](), list[str](), dict[Path, int](), dict[str, str]()
    for number, text in _lines(file):
        try:
            task = _read_task(number, text, program=program, options=options)
            owner = owners.setdefault(task.folder.resolve(), number)
            if owner != number:
                raise InputError(f"run folder {task.folder} is line {owner}'s as well: give each line a --run")
            if not parse_only:
                _check_task(task, program=program, checked=checked)
            tasks.append(task)
        except InputError as error:
            errors.append(f"line {number}: {error}")
    if errors:
        raise InputError(f"{file}: {'; '.join(errors)}")
    if not tasks:
        raise InputError(f"{file} holds no line with options: write one run's options a line")
    return tasks


def _lines(file: Path) -> list[tuple[int, str]]:
    """Numbered lines that are neither empty nor comments; the n-th is task n of the array, counted from 0."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sweep file {file} cannot be read: {error}") from error
    return [(n, line) for n, line in enumerate(lines, start=1) if line.strip() and not line.lstrip().startswith("#")]


def _read_task(number: int, text: str, *, program: Path, options: str) -> Task:
    words = (*_split(options, where="--options"), *_split(text, where="quoting"))
    config = resolve(program, words)
    folder = run_folder(config)
    check_run_name(str(config["run"]))
    return Task(number, words, folder, config)


def _check_task(task: Task, *, program: Path, checked: dict[str, str]) -> None:
    """The program's own check, done once for all lines that differ in nothing but name and seed.

    Args:
        checked: what was wrong with the configs before, empty for nothing.
    """
    rest = {key: value for key, value in task.config.items() if key not in ("run", "runs", "seed")}
    key = json.dumps(rest, sort_keys=True, default=str)
    if key not in checked:
        try:
            check(program, task.words)
            checked[key] = ""
        except InputError as error:
            checked[key] = str(error)
    if checked[key]:
        raise InputError(checked[key])


def _split(text: str, *, where: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise InputError(f"{where}: {error} in {text!r}") from error


def sbatch_line(config: Config, tasks: list[Task]) -> list[str]:
    """The sbatch command for checked `tasks`. An `--array=%N` among the options limits how many run at a time."""
    words = _split(config.sbatch, where="--sbatch")
    limit = next((word for word in words if word.startswith("--array=%")), "")
    words = [word for word in words if word != limit]
    array = f"--array=0-{len(tasks) - 1}{limit.removeprefix('--array=')}"
    own = ["--file", str(config.file.resolve()), "--program", str(config.program), "--digest", digest(config.file)]
    more = [f"--options={config.options}"] if config.options else []
    return ["sbatch", array, *words, str(config.script), *own, *more]


def digest(file: Path) -> str:
    """Short hash of the file: tasks wait for days, and must not run what the file says by then."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def main(config: Config) -> None:
    """Check the whole file, then print or submit; or print one task's words for the batch script."""
    if config.task is not None:
        sys.stdout.write("\n".join(task_words(config, config.task)) + "\n")
        return
    tasks = read_sweep(config.file, program=config.program, options=config.options, parse_only=config.parse_only)
    for number, task in enumerate(tasks):
        sys.stdout.write(f"task {number}: line {task.line}, {task.folder}\n")
    command = sbatch_line(config, tasks)
    sys.stdout.write(f"{shlex.join(command)}\n")
    if config.submit:
        sys.stdout.flush()
        try:
            done = subprocess.run(command, check=False)
        except FileNotFoundError as error:
            raise InputError("sbatch is not installed here: submit from a login node of the cluster") from error
        if done.returncode:
            raise InputError(f"sbatch refused the array (its message stands above); status {done.returncode}")


def task_words(config: Config, task: int) -> list[str]:
    """The program and the options of one task. Without a digest nobody has checked the file, so all of it is parsed.

    Raises:
        InputError: the file has changed since it was submitted, is wrong, or has no such task.
    """
    lines = _lines(config.file)
    if config.digest not in (None, digest(config.file)):
        raise InputError(
            f"{config.file} has changed since the array was submitted, and task {task} may be another run now: "
            f"put the old file back, or cancel the array and submit the new file"
        )
    if task >= len(lines):
        raise InputError(f"{config.file} has {len(lines)} tasks, counted from 0, and no task {task}")
    if config.digest is None:
        words = read_sweep(config.file, program=config.program, options=config.options, parse_only=True)[task].words
    else:
        words = _read_task(*lines[task], program=config.program, options=config.options).words
    if any("\n" in word for word in words):
        raise InputError(f"{config.file}: line {lines[task][0]}: an option holds a line break")
    return [str(config.program), *words]


if __name__ == "__main__":
    run_program(main, Config, description=Config.__doc__ or "")
