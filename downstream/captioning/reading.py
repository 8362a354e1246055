"""Files that people bring, read with one clear line for what is wrong with them; and the count of what is left out."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import InputError


def read_text(path: Path, *, remedy: str) -> str:
    """A text file in UTF-8.

    Raises:
        InputError: missing, a folder, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start}); {remedy}") from error


def read_json(path: Path, *, remedy: str) -> Any:
    """A JSON file.

    Raises:
        InputError: missing, or no JSON.
    """
    try:
        return json.loads(read_text(path, remedy=remedy))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no JSON ({error}); {remedy}") from error


def entries_of(content: Any, key: str, fields: Mapping[str, type | tuple[type, ...]], *, path: Path) -> list[Any]:
    """The list of objects under `key`, each with `fields` of the given types.

    Raises:
        InputError: no such list, or an entry without one of the fields; it is named by its place.
    """
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{path} has no list '{key}': give a file in the layout that the options name")
    for number, entry in enumerate(entries):
        for field, kind in fields.items():
            value = entry.get(field) if isinstance(entry, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"{path}, entry {number} of '{key}': '{field}' is missing or of the wrong type")
    return entries


def check_skipped(
    skipped: Mapping[str, int], *, of: int, what: str, where: Path, limit: float, tell: Callable[[str], None]
) -> None:
    """Report what had to be left out, and stop where it is too much.

    Args:
        skipped: reason to count.
        what: the plural of what is counted.

    Raises:
        InputError: more than `limit` of all.
    """
    total = sum(Counter(skipped).values())
    if not total:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
    if total > limit * of:
        raise InputError(
            f"{where}: {total} of {of} {what} cannot be used ({reasons}); mend the data, or raise caption.max_skipped "
            f"{limit:g}"
        )
    tell(f"{total} of {of} {what} left out ({reasons})")
