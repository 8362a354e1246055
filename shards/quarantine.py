"""The list of bad samples beside a manifest: `shards/verify.py --repair` writes it, readers leave those samples out."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine.errors import InputError
from engine.files import atomic_write
from shards.fetch import DeniedFile
from shards.folder import Folder, open_folder
from shards.manifest import Manifest

SCHEMA = 1
FILE_NAME = "quarantine.json"


@dataclass(frozen=True, slots=True)
class BadEntry:
    """One sample to leave out: shard number, row in it, its key, and why."""

    shard: int
    row: int
    key: str
    reason: str


def write_quarantine(directory: Path, manifest: Manifest, entries: Sequence[BadEntry]) -> None:
    """Write the list; it names the set it belongs to, so that it cannot be applied to another."""
    ordered = sorted(entries, key=lambda entry: (entry.shard, entry.row))
    value = {"schema": SCHEMA, "digest": manifest.digest, "samples": [asdict(entry) for entry in ordered]}
    atomic_write(directory / FILE_NAME, (json.dumps(value, indent=1) + "\n").encode())


def read_quarantine(where: Path | str | Folder, manifest: Manifest) -> list[BadEntry]:
    """The list of the set at a path or URL; empty when there is none.

    Raises:
        InputError: damaged list, or the list of another set.
    """
    folder = open_folder(where) if isinstance(where, Path | str) else where
    path = f"{folder.where}/{FILE_NAME}"
    try:
        raw = json.loads(folder.read(FILE_NAME))
        if type(raw["schema"]) is not int or raw["schema"] != SCHEMA or raw["digest"] != manifest.digest:
            raise ValueError("it belongs to another set or version")
        entries = [BadEntry(e["shard"], e["row"], str(e["key"]), str(e["reason"])) for e in raw["samples"]]
        for entry in entries:
            if not (type(entry.shard) is int and type(entry.row) is int):
                raise ValueError("shard or row is no integer")
            if not (0 <= entry.shard < manifest.num_shards and 0 <= entry.row < manifest.num_samples_of[entry.shard]):
                raise ValueError("an entry lies outside the set")
    except (FileNotFoundError, DeniedFile):
        # The manifest of this folder was readable; a bucket that may not be listed says "denied" of what is not there.
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: unusable list of bad samples ({str(error)[:100]}): delete it and run shards/verify.py --repair"
        ) from error
    return entries


def bad_rows(entries: Sequence[BadEntry]) -> dict[int, np.ndarray]:
    """Rows to leave out of each shard that has any, sorted and without repeats."""
    rows: dict[int, set[int]] = {}
    for entry in entries:
        rows.setdefault(entry.shard, set()).add(entry.row)
    return {shard: np.array(sorted(found), dtype=np.int64) for shard, found in rows.items()}


def order_digest(manifest: Manifest, entries: list[BadEntry]) -> str:
    """Identity of what the order of samples depends on: the set, and which samples are left out."""
    if not entries:
        return manifest.digest
    rows = sorted({(entry.shard, entry.row) for entry in entries})
    return hashlib.sha256(f"{manifest.digest}{rows}".encode()).hexdigest()
