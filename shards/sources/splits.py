"""Fixed splits by rule, for sets that were published without one or of which only a part is at hand.

The order is that of the SHA-256 of the files' names: the same on every machine, and a file that is missing changes the
place of few others.
"""

import hashlib
from collections.abc import Iterable, Sequence

TENTHS_RULE = "by SHA-256 of the file name: 80 % train, 10 % val, 10 % test"
HALVES_RULE = "by SHA-256 of the file name, half of each class: train, test"


def in_tenths(names: Sequence[str], split: str) -> list[str]:
    """The names that `TENTHS_RULE` gives to `train`, `val` or `test`, sorted; of 1,000 they are 800, 100 and 100."""
    ordered = _ordered(names)
    tenth = round(len(ordered) / 10)
    train = len(ordered) - 2 * tenth
    begin, end = {"train": (0, train), "val": (train, train + tenth), "test": (train + tenth, len(ordered))}[split]
    return sorted(ordered[begin:end])


def in_halves(names: Iterable[str], split: str) -> list[str]:
    """The names that `HALVES_RULE` gives to `train` or `test`, sorted; of an odd number train has one more.

    Args:
        names: `class/file` each.
    """
    classes: dict[str, list[str]] = {}
    for name in names:
        classes.setdefault(name.split("/")[0], []).append(name)
    chosen: list[str] = []
    for members in classes.values():
        ordered, half = _ordered(members), (len(members) + 1) // 2
        chosen += ordered[:half] if split == "train" else ordered[half:]
    return sorted(chosen)


def _ordered(names: Iterable[str]) -> list[str]:
    """By the hash of the last part, and by the whole name where two files are called the same."""
    return sorted(names, key=lambda name: (hashlib.sha256(name.rpartition("/")[2].encode()).hexdigest(), name))
