"""Cached outputs of encoders: one safetensors file per part, named by what decides its content."""

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.files import atomic_write
from engine.ranks import Ranks

Outputs = dict[str, Tensor]


def key_digest(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value; of what JSON does not know (paths), of its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def tensor_digest(value: Tensor) -> str:
    """Hexadecimal SHA-256 of a tensor's values."""
    return hashlib.sha256(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


class PartCache:
    """Parts of one computation, `folder/<first of key's digest>/<start>.safetensors`.

    A file is written under another name and renamed, so a kill leaves whole parts only. What is nevertheless damaged
    (cut short, changed, of another computation) is reported and counts as absent.

    Args:
        folder: of all computations; None keeps nothing.
        key: everything that decides the content.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any], *, report: Callable[[str], None]) -> None:
        self.digest = key_digest(key)
        self.folder = None if folder is None else folder / self.digest[:32]
        self.report = report
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, part: tuple[int, int]) -> Outputs | None:
        """The outputs of images `part[0]` to `part[1] - 1`, or None."""
        path = self._path(part)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                marks = file.metadata() or {}
                outputs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError, ValueError) as error:
            self._refuse(path, str(error))
            return None
        if marks.get("key") != self.digest or marks.get("part") != f"{part[0]}-{part[1]}":
            self._refuse(path, "it belongs to another computation")
            return None
        if marks.get("crc") != _crc(outputs) or any(len(value) != part[1] - part[0] for value in outputs.values()):
            self._refuse(path, "its content has changed since it was written")
            return None
        return outputs

    def holds(self, part: tuple[int, int]) -> bool:
        """Whether there is a file for that part, sound or not."""
        path = self._path(part)
        return path is not None and path.is_file()

    def store(self, part: tuple[int, int], outputs: Outputs) -> None:
        """Keep the outputs of one part."""
        path = self._path(part)
        if path is not None:
            marks = {"key": self.digest, "part": f"{part[0]}-{part[1]}", "crc": _crc(outputs)}
            atomic_write(path, save({name: value.contiguous() for name, value in outputs.items()}, metadata=marks))

    def _path(self, part: tuple[int, int]) -> Path | None:
        return None if self.folder is None else self.folder / f"{part[0]:09d}.safetensors"

    def _refuse(self, path: Path, reason: str) -> None:
        self.report(f"cache {path} is damaged ({reason}): computed again")


def kept_tensors(
    folder: Path | None, name: str, key: dict[str, Any], make: Callable[[], Outputs], *, ranks: Ranks
) -> Outputs:
    """What `make` gives, made once per key: kept in `folder/<name>-<first of key's digest>.safetensors`.

    What rank 0 finds or does not find decides for all, as other jobs write at any time.

    Args:
        folder: None keeps nothing.
        key: everything that decides the content.
        make: called by every rank, or by none.

    Returns:
        Rank 0's tensors, on CPU.
    """
    digest = key_digest(key)
    path = None if folder is None else folder / f"{name}-{digest[:32]}.safetensors"
    found = ranks.broadcast(_read_tensors(path, digest) if path is not None and ranks.is_main else None)
    if found is not None:
        return found
    made = ranks.broadcast({each: value.detach().cpu().contiguous() for each, value in make().items()})
    if path is not None and ranks.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, save(made, metadata={"key": digest, "crc": _crc(made)}))
    return made


def _read_tensors(path: Path, digest: str) -> Outputs | None:
    """Tensors written under that key; None where they are absent or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            marks = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, ValueError):
        return None
    return found if marks.get("key") == digest and marks.get("crc") == _crc(found) else None


def _crc(outputs: Outputs) -> str:
    """CRC-32 over the tensors in the order of their names."""
    value = 0
    for name in sorted(outputs):
        value = zlib.crc32(outputs[name].contiguous().numpy().tobytes(), value)
    return f"{value:08x}"
