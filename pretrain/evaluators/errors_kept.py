"""Errors under each corruption and severity, one small file each, so that jobs of an array add up."""

import json
from pathlib import Path
from typing import Any

from engine.files import write_json
from pretrain.evaluators.cache import key_digest


class KeptErrors:
    """Errors measured so far under one key, in `folder/errors-<key>/<corruption>-<severity>.json`.

    Args:
        folder: of the cache; None keeps them in memory alone.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any]) -> None:
        self.folder = None if folder is None else folder / f"errors-{key_digest(key)[:32]}"
        self._errors: dict[str, dict[int, float]] = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._read()

    def has(self, condition: tuple[str, int]) -> bool:
        """Whether the error of a corruption and severity is known."""
        return condition[1] in self._errors.get(condition[0], {})

    def put(self, condition: tuple[str, int], error: float, *, write: bool) -> None:
        """Keep an error, 0 to 1; on disk where `write` says so (one rank)."""
        name, severity = condition
        self._errors.setdefault(name, {})[severity] = error
        if self.folder is not None and write:
            write_json(
                self.folder / f"{name}-{severity}.json", {"corruption": name, "severity": severity, "error": error}
            )

    def all(self) -> dict[str, dict[int, float]]:
        """Corruption to severity to error, with what other jobs have finished meanwhile."""
        if self.folder is not None:
            self._read()
        return self._errors

    def _read(self) -> None:
        assert self.folder is not None
        for path in sorted(self.folder.glob("*.json")):
            try:
                found = json.loads(path.read_bytes())
                self._errors.setdefault(str(found["corruption"]), {})[int(found["severity"])] = float(found["error"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a file that cannot be read is measured again
