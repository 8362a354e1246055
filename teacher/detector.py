"""torchvision's Mask R-CNN as a teacher: its weights, the names of its classes, and what it finds as stored objects."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from engine.environment import environment
from engine.errors import InputError
from engine.files import sha256_of
from shards.objects import ObjectMask, encode_objects
from shards.plain import read_plain
from teacher.detect_config import DetectConfig

MASK_THRESHOLD = 0.5
_CLASSES = "roi_heads.box_predictor.cls_score.weight"
_ABSENT = ("N/A", "__background__")


@dataclass(frozen=True)
class Detector:
    """A detector that is ready to use.

    Attributes:
        model: in evaluation mode, on the labelling device.
        categories: name of each class by its number, the background at 0.
        hash: SHA-256 of the file of its weights.
    """

    model: nn.Module
    categories: tuple[str, ...]
    hash: str
    device: torch.device
    config: DetectConfig

    def describe(self) -> dict[str, Any]:
        """What the label manifest says about it. Nothing of it depends on the clock, the machine or the task."""
        software = environment()
        return {
            "hash": self.hash,
            "detector": self.config.model,
            "num_categories": len(self.categories) - 1,
            "software": {name: software[name] for name in ("python", "torch", "numpy")},
        }

    def __call__(self, images: Sequence[Tensor]) -> list[bytes]:
        """Objects of uint8 images `(height, width, 3)` of any size, in the form of label sets (`shards/objects.py`).

        Masks are compressed at once: a shard's worth of them as pixels would not fit in memory.
        """
        kind = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.precision]
        given = [image.to(self.device, non_blocking=True).permute(2, 0, 1).float() / 255 for image in images]
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=kind) if kind else nullcontext():
            found = self.model(given)
        return [self._stored(one, tuple(image.shape[:2])) for one, image in zip(found, images, strict=True)]

    def _stored(self, found: dict[str, Tensor], size: tuple[int, ...]) -> bytes:
        masks: np.ndarray = (found["masks"][:, 0] > MASK_THRESHOLD).cpu().numpy()
        objects = [
            ObjectMask(self.categories[label], min(1.0, score), mask)
            for label, score, mask in zip(found["labels"].tolist(), found["scores"].tolist(), masks, strict=True)
            if self.categories[label] not in _ABSENT
        ]
        return encode_objects(objects, size=(size[0], size[1]))


def load_detector(config: DetectConfig) -> Detector:
    """The detector that the options name, on this process's device.

    Raises:
        InputError: no weights, weights of another architecture, or names that are not as many as its classes.
    """
    path = find_weights(config)
    state = _read_state(path)
    if _CLASSES not in state:
        raise InputError(f"{path}: holds no weights of {config.model} (no {_CLASSES}): give those of a Mask R-CNN")
    categories = _categories(config, num_classes=len(state[_CLASSES]), weights=path)
    model = get_model(
        config.model,
        weights=None,
        weights_backbone=None,
        num_classes=len(categories),
        min_size=config.min_size,
        max_size=config.max_size,
        box_score_thresh=config.threshold,
        box_detections_per_img=config.max_objects,
    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise InputError(f"{path}: is of another architecture than {config.model} ({reason}): see --model") from error
    # the same labels from every task: no kernel is chosen by timing
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    return Detector(model.to(device).eval(), categories, sha256_of(path), device, config)


def find_weights(config: DetectConfig) -> Path:
    """The file of the weights; torchvision's own are fetched into torch's cache where they are not yet there.

    Raises:
        InputError: no such file, or they cannot be fetched.
    """
    if config.weights is not None:
        if not config.weights.is_file():
            raise InputError(f"weights: {config.weights}: no such file: give the weights of {config.model}")
        return config.weights
    weights = get_model_weights(config.model)["COCO_V1"]
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if not path.is_file():
        try:
            weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"weights: {weights.url} is not in torch's cache and cannot be fetched ({str(error)[:80]}): copy it to "
                f"{path}, or give --weights FILE"
            ) from error
    return path


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors have a dozen ways to say that a file is damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"{path}: holds no weights ({reason}): give a state dict (.pth or .safetensors)") from error
    found = state.get("model", state) if isinstance(state, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path}: holds no state dict: save the model's state_dict() alone")
    return found


def _categories(config: DetectConfig, *, num_classes: int, weights: Path) -> tuple[str, ...]:
    if config.categories is None:
        names = tuple(get_model_weights(config.model)["COCO_V1"].meta["categories"])
        source = "COCO's"
    else:
        source = str(config.categories)
        try:
            lines = read_plain(config.categories).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"categories: {source}: cannot be read: give a text file of names") from error
        names = ("__background__", *(line.strip() for line in lines if line.strip()))
    if len(names) != num_classes:
        raise InputError(
            f"categories: {source} are {len(names) - 1} names, {weights} has {num_classes - 1} classes: "
            "give a file with their names, one a line"
        )
    return names
