"""Mined surrogates on disk: a folder of parts and a manifest, complete or absent."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from downstream.miner import Surrogates
from engine.errors import InputError
from engine.files import atomic_write, sha256_of, write_json

PART = 1024
SCHEMA = 2


class SurrogateStore:
    """Surrogates of one modality for the examples of a training set, in their order.

    Mining writes part by part, so a killed run goes on with the part it was at; the manifest is written last and names
    what was probed. Maps are stored as float16.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest_file = path / "manifest.json"

    @property
    def complete(self) -> bool:
        """Whether every part is there."""
        return self.manifest_file.is_file()

    def has_part(self, number: int) -> bool:
        """Whether part `number`, examples `PART * number` on, is written."""
        return self._part(number).is_file()

    def write_part(self, number: int, found: Surrogates) -> None:
        """Write one part under a temporary name and rename it."""
        self.path.mkdir(parents=True, exist_ok=True)
        tensors = {"maps": found.maps.half(), "own": found.own.half()}
        tensors |= {"best": found.best, "scores": found.scores, "unmasked": found.unmasked}
        atomic_write(self._part(number), save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))

    def seal(self, keys: Sequence[str], facts: dict[str, Any]) -> None:
        """Write the manifest over all parts; the keys beside them say whose surrogates they are."""
        atomic_write(self.path / "keys.json", json.dumps(list(keys)).encode())
        parts = {self._part(i).name: sha256_of(self._part(i)) for i in range(num_parts(len(keys)))}
        keys_hash = sha256_of(self.path / "keys.json")
        write_json(self.manifest_file, {"schema": SCHEMA, "keys": keys_hash, "parts": parts, **facts})

    @property
    def keys(self) -> list[str]:
        """Whose surrogates they are, of a complete store."""
        return [str(key) for key in json.loads((self.path / "keys.json").read_text())]

    def load(self, keys: Sequence[str]) -> Surrogates:
        """All surrogates, for the examples named by `keys`.

        Raises:
            InputError: nothing complete there, other examples, a damaged part, or values that are not finite.
        """
        if not self.complete:
            raise InputError(f"{self.path} holds no complete surrogates: run the mining step to its end")
        manifest = json.loads(self.manifest_file.read_text())
        if manifest["schema"] != SCHEMA:
            raise InputError(f"{self.path} was mined by another version: remove the folder and mine again")
        if self.keys != list(keys):
            raise InputError(f"{self.path} was mined for other examples: remove it, or give the same data and seed")
        tensors = []
        for name, digest in manifest["parts"].items():
            if not (self.path / name).is_file() or sha256_of(self.path / name) != digest:
                raise InputError(f"{self.path / name} is damaged: remove the folder and mine again")
            tensors.append(load_file(self.path / name))
        found = {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
        if not bool(torch.isfinite(found["maps"]).all()):
            raise InputError(f"{self.path} holds maps that are not finite: remove the folder and mine again")
        maps, own = (_density(found[name].float()) for name in ("maps", "own"))
        return Surrogates(maps, found["best"], found["scores"], found["unmasked"], own)

    def _part(self, number: int) -> Path:
        return self.path / f"part-{number:05d}.safetensors"


def num_parts(examples: int) -> int:
    """Parts that hold `examples`."""
    return -(-examples // PART)


def _density(maps: Tensor) -> Tensor:
    return maps / maps.flatten(1).sum(1).clamp(min=1e-8).view(-1, *[1] * (maps.dim() - 1))
