"""The common front of every program: options, `--check`, one-line errors, exit codes."""

import difflib
import os
import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from engine.attempts import clear_exit, describe, write_exit
from engine.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_REQUEUE,
    Fault,
    InputError,
    Requeue,
    SaveFault,
)
from engine.settings import LoopConfig
from engine.stop import StopRequest

ConfigT = TypeVar("ConfigT")

set_parsing_settings(docstring_parse_attribute_docstrings=True)

REPOSITORY = Path(__file__).resolve().parent.parent


def build_parser(config_class: type[Any], *, description: str) -> ArgumentParser:
    """Parser of one program: `--config`, `--print_config`, `--check` and one option per field of `config_class`."""
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with the values that differ from the defaults")
    parser.add_argument(
        "--check", action="store_true", help="validate config, data and launcher, print what was found, and stop"
    )
    parser.add_class_arguments(config_class)
    return parser


def parse_config(
    config_class: type[ConfigT],
    *,
    description: str = "",
    default_config: Path | None = None,
    argv: Sequence[str] | None = None,
) -> tuple[ConfigT, bool]:
    """Read the command line into `config_class`.

    Args:
        default_config: YAML file used when the command line names none.
        argv: arguments without the program's name; `sys.argv[1:]` when None.

    Returns:
        The config, and whether `--check` was given.

    Raises:
        InputError: unknown key (with the nearest known one), wrong type, value out of range, missing file.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if default_config is not None and not any(a == "--config" or a.startswith("--config=") for a in arguments):
        arguments = ["--config", str(default_config), *arguments]
    parser = build_parser(config_class, description=description)
    try:
        namespace = parser.instantiate(parser.parse_args(arguments))
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise InputError(_explain(str(error), known=_known_keys(parser))) from error
    values = {field.name: namespace[field.name] for field in fields(config_class)}  # type: ignore[arg-type]
    return _plain(config_class(**values)), bool(namespace["check"])


def config_from_dict(config_class: type[ConfigT], values: dict[str, Any], *, source: Path, what: str) -> ConfigT:
    """The config that `config_to_dict` made `values` of.

    Args:
        source: the file they come from, and `what` it should hold: for the message.

    Raises:
        InputError: values of another program or version.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    try:
        namespace = parser.instantiate(parser.parse_object(values))
    except Exception as error:  # whatever the parser makes of a foreign file
        raise InputError(f"{source} is no {what}: {' '.join(str(error).split())}") from error
    return config_class(**{name: namespace[name] for name in values})


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionary of a config dataclass, ready for YAML or JSON."""
    result: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if hasattr(value, "__dataclass_fields__"):
            value = config_to_dict(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, list | tuple):
            value = [_builtin(item) for item in value]
        result[field.name] = value
    return result


def _builtin(value: Any) -> Any:
    """Inside containers jsonargparse leaves its range-checked number types, which YAML cannot write."""
    if is_dataclass(value):
        return config_to_dict(value)
    return next((kind(value) for kind in (bool, int, float) if isinstance(value, kind)), value)


def run_program(
    main: Callable[[ConfigT], None],
    config_class: type[ConfigT],
    *,
    description: str,
    default_config: Path | None = None,
    check: Callable[[ConfigT], Sequence[str]] | None = None,
) -> NoReturn:
    """Run one program from the command line and leave with its exit code.

    Exit codes: 0 done, 2 bad input (one line on stderr), 75 saved and wants to be requeued, 1 anything else.
    """
    try:
        config, check_only = parse_config(config_class, description=description, default_config=default_config)
    except InputError as error:
        _finish(_complain(f"error: {error}", code=EXIT_BAD_INPUT))
    if check_only:
        _finish(_run(lambda: _print_checks(check, config))[0])
    # A training answers a stop signal from its first moment: importing torch takes seconds.
    trains = isinstance(getattr(config, "loop", None), LoopConfig)
    with StopRequest() if trains else nullcontext():
        run = _run_folder(config) if trains and _rank() == "0" else None
        if run is not None:
            clear_exit(run)
        code, reason = _run(lambda: main(config))
        if run is not None:
            write_exit(run, code, reason=reason)
        _finish(code)


def leave_now(code: int, message: str) -> NoReturn:
    """End the process from any thread, without waiting for other ranks or threads."""
    _complain(message, code=code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(work: Callable[[], None]) -> tuple[int, str]:
    """Do the work; returns its exit code and the reason in one line."""
    try:
        work()
        return EXIT_DONE, describe(None)
    except InputError as error:
        return _complain(f"error: {error}", code=EXIT_BAD_INPUT), str(error)
    except Requeue as stop:
        # all ranks stop together: the first one speaks for them
        return _complain(f"stopped: {stop}", code=EXIT_REQUEUE) if _rank() == "0" else EXIT_REQUEUE, str(stop)
    except (SaveFault, FloatingPointError) as error:
        return _complain(f"failed: {error}", code=EXIT_FAILED) if _rank() == "0" else EXIT_FAILED, str(error)
    except Fault as error:
        return _complain(f"failed: {error}", code=EXIT_FAILED), str(error)
    except KeyboardInterrupt:
        return _complain("interrupted before anything could be saved", code=EXIT_FAILED), "interrupted"
    except Exception as error:  # the last resort: the traceback is the message
        return _complain(traceback.format_exc().rstrip(), code=EXIT_FAILED), describe(error)


def _print_checks(check: Callable[[Any], Sequence[str]] | None, config: Any) -> None:
    for line in check(config) if check is not None else []:
        sys.stdout.write(f"ok: {line}\n")


def _run_folder(config: Any) -> Path | None:
    """Folder of the run that a training's config names."""
    runs, name = getattr(config, "runs", None), getattr(config, "run", None)
    return runs / name if isinstance(runs, Path) and isinstance(name, str) and name else None


def _finish(code: int) -> NoReturn:
    """Leave with `code`."""
    sys.stdout.flush()
    if code != EXIT_DONE:
        _leave_now(code)
    sys.exit(code)


def _plain(value: Any) -> Any:
    """Restricted numbers (PositiveInt, ...) as plain ones, which YAML and pickle know."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _plain(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _complain(message: str, *, code: int) -> int:
    rank = _rank()
    sys.stderr.write((f"[rank {rank}] " if rank != "0" else "") + message + "\n")
    return code


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _leave_now(code: int) -> NoReturn:
    """End without waiting for the other ranks: a clean shutdown of a process group may block on them."""
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


def _known_keys(parser: ArgumentParser) -> list[str]:
    defaults: Namespace = parser.get_defaults()
    return [key for key in defaults.keys(branches=True) if key not in ("config", "check")]


def _explain(message: str, *, known: list[str]) -> str:
    """Turn the parser's message into one line; for an unknown key, name the nearest known one."""
    line = re.sub(r"\s+", " ", message).strip()
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", line)
    plain = re.search(r"(?:does not accept option|Key) '([\w.]+)'(?: is not expected)?", line)
    option = re.search(r"[Uu]nrecognized arguments: (?:--)?([\w.]+)", line)
    if group:
        unknown = f"{group[1]}.{group[2]}"
    elif option or (plain and "not" in line):
        unknown = (option or plain)[1]  # type: ignore[index]
    else:
        return line.replace('Parser key "', "config key '").replace('":', "':")
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    if not near:  # a right name in the wrong place: compare the last part alone
        last = {key.rsplit(".", 1)[-1]: key for key in known}
        near = [last[name] for name in difflib.get_close_matches(unknown.rsplit(".", 1)[-1], last, n=1)]
    hint = f"Did you mean '{near[0]}'?" if near else "See --help for the known keys."
    return f"Unknown key: '{unknown}'. {hint}"
