"""Bad options end in one line that names the key; good ones arrive typed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse.typing import PositiveFloat, PositiveInt

from engine.errors import InputError
from engine.program import config_to_dict, parse_config
from tests.tools import run_python


@dataclass
class Optim:
    lr: PositiveFloat = 0.1
    """Learning rate."""
    name: Literal["sgd", "adamw"] = "sgd"
    """Optimiser."""


@dataclass
class Options:
    """A program's options."""

    run: str = "a"
    """Name."""
    steps: PositiveInt = 3
    """Steps."""
    shards: Path = Path("x")
    """Shards."""
    stages: list[int] = field(default_factory=lambda: [-1])
    """Stages."""
    optim: Optim = field(default_factory=Optim)
    """Optimiser."""


def test_values_come_from_defaults_file_and_command_line_in_that_order(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 5\noptim: {lr: 0.5}\n")
    config, check = parse_config(Options, argv=["--config", str(file), "--optim.lr", "0.7", "--stages", "[1, 2]"])
    assert (config.steps, config.optim.lr, config.optim.name, config.stages, check) == (5, 0.7, "sgd", [1, 2], False)
    assert type(config.steps) is int and type(config.optim.lr) is float
    assert config_to_dict(config)["optim"] == {"lr": 0.7, "name": "sgd"} and config_to_dict(config)["shards"] == "x"


def test_default_config_is_read_unless_another_is_named(tmp_path: Path) -> None:
    default, other = tmp_path / "d.yaml", tmp_path / "o.yaml"
    default.write_text("steps: 7\n")
    other.write_text("run: b\n")
    assert parse_config(Options, argv=[], default_config=default)[0].steps == 7
    assert parse_config(Options, argv=["--config", str(other)], default_config=default)[0].steps == 3
    assert parse_config(Options, argv=[f"--config={other}"], default_config=default)[0].run == "b"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lrr", "3"], ["'optim.lrr'", "Did you mean 'optim.lr'?"]),
        (["--lr", "3"], ["'lr'", "Did you mean 'optim.lr'?"]),
        (["--steps", "0.5"], ["'steps'"]),
        (["--steps", "0"], ["'steps'"]),
        (["--optim.lr=-1"], ["'optim.lr'"]),
        (["--optim.name", "lion"], ["'optim.name'", "lion"]),
        (["--config", "absent.yaml"], ["absent.yaml"]),
        (["--zzzz", "1"], ["'zzzz'", "--help"]),
    ],
)
def test_bad_options_are_one_line_that_names_them(argv: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        parse_config(Options, argv=argv)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_bad_keys_in_a_file_are_named_too(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lrr: 3}\n")
    with pytest.raises(InputError, match=r"'optim\.lrr'.*'optim\.lr'"):
        parse_config(Options, argv=["--config", str(file)])
    file.write_text("[1, 2\n")
    with pytest.raises(InputError, match="parsing"):
        parse_config(Options, argv=["--config", str(file)])


def test_programs_answer_help_and_print_config_from_any_folder(tmp_path: Path) -> None:
    from tests.tools import REPOSITORY

    programs = ("shards/pack.py", "shards/verify.py", "shards/generate.py", "teacher/main.py", "teacher/label.py")
    programs += ("pretrain/main.py", "pretrain/probe.py", "pretrain/report.py", "engine/chain.py")
    for program in programs:
        done = run_python(REPOSITORY / program, "--help", cwd=tmp_path)
        assert done.returncode == 0 and "--config" in done.stdout, (program, done.stderr)
    done = run_python(REPOSITORY / "pretrain/main.py", "--optim.lr", "0.25", "--print_config", cwd=tmp_path)
    assert done.returncode == 0 and "lr: 0.25" in done.stdout, done.stderr
    done = run_python(REPOSITORY / "pretrain/main.py", "--optim.lrr", "0.25", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "optim.lr" in done.stderr
