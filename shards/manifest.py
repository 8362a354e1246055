"""The manifest of a shard set: one small JSON file however many samples there are."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.files import atomic_write
from shards.folder import Folder, LocalFolder, open_folder

SCHEMA = 1
FILE_NAME = "manifest.json"
MIN_HASH_CHARACTERS = 8
OBJECT_ENCODING = "coco_rle"

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.tar")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_HASHES = ("sha256", "keys_digest", "index_sha256")


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What the manifest says about one shard; hashes in hexadecimal."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str
    keys_digest: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A shard set. Per-shard values are arrays, so that 100,000 shards stay cheap to open and to send to workers.

    `num_samples_of`, `num_bytes_of`: `(shards,)` int64. `hashes`: name -> `(shards, 32)` uint8 for `sha256`,
    `keys_digest` and `index_sha256`. `extra` holds the other entries (`source`, `gaze`, `settings`, and for labels
    `images` and `teacher`).
    """

    kind: str
    name: str
    classes: tuple[str, ...]
    files: tuple[str, ...]
    num_samples_of: np.ndarray
    num_bytes_of: np.ndarray
    hashes: dict[str, np.ndarray]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.files)

    @property
    def num_samples(self) -> int:
        """Number of samples, quarantined ones included."""
        return int(self.num_samples_of.sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tars."""
        return int(self.num_bytes_of.sum())

    @property
    def digest(self) -> str:
        """Identity of the set: SHA-256 over the shards' SHA-256s in order, hexadecimal."""
        return hashlib.sha256(self.hashes["sha256"].tobytes()).hexdigest()

    @property
    def keys_digest(self) -> str:
        """SHA-256 over the shards' key digests: equal for two sets that hold the same keys in the same order."""
        return hashlib.sha256(self.hashes["keys_digest"].tobytes()).hexdigest()

    def hash_of(self, shard: int, name: str) -> str:
        """One shard's hash in hexadecimal; `name` is `sha256`, `keys_digest` or `index_sha256`."""
        return bytes(self.hashes[name][shard]).hex()


def make_manifest(
    records: Sequence[ShardRecord], *, kind: str, name: str, classes: Sequence[str] = (), **extra: Any
) -> Manifest:
    """Manifest of the given shards; `extra` entries are written as they are."""
    return Manifest(
        kind=kind,
        name=name,
        classes=tuple(classes),
        files=tuple(record.file for record in records),
        num_samples_of=np.array([record.num_samples for record in records], dtype=np.int64),
        num_bytes_of=np.array([record.num_bytes for record in records], dtype=np.int64),
        hashes={key: _hash_array([getattr(record, key) for record in records]) for key in _HASHES},
        extra=dict(extra),
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically, one line per shard; equal manifests give equal bytes."""
    head: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": manifest.kind,
        "name": manifest.name,
        "num_samples": manifest.num_samples,
        "num_bytes": manifest.num_bytes,
        "classes": list(manifest.classes),
        **manifest.extra,
    }
    lines = []
    for shard in range(manifest.num_shards):
        entry: dict[str, Any] = {
            "file": manifest.files[shard],
            "num_samples": int(manifest.num_samples_of[shard]),
            "num_bytes": int(manifest.num_bytes_of[shard]),
        }
        lines.append(json.dumps(entry | {key: manifest.hash_of(shard, key) for key in _HASHES}))
    text = json.dumps(head, indent=1, allow_nan=False, sort_keys=True)
    body = ",\n  ".join(lines)
    atomic_write(Path(directory) / FILE_NAME, f'{text[:-2]},\n "shards": [\n  {body}\n ]\n}}\n'.encode())


def read_manifest(where: Path | str | Folder, *, kind: str | None = None) -> Manifest:
    """Read and check `manifest.json` of the set at a path or URL.

    Args:
        kind: `images` or `labels` where only that kind will do.

    Raises:
        InputError: no manifest, damaged or hostile content, another schema, another kind, a server that fails.
    """
    folder = open_folder(where) if isinstance(where, Path | str) else where
    path = f"{folder.where}/{FILE_NAME}"
    try:
        data = folder.read(FILE_NAME)
    except FileNotFoundError:
        raise InputError(_missing(folder)) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error
    try:
        raw = json.loads(data)
        del data
        manifest = _parse(raw)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)[:160]
        raise InputError(f"{path}: not a valid manifest ({reason}): pack or copy the set again") from error
    if kind is not None and manifest.kind != kind:
        raise InputError(f"{path}: holds {manifest.kind}, but {kind} are needed here: give the folder of {kind}")
    return manifest


def _missing(folder: Folder) -> str:
    if isinstance(folder, LocalFolder):
        directory = folder.where
        if not directory.exists():
            return f"{directory}: no such folder: pack a set first (python shards/pack.py --help) or correct the path"
        if not directory.is_dir():
            return f"{directory}: not a folder: give the folder that holds {FILE_NAME}"
    return f"{folder.where}: no {FILE_NAME} in it: the set is not complete; run the program that writes it again"


def _parse(raw: Any) -> Manifest:
    if not isinstance(raw, dict):
        raise ValueError("the top level is no object")
    schema = raw.pop("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise ValueError(f"schema {schema!r}, this version of Saccade reads {SCHEMA}")
    entries, kind, name, classes = raw.pop("shards"), raw.pop("kind"), raw.pop("name"), raw.pop("classes")
    if kind not in ("images", "labels"):
        raise ValueError(f"kind {kind!r} is neither 'images' nor 'labels'")
    if not isinstance(name, str) or not isinstance(entries, list) or not isinstance(classes, list):
        raise ValueError("name, classes or shards have the wrong type")
    if not all(isinstance(entry, str) for entry in classes):
        raise ValueError("classes are not all texts")
    files = tuple(_shard_name(entry["file"]) for entry in entries)
    if len(set(files)) != len(files):
        raise ValueError("a shard is listed twice")
    manifest = Manifest(
        kind=kind,
        name=name,
        classes=tuple(classes),
        files=files,
        num_samples_of=_counts(entries, "num_samples"),
        num_bytes_of=_counts(entries, "num_bytes"),
        hashes={key: _hash_array([entry[key] for entry in entries]) for key in _HASHES},
        extra=raw,
    )
    for key, total in (("num_samples", manifest.num_samples), ("num_bytes", manifest.num_bytes)):
        if type(raw[key]) is not int or raw.pop(key) != total:
            raise ValueError(f"{key} is not the sum over the shards")
    if kind == "labels":
        _check_size(raw.get("settings"))
    return manifest


def _check_size(settings: Any) -> None:
    """The `size` of maps, where labels name one."""
    if isinstance(settings, dict) and "size" in settings:
        size = settings["size"]
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
            raise ValueError(f"settings.size {str(size)[:40]!r} is no [height, width]")


def _shard_name(name: Any) -> str:
    # A bare file name: no folders, no URL, no `pipe:`, nothing a later join could lead elsewhere.
    if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
        raise ValueError(f"shard name {str(name)[:60]!r} is not a plain .tar file name")
    return name


def _counts(entries: list[Any], key: str) -> np.ndarray:
    values = [entry[key] for entry in entries]
    if not all(type(value) is int and 0 <= value < 2**53 for value in values):
        raise ValueError(f"{key} of a shard is no count")
    if sum(values) >= 2**62:
        raise ValueError(f"{key} adds up to more than can be")
    return np.array(values, dtype=np.int64)


def _hash_array(texts: list[Any]) -> np.ndarray:
    if not all(isinstance(text, str) and _HEX64.fullmatch(text) for text in texts):
        raise ValueError("a hash is not 64 hexadecimal digits")
    return np.frombuffer(bytes.fromhex("".join(texts)), dtype=np.uint8).reshape(len(texts), 32)


def holds_objects(labels: Manifest) -> bool:
    """Whether these labels are objects (`shards/objects.py`) rather than maps."""
    settings = labels.extra.get("settings")
    return isinstance(settings, dict) and settings.get("encoding") == OBJECT_ENCODING


def check_labels(
    where: Path | str,
    labels: Manifest,
    images: Manifest,
    *,
    teacher_hash: str | None = None,
    objects: bool | None = None,
) -> None:
    """Refuse labels that were not written for these images or by this teacher.

    Args:
        teacher_hash: the teacher's checkpoint hash or its first characters, at least 8; None accepts any teacher.
        objects: whether objects are needed, or maps; None accepts both.

    Raises:
        InputError: what differs, and what to do.
    """
    if objects not in (None, holds_objects(labels)):
        have, need = ("maps", "objects") if objects else ("objects", "maps")
        raise InputError(f"{where}: these labels are {have}, but {need} are needed here: give the folder of {need}")
    found = labels.extra.get("images")
    digest = found.get("digest") if isinstance(found, dict) else None
    same_keys = np.array_equal(labels.hashes["keys_digest"], images.hashes["keys_digest"])
    if digest != images.digest or labels.files != images.files or not same_keys:
        raise InputError(
            f"{where}: these labels belong to another image set (they name {str(digest)[:12]}, the images are "
            f"{images.digest[:12]}): label this set, or give the folder of its labels"
        )
    if not np.array_equal(labels.num_samples_of, images.num_samples_of):
        raise InputError(f"{where}: the label shards have other sample counts than the images: write them again")
    teacher = labels.extra.get("teacher")
    written_by = teacher.get("hash") if isinstance(teacher, dict) else None
    if teacher_hash is not None and len(teacher_hash) < MIN_HASH_CHARACTERS:
        raise InputError(
            f"teacher hash {teacher_hash!r}: give at least its first {MIN_HASH_CHARACTERS} characters; these labels "
            f"were written by {str(written_by)[:16]}"
        )
    if teacher_hash is not None and not (isinstance(written_by, str) and written_by.startswith(teacher_hash)):
        raise InputError(
            f"{where}: written by teacher {str(written_by)[:12]}, but teacher {teacher_hash[:12]} is asked for: "
            "label the images with that teacher, or correct the hash"
        )
