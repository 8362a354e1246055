"""Image classification from shards: CIFAR-10 and any other labelled set of one image size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from downstream.config import DownstreamConfig, ImageConfig
from downstream.masks import grid_masks
from downstream.models.image import EncoderAttentionNetwork, SmallAttentionNetwork
from downstream.protocol import AttentionModel, Examples, Inputs
from engine.errors import InputError
from pretrain.encoder import load_encoder
from shards.decode import decode_rgb
from shards.reader import ShardSet


@dataclass
class ImageExamples:
    """Images in memory, uint8 `(examples, size, size, 3)`, and where in their shards they stand `(examples, 2)`."""

    keys: Sequence[str]
    images: Tensor
    targets: Tensor
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def inputs(self, rows: np.ndarray) -> Inputs:
        """Images of some rows."""
        return {"images": self.images[torch.from_numpy(rows)]}

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def to(self, device: torch.device) -> "ImageExamples":
        """The same examples on `device`."""
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))

    def part(self, rows: np.ndarray) -> "ImageExamples":
        """The examples of some rows."""
        index = torch.from_numpy(rows)
        return ImageExamples([self.keys[i] for i in rows], self.images[index], self.targets[index], self.places[rows])


class ImageTask:
    """Labelled image shards, a tenth of the training set held out to choose the epoch.

    Raises:
        InputError: unlabelled shards, classes that differ, or no shards to test on.
    """

    def __init__(self, config: DownstreamConfig) -> None:
        data, self.image = config.data, config.image
        if data.val is None:
            raise InputError("data.val is needed by an image task: give the image shards to test on")
        self.shards, test = (ShardSet(path, remote=data.remote) for path in (data.path, data.val))
        if not self.shards.classes or self.shards.classes != test.classes:
            raise InputError(f"{data.path} and {data.val} must be labelled with the same classes: pack them again")
        every = read_images(self.shards, size=self.image.size, seed=data.held_out_seed, limit=data.limit)
        order = np.random.default_rng(data.held_out_seed).permutation(len(every))
        held = len(every) // 10
        self.held_out: Examples = every.part(np.sort(order[:held]))
        self.train: Examples = every.part(np.sort(order[held:]))
        self.test: Examples = read_images(test, size=self.image.size, seed=0, limit=None)
        with torch.random.fork_rng(devices=[]):
            grid = probe_grid(self.build_model(), self.train)
        self.modalities: dict[str, tuple[int, ...]] = {"image": grid}
        self.grid_masks = grid_masks(
            grid, count=self.image.num_masks, scale=self.image.mask_scale, seed=self.image.mask_seed
        )
        self.facts: dict[str, Any] = {
            "sizes": {"train": len(self.train), "held_out": held, "test": len(self.test)},
            "held_out_seed": data.held_out_seed,
            "sha256": {"train": self.shards.digest, "test": test.digest},
        }

    def build_model(self) -> AttentionModel:
        """The small network, or attention on a pretrained encoder."""
        image: ImageConfig = self.image
        common: dict[str, Any] = {"image_size": image.size, "channels": image.channels, "dropout": image.dropout}
        num_classes = len(self.shards.classes)
        if image.encoder is None:
            return SmallAttentionNetwork(num_classes=num_classes, **common)
        backbone = load_encoder(image.encoder)
        return EncoderAttentionNetwork(backbone, num_classes=num_classes, frozen=image.frozen, **common)

    def masks(self, modality: str, inputs: Inputs) -> Tensor:
        """The same masks for every image."""
        return self.grid_masks


def read_images(shards: ShardSet, *, size: int, seed: int, limit: int | None) -> ImageExamples:
    """All readable labelled images of a set, or a random `limit` of them, at `size` x `size` pixels.

    Raises:
        InputError: none can be read, or a label is outside the classes.
    """
    places = [(s, r) for s, count in enumerate(shards.shard_sizes.tolist()) for r in range(count)]
    if limit is not None and limit < len(places):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(places))[:limit])
        places = [places[i] for i in chosen]
    images = np.empty((len(places), size, size, 3), dtype=np.uint8)
    keys: list[str] = []
    targets, read = [], []
    for shard, row in places:
        try:
            sample = shards.read(shard, row)
            pixels = decode_rgb(sample.image)
        except ValueError:
            continue
        if sample.label < 0:
            continue
        if sample.label >= len(shards.classes):
            raise InputError(
                f"{shards.root}: label {sample.label} of {sample.key!r} is outside its {len(shards.classes)} classes"
            )
        if pixels.shape[:2] != (size, size):
            pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
        images[len(keys)] = pixels
        keys.append(sample.key)
        targets.append(sample.label)
        read.append((shard, row))
    if not keys:
        raise InputError(f"{shards.root}: no labelled image can be read; run shards/verify.py on it")
    return ImageExamples(keys, torch.from_numpy(images[: len(keys)]), torch.tensor(targets), np.array(read))


@torch.no_grad()
def probe_grid(model: AttentionModel, examples: Examples) -> tuple[int, int]:
    """Height and width of a model's image map."""
    found = model.eval()(examples.inputs(np.arange(1))).maps["image"]
    return int(found.shape[1]), int(found.shape[2])
