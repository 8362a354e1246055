"""Numbers measured under each corruption and severity, one small file each, so that jobs of an array add up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.files import write_json
from pretrain.evaluators.cache import key_digest
from pretrain.evaluators.corruptions import ALL

Condition = tuple[str, int]


class KeptNumbers:
    """Numbers measured so far under one key, in `folder/<kind>-<key>/<corruption>-<severity>.json`.

    Args:
        folder: of the cache; None keeps them in memory alone.
        kind: what they are, for the folder's name.
        names: of the numbers of one condition.
        images: digest of a condition's images as they are now, where `key` does not decide them.
    """

    def __init__(
        self,
        folder: Path | None,
        key: dict[str, Any],
        *,
        kind: str,
        names: tuple[str, ...],
        images: Callable[[Condition], str] = lambda condition: "",
    ) -> None:
        self.folder = None if folder is None else folder / f"{kind}-{key_digest(key)[:32]}"
        self.names, self.images = names, images
        self._found: dict[Condition, tuple[float, ...]] = {}
        self._measured_on: dict[Condition, str] = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._read()

    def has(self, condition: Condition) -> bool:
        """Whether a corruption and severity was measured, on the images that are there now."""
        return condition in self._found and self._measured_on[condition] == self.images(condition)

    def put(self, condition: Condition, *numbers: float, write: bool) -> None:
        """Keep the numbers of a condition; on disk where `write` says so (one rank)."""
        self._found[condition], self._measured_on[condition] = numbers, self.images(condition)
        if self.folder is not None and write:
            name, severity = condition
            piece = {"corruption": name, "severity": severity, "images": self._measured_on[condition]}
            values = dict(zip(self.names, numbers, strict=True))
            write_json(self.folder / f"{name}-{severity}.json", piece | values)

    def all(self) -> dict[Condition, tuple[float, ...]]:
        """Condition to numbers, in the corruptions' order, with what other jobs have finished meanwhile.

        Theirs are taken as they kept them: `has` looks at the images, and every job asks it of its own conditions.
        """
        if self.folder is not None:
            self._read()
        return dict(sorted(self._found.items(), key=lambda item: (ALL.index(item[0][0]), item[0][1])))

    def _read(self) -> None:
        assert self.folder is not None
        for path in sorted(self.folder.glob("*.json")):
            try:
                found = json.loads(path.read_bytes())
                condition = ALL[ALL.index(found["corruption"])], int(found["severity"])
                self._found[condition] = tuple(float(found[name]) for name in self.names)
                self._measured_on[condition] = str(found.get("images", ""))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a file that cannot be read is measured again
