"""Whether a captioner looks at the object that a word names."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from downstream.captioning.matching import grid_labels

THRESHOLDS = np.linspace(0.05, 0.95, 19)


@dataclass
class Correctness:
    """Maps against masks, one entry per word that names a detected object.

    Attributes:
        mass: share of the map inside the mask; `chance` is that of a uniform map.
        hits: whether the map's highest place is a cell of the object (the pointing game, Zhang et al., 2016).
        ious: intersection over union of the cells above each of `THRESHOLDS` times the map's maximum.
    """

    mass: list[float] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    ious: list[list[float]] = field(default_factory=list)

    def add(self, density: np.ndarray, coverage: np.ndarray) -> None:
        """Compare one map `(height, width)` of sum 1 with the coverage of the cells by the object; a void one not."""
        if coverage.max() <= 0:
            return
        labels = grid_labels(torch.from_numpy(coverage).flatten()).numpy().reshape(coverage.shape)
        self.mass.append(float((density * coverage).sum()))
        self.chance.append(float(coverage.mean()))
        self.hits.append(float(labels.flat[int(density.argmax())]))
        above = density >= THRESHOLDS[:, None, None] * density.max()
        union = (above | labels).sum(axis=(1, 2))
        self.ious.append(((above & labels).sum(axis=(1, 2)) / union).tolist())

    def extend(self, others: Sequence["Correctness"]) -> None:
        """Take over the entries of others, such as those of other ranks."""
        for other in others:
            self.mass += other.mass
            self.chance += other.chance
            self.hits += other.hits
            self.ious += other.ious

    def metrics(self) -> dict[str, float]:
        """Means over the words; the IoU at the one threshold that is best for all of them. Empty without words."""
        if not self.mass:
            return {}
        curve = np.mean(self.ious, axis=0)
        return {
            "attention/mass": float(np.mean(self.mass)),
            "attention/mass_of_uniform": float(np.mean(self.chance)),
            "attention/pointing": float(np.mean(self.hits)),
            "attention/iou": float(curve.max()),
            "attention/iou_threshold": float(THRESHOLDS[int(curve.argmax())]),
            "attention/words": float(len(self.mass)),
        }
