"""Run a chain of programs, each leaving files for the next: `python engine/chain.py --chain configs/chain/demo.yaml`.

A chain is a YAML file: a name, and steps with a title, a program, its options and the file that exists once the step is
done. A step whose file exists is skipped, so a chain that was stopped goes on where it was.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from engine.errors import InputError
from engine.program import REPOSITORY, run_program
from engine.progress import duration, report

# What launchers, and W&B's service of this process, tell their children; a program must not take it for its own.
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "WANDB_SERVICE",
)
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")


@dataclass(frozen=True)
class Step:
    """One program of a chain.

    Attributes:
        program: file under the repository.
        options: dotted option to value.
        makes: file, or pattern of one, that exists once the step is done.
        group: name that `until` may stop before; "" for none.
        launch: start it with `accelerate launch` instead of plain Python.
    """

    title: str
    program: str
    makes: str
    options: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    launch: bool = False

    def command(self, variables: Mapping[str, str]) -> list[str]:
        """Command line with `{name}` in options replaced from `variables`."""
        starter = [sys.executable]
        if self.launch:
            config = REPOSITORY / "configs" / "accelerate" / "one.yaml"
            starter += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        command = [*starter, str(REPOSITORY / self.program)]
        for name, value in self.options.items():
            text = str(value).format(**variables)
            if name == "config":
                text = str(REPOSITORY / text)
            command.append(f"--{name}={text}")
        return command


def read_chain(path: Path) -> list[Step]:
    """Steps of a chain file.

    Raises:
        InputError: no such file, no YAML, or a step with a missing or unknown field.
    """
    try:
        content = yaml.safe_load(path.read_text())
        return [Step(**entry) for entry in content["steps"]]
    except FileNotFoundError as error:
        raise InputError(f"no chain file {path}: see configs/chain/ for those that exist") from error
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is no chain: {' '.join(str(error).split())}; each step has title, program, makes"
        ) from error


def run_chain(steps: list[Step], *, variables: Mapping[str, str], until: str = "") -> None:
    """Run the steps that are not done, in order.

    Args:
        until: stop before the first step of this group.

    Raises:
        InputError: a step ended with an error, or without the file it makes.
    """
    for number, step in enumerate(steps, start=1):
        if until and step.group == until:
            return
        made = step.makes.format(**variables)
        heading = f"[{number}/{len(steps)}] {step.title}"
        if glob(made):
            if not until:  # a part of a chain, run on the way to something else, speaks only of what it does
                report(f"{heading}: done before ({made})")
            continue
        report(heading)
        started = time.monotonic()
        command = step.command(variables)
        code = subprocess.run(command, env=_clean_environment(), check=False).returncode
        if code or not glob(made):
            what = f"ended with exit code {code}" if code else f"left no {made}"
            raise InputError(f"step '{step.title}' {what}; its command: {shlex.join(command)}")
        report(f"[{number}/{len(steps)}] {step.title}: {duration(time.monotonic() - started)}")


def _clean_environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    # accelerate launch takes one thread a process unless told otherwise, and a chain runs one process at a time
    return {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))} | kept


@dataclass
class Config:
    """Run a chain of programs."""

    chain: Path = Path("configs/chain/demo.yaml")
    """Chain file."""
    data: Path = Path("data/demo")
    """Folder for {data} in the chain: where images, shards and labels are."""
    source: Path = Path("data")
    """Folder for {source} in the chain: where data sets of others were unpacked."""
    runs: Path = Path("runs")
    """Folder for {runs} in the chain."""


def main(config: Config) -> None:
    """Run the chain that `config` names."""
    chain = config.chain if config.chain.exists() else REPOSITORY / config.chain
    variables = {"data": str(config.data), "source": str(config.source), "runs": str(config.runs)}
    run_chain(read_chain(chain), variables=variables)


if __name__ == "__main__":
    run_program(main, Config, description="Run a chain of programs, each leaving files for the next.")
