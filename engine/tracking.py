"""Where metrics go: `metrics.jsonl` always, W&B beside it, both keyed by our own step."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.runs import RunFolder
from engine.settings import TrackerName


class Tracker:
    """Writes metrics and pictures of one run. Only rank 0 makes one.

    W&B runs online when the user is logged in or WANDB_MODE says so, else offline into `runs/<name>/wandb/`. Its id is
    the run's name, so a resumed run goes on in the same history, whose steps are ours. What it cannot write (disk full,
    file system gone) is left out there; `metrics.jsonl` has it as soon as there is room.
    """

    def __init__(self, run: RunFolder, *, backend: TrackerName, project: str, config: Mapping[str, Any]) -> None:
        self.run = run
        self._wandb: Any = None
        if backend == "wandb":
            # imported here, so that `tracker: none` does not pay for it
            import wandb

            self._wandb = wandb.init(
                project=project,
                name=run.name,
                id=re.sub(r"[^A-Za-z0-9_-]", "-", run.name)[:64],
                dir=run.path,
                config=dict(config),
                mode=wandb_mode(),
                resume="allow",
                settings=wandb.Settings(silent=True, x_disable_stats=True),
            )
            self._wandb.define_metric("step")
            self._wandb.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Write named scalars of one step."""
        self.run.log(values, step=step)
        if self._wandb is not None:
            with suppress(OSError):
                self._wandb.log({"step": step, **values}, step=step)

    def images(self, name: str, pictures: list[np.ndarray], *, captions: list[str], step: int) -> None:
        """Send pictures, uint8 `(height, width, 3)`, to W&B; without it they live in the report alone."""
        if self._wandb is not None:
            import wandb

            with suppress(OSError):
                items = [wandb.Image(p, caption=c) for p, c in zip(pictures, captions, strict=True)]
                self._wandb.log({"step": step, name: items}, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int) -> None:
        """Send a table of numbers, text and None to W&B; its step may lie before the last one logged."""
        if self._wandb is not None:
            import wandb

            content = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
            self._wandb.log({"step": step, name: content})

    def finish(self, *, failed: bool = False) -> None:
        """Flush and close W&B."""
        if self._wandb is not None:
            with suppress(OSError):  # it must not hide why the run ends
                self._wandb.finish(exit_code=int(failed))


def wandb_mode() -> Literal["online", "offline", "disabled"]:
    """WANDB_MODE if set, else online for a user who is logged in, else offline."""
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("online", "offline", "disabled"):
        return asked  # type: ignore[return-value]
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    logged_in = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())
    return "online" if logged_in else "offline"
