"""The run folder: `runs/<name>/` with its config, metrics, checkpoints and summary. Its name alone identifies a run."""

import json
import math
import re
import statistics
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from engine.environment import environment
from engine.errors import InputError
from engine.files import HANG_S, append_lines, atomic_write, give_time, read_lines, write_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,127}")


class RunFolder:
    """One run's files. Opening it twice with the same config is how a stopped run goes on.

    Attributes:
        latest: newest value of every metric logged so far.
        unwritten: lines of metrics that wait for a file system that takes them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics_file = path / "metrics.jsonl"
        self.config_file = path / "config.yaml"
        self.summary_file = path / "summary.json"
        self.bad_batches_file = path / "bad_batches.jsonl"
        self.order = path / "order"
        self.latest: dict[str, Any] = {}
        self.unwritten: list[str] = []
        self._writing: threading.Thread | None = None

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
        """Append one line to `metrics.jsonl`; a value that is not finite is written as a string, to stay JSON.

        Lines that cannot be written now (disk full, file system gone or not answering) wait in `unwritten` for the
        next call.
        """
        line = {"step": step, **{k: v if math.isfinite(v) else str(v) for k, v in values.items()}}
        self.latest.update(line)
        self.unwritten.append(json.dumps(line))
        if self._writing is None or not self._writing.is_alive():  # what hangs is not waited for again
            self.flush()

    def flush(self) -> None:
        """Try again to write the lines that could not be written."""
        if self._writing is not None:
            self._writing.join(HANG_S)
        if self.unwritten and (self._writing is None or not self._writing.is_alive()):
            self._writing = give_time(self._write_lines)

    def _write_lines(self) -> None:
        lines = list(self.unwritten)
        with suppress(OSError):
            append_lines(self.metrics_file, *lines)
            del self.unwritten[: len(lines)]

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Lines of `metrics.jsonl`; a last line cut off by a kill is left out."""
        return read_lines(self.metrics_file)

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run writes it again."""
        for path in (self.metrics_file, self.bad_batches_file, *sorted(self.order.glob("rank-*.jsonl"))):
            if path.exists():
                kept = [line for line in read_lines(path) if line["step"] <= step]
                atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        for line in self.metrics():
            self.latest.update(line)

    def write_summary(self, metrics: Mapping[str, Any], *, step: int, **more: Any) -> None:
        """Merge `metrics` into `summary.json`: `{"run", "step", "metrics", "environment"}` and what else is given.

        Of `time/...`, logged as means of a few steps each, the summary has the median over the run.
        """
        old = self.read_summary()
        merged = {**old.get("metrics", {}), **metrics, **self._median_times(metrics)}
        rest = {k: v for k, v in old.items() if k not in ("run", "step", "metrics", "environment")}
        write_json(
            self.summary_file,
            {"run": self.name, "step": step, "metrics": merged, "environment": environment(), **rest, **more},
        )

    def _median_times(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        names = [name for name in metrics if name.startswith("time/")]
        lines = list(self.metrics()) if names else []
        values = {name: [line[name] for line in lines if name in line] for name in names}
        return {name: statistics.median(found) for name, found in values.items() if found}

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
