"""What a command line of one of the programs means, found out by the program's own parser without running it."""

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
        raise InputError(errors.getvalue().strip().removeprefix("error: ") or f"{program} ended with code {code}")
    config = yaml.safe_load(output.getvalue())
    if not isinstance(config, dict):
        raise InputError(f"{program} {' '.join(words)} prints no config: it asks for something else than a run")
    return config


def run_folder(config: Mapping[str, Any]) -> Path:
    """Folder of the run that a resolved config names.

    Raises:
        InputError: the config names no run.
    """
    if "run" not in config or "runs" not in config:
        raise InputError("the program has no options 'run' and 'runs', so its runs cannot be told apart or go on")
    return Path(str(config["runs"])) / str(config["run"])


@contextlib.contextmanager
def _command_line(program: Path, words: Sequence[str]) -> Iterator[None]:
    """`sys.argv` as the program sees it, outside any launcher: its rank would change how the program leaves."""
    argv, rank = sys.argv, os.environ.pop("RANK", None)
    sys.argv = [str(program), *words, "--print_config"]
    try:
        yield
    finally:
        sys.argv = argv
        if rank is not None:
            os.environ["RANK"] = rank
