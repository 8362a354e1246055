"""Checkpoints: one directory per step, written under a temporary name and renamed last, complete or absent."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import InputError
from engine.files import atomic_directory, sha256_of

SCHEMA = 1


def save_checkpoint(
    directory: Path, *, step: int, tensors: dict[str, Any], state: dict[str, Any], keep: int = 2
) -> Path:
    """Write `directory/step-<step>/` and remove the oldest beyond `keep`, the new one being complete first.

    Args:
        tensors: file stem to a tree of tensors and plain values, one `<stem>.pt` each.
        state: small JSON values (data position, counters).
    """
    path = directory / f"step-{step:09d}"
    with atomic_directory(path) as temporary:
        for stem, tree in tensors.items():
            torch.save(tree, temporary / f"{stem}.pt")
        files = {p.name: sha256_of(p) for p in sorted(temporary.iterdir())}
        manifest = {"schema": SCHEMA, "step": step, "files": files, "state": state}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Temporary and half-removed directories are no checkpoints."""
    return sorted(p for p in directory.glob("step-*") if (p / "manifest.json").is_file())


def load_checkpoint(path: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Read a checkpoint after checking its hashes.

    Returns:
        Step, tensor trees by file stem, and the small state.

    Raises:
        InputError: a file is missing or was changed.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    tensors = {}
    for name, digest in manifest["files"].items():
        file = path / name
        if not file.is_file() or sha256_of(file) != digest:
            raise InputError(f"checkpoint {path} is damaged at {name}: remove it to go on from an older one")
        tensors[file.stem] = torch.load(file, map_location="cpu", weights_only=True)
    return int(manifest["step"]), tensors, manifest["state"]


def rng_state() -> dict[str, Any]:
    """State of this process's Python, NumPy, torch and CUDA generators, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
