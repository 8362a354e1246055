"""Frozen features of a whole shard set: each sample once over all ranks, in the set's order."""

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.errors import InputError
from engine.loading import make_loader
from pretrain.augment import normalize
from pretrain.evaluators.base import Subject
from pretrain.model import input_statistics
from pretrain.probe_config import ProbeConfig
from shards.decode import decode_rgb
from shards.order import shard_rows_for_rank
from shards.reader import ShardSet


class CentreCrops(Dataset[tuple[Tensor, Tensor]]):
    """Images as uint8 `(batch, size, size, 3)`: the centre `crop` share of the shorter side; with `crop` 0 the whole.

    A sample that cannot be read has label -2; the caller counts it.
    """

    def __init__(self, shards: ShardSet, *, size: int, crop: float) -> None:
        self.shards, self.size, self.crop = shards, size, crop

    def __getitem__(self, position: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """Read one batch of (epoch, shard, row)."""
        images = np.zeros((len(positions), self.size, self.size, 3), dtype=np.uint8)
        labels = np.full(len(positions), -2, dtype=np.int64)
        for i, (_, shard, row) in enumerate(positions):
            try:
                sample = self.shards.read(shard, row)
                images[i] = fit_square(decode_rgb(sample.image), size=self.size, crop=self.crop)
                labels[i] = sample.label
            except ValueError:
                continue
        return torch.from_numpy(images), torch.from_numpy(labels)


def fit_square(image: np.ndarray, *, size: int, crop: float) -> np.ndarray:
    """Resize uint8 `(height, width, 3)` to a square; with `crop` > 0, the centre of that share of the shorter side."""
    height, width = image.shape[:2]
    if crop > 0:
        side = max(1, round(crop * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    shrinking = min(image.shape[:2]) > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)


def image_batches(subject: Subject, probe: ProbeConfig, shards: ShardSet, *, crop: float) -> Any:
    """Loader of this rank's normalised images `(batch, 3, size, size)` and labels, in order."""
    rows = shard_rows_for_rank(shards.shard_sizes, rank=subject.ranks.rank, world_size=subject.ranks.world_size)
    dataset = CentreCrops(shards, size=subject.config.data.image_size, crop=crop)
    parts = [rows[i : i + probe.batch_size].tolist() for i in range(0, len(rows), probe.batch_size)]
    loader = make_loader(dataset, parts, num_workers=min(probe.num_workers, len(parts)))
    mean, std = input_statistics(subject.backbone)
    for pixels, labels in loader:
        images = pixels.to(subject.device).permute(0, 3, 1, 2).float() / 255
        yield normalize(images, mean=mean, std=std), labels


def pooled_features(subject: Subject, probe: ProbeConfig, shards: ShardSet) -> tuple[Tensor, Tensor]:
    """Pooled features of every readable labelled sample.

    Returns:
        float32 `(num_samples, num_features)` and int64 `(num_samples,)`, on CPU, the same on every rank.

    Raises:
        InputError: no labelled sample could be read.
    """
    features, labels = [], []
    with torch.inference_mode():
        for images, classes in image_batches(subject, probe, shards, crop=probe.crop):
            final = subject.backbone.forward_features(images)
            pooled = subject.backbone.forward_head(final, pre_logits=True)
            keep = classes >= 0
            features.append(pooled.float().cpu()[keep])
            labels.append(classes[keep])
    parts = subject.ranks.gather((torch.cat(features), torch.cat(labels)) if features else None)
    parts = [part for part in parts if part is not None]
    all_labels = torch.cat([part[1] for part in parts]) if parts else torch.zeros(0)
    if len(all_labels) == 0:
        raise InputError(f"{shards.root}: no labelled sample can be read; a probe needs image shards with classes")
    skipped = shards.num_samples - len(all_labels)
    if skipped:
        subject.report(f"{shards.root}: {skipped} of {shards.num_samples} samples unreadable or unlabelled, left out")
    return torch.cat([part[0] for part in parts]), all_labels
