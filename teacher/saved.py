"""The teacher on disk: `runs/<name>/best/` with its weights and what they are, written at once or not at all."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from engine.errors import InputError
from engine.files import atomic_directory
from teacher.config import ModelConfig
from teacher.model import SaliencyModel

FOLDER, WEIGHTS, CONFIG = "best", "model.safetensors", "config.json"
SCHEMA = 1


@dataclass(frozen=True)
class SavedTeacher:
    """A teacher as read from disk.

    Attributes:
        model: in evaluation mode, without gradients, on the CPU.
        hash: SHA-256 of the weights file, hexadecimal: the teacher's name.
        facts: `config.json`: architecture, step, validation metrics, digests of its data, software.
    """

    model: SaliencyModel
    hash: str
    facts: dict[str, Any]


def save_teacher(
    run: Path, state: dict[str, Tensor], *, model: ModelConfig, image_size: tuple[int, int], facts: dict[str, Any]
) -> str:
    """Write `run/best/`, replacing an older one.

    Args:
        state: of a `SaliencyModel`, on the CPU.
        facts: more entries of `config.json`: step, metrics, ...

    Returns:
        The teacher's hash.
    """
    # safetensors refuses tensors that share memory or are strided
    data = save({name: value.contiguous().clone() for name, value in state.items()}, metadata={"format": "pt"})
    digest = hashlib.sha256(data).hexdigest()
    # Where the first weights came from is no part of the architecture that the saved ones fit into.
    architecture = asdict(model) | {"pretrained": None}
    content = {"schema": SCHEMA, "hash": digest, "model": architecture, "image_size": list(image_size), **facts}
    with atomic_directory(run / FOLDER) as temporary:
        (temporary / WEIGHTS).write_bytes(data)
        (temporary / CONFIG).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    return digest


def read_facts(run: Path) -> dict[str, Any]:
    """`config.json` of a run's teacher.

    Raises:
        InputError: no such run, no teacher in it yet, or an unreadable file.
    """
    if not run.is_dir():
        raise InputError(f"no run in {run}: train a teacher first (teacher/main.py), or give its --run and --runs")
    path = run / FOLDER / CONFIG
    if not path.is_file() or not (run / FOLDER / WEIGHTS).is_file():
        raise InputError(f"no teacher in {run / FOLDER}: train that run up to its first validation (teacher/main.py)")
    try:
        facts = json.loads(path.read_text())
        if facts["schema"] != SCHEMA:
            raise ValueError(f"schema {facts['schema']!r}, this version of Saccade reads {SCHEMA}")
        _architecture(facts), str(facts["hash"]), [int(n) for n in facts["image_size"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} describes no teacher ({str(error)[:160]}): train that run again") from error
    return dict(facts)


def load_teacher(run: Path, *, expected: str | None = None) -> SavedTeacher:
    """The best teacher of a run.

    Args:
        expected: the hash it must have; its first characters are enough.

    Raises:
        InputError: see `read_facts`; or weights that were changed, are of another architecture or another teacher's.
    """
    facts = read_facts(run)
    path = run / FOLDER / WEIGHTS
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != facts["hash"]:
        raise InputError(
            f"{path} is not what {CONFIG} beside it names (SHA-256 {digest[:12]}, expected {facts['hash'][:12]}): "
            f"copy the folder again, or train that run again"
        )
    if expected is not None and not (expected and digest.startswith(expected)):
        raise InputError(
            f"{path} is teacher {digest[:12]}, but teacher {expected[:12]} is asked for: give that teacher's run, "
            f"or correct the hash"
        )
    height, width = facts["image_size"]
    model = SaliencyModel(_architecture(facts), image_size=(height, width))
    try:
        model.load_state_dict(load(data))
    except (RuntimeError, SafetensorError) as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is of another architecture than {CONFIG} beside it says ({first}): train that run again"
        ) from error
    return SavedTeacher(model.eval().requires_grad_(False), digest, facts)


def _architecture(facts: dict[str, Any]) -> ModelConfig:
    """What a teacher of an earlier version does not say has its default, which is what that version did."""
    known = {field.name for field in fields(ModelConfig)}
    given = facts["model"]
    if "backbone" not in given or not set(given) <= known:
        raise ValueError(f"model has the keys {sorted(given)}, known are {sorted(known)}")
    return ModelConfig(**given)
