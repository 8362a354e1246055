"""The run folder: `runs/<name>/` with its config, metrics, checkpoints and summary. Its name alone identifies a run."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from engine.environment import environment
from engine.errors import InputError
from engine.files import atomic_write, write_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,127}")


class RunFolder:
    """One run's files. Opening it twice with the same config is how a stopped run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics_file = path / "metrics.jsonl"
        self.config_file = path / "config.yaml"
        self.summary_file = path / "summary.json"

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.path.name

    def claim(self, config: Mapping[str, Any], *, free: frozenset[str] = frozenset()) -> None:
        """Create the folder for `config`, or check that it was created for the same one.

        Args:
            config: the resolved config as nested plain values.
            free: dotted keys (or prefixes of them) that may change between two parts of one run.

        Raises:
            InputError: the folder belongs to another config, or its name is no plain file name.
        """
        check_run_name(self.name)
        if not self.config_file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            atomic_write(self.config_file, yaml.safe_dump(dict(config), sort_keys=False).encode())
            return
        old, new = flatten(self.read_config()), flatten(config)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and not any(key == k or key.startswith(f"{k}.") for k in free):
                raise InputError(
                    f"run folder {self.path} belongs to another config: {key} is {old.get(key)!r} there and "
                    f"{new.get(key)!r} here; choose another --run, or remove that folder to start again"
                )

    def read_config(self) -> dict[str, Any]:
        """The resolved config that the run was started with."""
        if not self.config_file.is_file():
            raise InputError(f"no run in {self.path}: config.yaml is missing; give the folder that a training wrote")
        return yaml.safe_load(self.config_file.read_text())

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Append one line to `metrics.jsonl`; a value that is not finite is written as a string, to stay JSON."""
        line = {"step": step, **{k: v if math.isfinite(v) else str(v) for k, v in values.items()}}
        with open(self.metrics_file, "a") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Lines of `metrics.jsonl`; a last line cut off by a kill is left out."""
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines after `step`: a resumed run writes them again."""
        if self.metrics_file.exists():
            kept = [line for line in self.metrics() if line["step"] <= step]
            atomic_write(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write_summary(self, metrics: Mapping[str, Any], *, step: int, **more: Any) -> None:
        """Merge `metrics` into `summary.json`: `{"run", "step", "metrics", "environment"}` and what else is given."""
        old = self.read_summary()
        merged = {**old.get("metrics", {}), **metrics}
        rest = {k: v for k, v in old.items() if k not in ("run", "step", "metrics", "environment")}
        write_json(
            self.summary_file,
            {"run": self.name, "step": step, "metrics": merged, "environment": environment(), **rest, **more},
        )

    def read_summary(self) -> dict[str, Any]:
        """`summary.json`, or an empty dictionary before there is one."""
        return json.loads(self.summary_file.read_text()) if self.summary_file.exists() else {}


def check_run_name(name: str) -> None:
    """Refuse names that are no plain folder name.

    Raises:
        InputError: empty, too long, or with characters that file systems and W&B do not share.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"run name {name!r} is not usable: take letters, digits and . _ + = - (at most 128)")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping as `{"a.b": value}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
