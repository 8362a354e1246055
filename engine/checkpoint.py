"""Checkpoints: one directory per step, written under a temporary name and renamed last, complete or absent."""

import hashlib
import json
import os
import random
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from engine.errors import InputError
from engine.files import atomic_directory, fsync_directory, sha256_of

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        last: number of newest ones kept.
        every: steps that are multiples of this stay for ever; 0 keeps none for that.
        metric: name of a value in the checkpoints' `state["metrics"]` whose best holder stays; empty keeps none.
        largest: whether the largest value of `metric` is the best.
    """

    last: int = 2
    every: int = 0
    metric: str = ""
    largest: bool = True

    @classmethod
    def parse(cls, *, last: int, every: int, best: str) -> Self:
        """From the options; `best` is empty, `max:NAME` or `min:NAME`.

        Raises:
            InputError: `best` is neither.
        """
        which, _, metric = best.partition(":")
        if best and (which not in ("max", "min") or not metric):
            raise InputError(f"loop.keep_best {best!r}: give max:NAME or min:NAME with a name in metrics.jsonl")
        return cls(last=last, every=every, metric=metric, largest=which == "max")

    def expendable(self, checkpoints: list[Path]) -> list[Path]:
        """Those of `checkpoints`, oldest first, that need not stay."""
        kept = set(checkpoints[-self.last :])
        if self.every:
            kept |= {path for path in checkpoints if step_of(path) % self.every == 0}
        if self.metric:
            values = {path: _read_manifest(path)["state"].get("metrics", {}).get(self.metric) for path in checkpoints}
            sign = 1 if self.largest else -1
            # a value counts for all checkpoints up to the next one, so the oldest of equals is the one it belongs to
            known = [path for path in checkpoints if isinstance(values[path], int | float)]
            kept |= {max(known, key=lambda path: sign * values[path])} if known else set()
        return [path for path in checkpoints if path not in kept]


def save_checkpoint(
    directory: Path, *, step: int, tensors: dict[str, Any], state: dict[str, Any], retention: Retention | None = None
) -> Path:
    """Write `directory/step-<step>/` and remove what `retention` does not keep, the new one being complete first.

    Args:
        tensors: file stem to a tree of tensors and plain values, one `<stem>.pt` each.
        state: small JSON values (data position, counters).

    Raises:
        OSError: nothing could be written: no space, no right to, or the directory is gone (it is not made again: an
            unmounted file system would be replaced by a folder on the local disk).
    """
    if not directory.is_dir():
        raise FileNotFoundError(2, "the folder is gone", str(directory))
    path = directory / f"step-{step:09d}"
    with atomic_directory(path) as temporary:
        files = {f"{stem}.pt": _write_tree(temporary / f"{stem}.pt", tree) for stem, tree in sorted(tensors.items())}
        manifest = {"schema": SCHEMA, "step": step, "files": files, "state": state}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
    with suppress(OSError):  # the new one is complete; what cannot be removed now is tried again after the next
        for old in (retention or Retention()).expendable(list_checkpoints(directory)):
            _remove(old)
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Temporary and half-removed directories are no checkpoints."""
    return sorted(p for p in directory.glob("step-*") if (p / MANIFEST).is_file())


def step_of(path: Path) -> int:
    """The step after which the checkpoint at `path` was written."""
    return int(path.name.removeprefix("step-"))


def clear_leftovers(directory: Path) -> None:
    """Remove what a killed process left half-written or half-removed; nobody else may be writing there."""
    for path in directory.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Read a checkpoint after checking its hashes.

    Returns:
        Step, tensor trees by file stem, and the small state.

    Raises:
        InputError: a file is missing or was changed.
    """
    manifest = _read_manifest(path)
    tensors = {}
    for name, digest in manifest["files"].items():
        file = path / name
        if not file.is_file() or sha256_of(file) != digest:
            raise InputError(f"checkpoint {path} is damaged at {name}: remove it to go on from an older one")
        tensors[file.stem] = torch.load(file, map_location="cpu", weights_only=True)
    return int(manifest["step"]), tensors, manifest["state"]


def rng_state() -> dict[str, Any]:
    """State of this process's Python, NumPy, torch and (of its own GPU) CUDA generators: tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == 1:  # none where the CPU computed
        torch.cuda.set_rng_state(state["cuda"][0])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


class _HashedFile:
    """A file for torch.save that hashes what passes, so that it need not be read back, and keeps the first error."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=0)
        self.hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        self.hash.update(view)
        try:
            done = 0
            while done < len(view):
                done += self.file.write(view[done:])
        except OSError as error:
            self.error = self.error or error
            raise
        return done

    def flush(self) -> None:
        """Nothing is buffered here."""


def _write_tree(path: Path, tree: Any) -> str:
    """Write `tree` and return the SHA-256 of the file."""
    target = _HashedFile(path)
    try:
        torch.save(tree, target)  # type: ignore[arg-type]
    except Exception:
        if target.error is not None:  # torch reports a full disk as an error of its archive
            raise OSError(target.error.errno, os.strerror(target.error.errno or 0), str(path)) from None
        raise
    finally:
        target.file.close()
    return target.hash.hexdigest()


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves a hidden rest, never a checkpoint with files missing."""
    hidden = path.with_name(f".{path.name}.old")
    if hidden.exists():
        shutil.rmtree(hidden)
    os.rename(path, hidden)
    fsync_directory(path.parent)
    shutil.rmtree(hidden)


def _read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())
