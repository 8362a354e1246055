"""What a command line of one of the programs means, and whether it is right, by the program's own word."""

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.errors import InputError


def resolve(program: Path, words: Sequence[str]) -> dict[str, Any]:
    """The config that `program` would run with, as nested plain values.

    Args:
        program: file of a program that ends in `engine.program.run_program`.
        words: its command line, without the program.

    Raises:
        InputError: no such program, or the program refuses the command line; the message is the program's own line.
    """
    config = yaml.safe_load(_run(program, [*words, "--print_config"]))
    if not isinstance(config, dict):
        raise InputError(f"{program} {' '.join(words)} prints no config: it asks for something else than a run")
    return config


def check(program: Path, words: Sequence[str]) -> None:
    """Let `program` check a command line, data and model included, as its `--check` does.

    Raises:
        InputError: no such program, or the program refuses the command line; the message is the program's own line.
    """
    try:
        _run(program, [*words, "--check"])
    finally:
        if "accelerate.state" in sys.modules:  # it would hold the next program to this one's precision
            sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def run_folder(config: Mapping[str, Any]) -> Path:
    """Folder of the run that a resolved config names.

    Raises:
        InputError: the config names no run.
    """
    if "run" not in config or "runs" not in config:
        raise InputError("the program has no options 'run' and 'runs', so its runs cannot be told apart or go on")
    return Path(str(config["runs"])) / str(config["run"])


def _run(program: Path, words: Sequence[str]) -> str:
    """What a program that answers a question writes to stdout, run in this process."""
    if not program.is_file():
        raise InputError(f"program {program} does not exist: give a file such as pretrain/main.py, from the repository")
    output, errors = io.StringIO(), io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), _command_line(program, words):
        try:
            runpy.run_path(str(program), run_name="__main__")
        except SystemExit as leave:
            code = leave.code
    if code not in (0, None):
        # a library's warnings come before, and of a traceback the last line says what it was
        last = (errors.getvalue().strip().splitlines() or [f"{program} ended with code {code}"])[-1]
        raise InputError(last.removeprefix("error: ").removeprefix("failed: "))
    return output.getvalue()


@contextlib.contextmanager
def _command_line(program: Path, words: Sequence[str]) -> Iterator[None]:
    """`sys.argv` as the program sees it, outside any launcher: its rank would change how the program leaves."""
    argv, rank = sys.argv, os.environ.pop("RANK", None)
    sys.argv = [str(program), *words]
    try:
        yield
    finally:
        sys.argv = argv
        if rank is not None:
            os.environ["RANK"] = rank
