"""What every saliency model is measured beside: uniform, centre bias, one human against the others, split halves.

Gaze is a list of images; an image is a list of observers; an observer is an array `(num_fixations, 2)` of x, y in
pixels of the image, counted from 0. All maps are densities on one grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention.fixations import pad_fixations, shuffled_negatives
from attention.maps import fixation_density, inside_image, to_density
from attention.metrics import evaluate_maps

Gaze = Sequence[Sequence[np.ndarray]]
ROWS = ("uniform", "centre_bias", "one_human", "split_half")


@dataclass(frozen=True)
class MapShape:
    """How gaze becomes maps."""

    size: tuple[int, int]
    """Height and width of the images, pixels."""
    sigma: float
    """Standard deviation of the Gaussian of each fixation, pixels of the image; above 0."""
    grid: tuple[int, int]
    """Height and width of the maps."""

    def density(self, points: np.ndarray) -> Tensor:
        """Density of fixations `(num_fixations, 2)` on the grid: `grid` float32."""
        return torch.from_numpy(fixation_density(points, size=self.size, sigma=self.sigma, grid=self.grid))

    def pad(self, points: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Fixations moved to the grid, as `pad_fixations` gives them."""
        return pad_fixations(points, size=self.size, grid=self.grid)


def uniform(grid: tuple[int, int]) -> Tensor:
    """Return the uniform density on a grid: `grid` float32."""
    return torch.full(grid, 1.0 / (grid[0] * grid[1]))


def leave_image_out(densities: Tensor) -> Tensor:
    """Centre bias of each image: the mean density of all the other images.

    Args:
        densities: `(num_images, height, width)`, of all fixations of each image.

    Returns:
        `(num_images, height, width)` densities of the same type.

    Raises:
        ValueError: fewer than two images.
    """
    if len(densities) < 2:
        raise ValueError(f"a centre bias that leaves the image out needs at least 2 images, got {len(densities)}")
    total = densities.sum(dim=0, dtype=torch.float64)
    # The difference of two near-equal sums can fall a rounding error below 0.
    return to_density((total - densities).clamp(min=0)).to(densities.dtype)


def _all_points(observers: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros((0, 2)), *observers])


@dataclass(frozen=True)
class _Image:
    """Gaze of one image: per observer the fixations inside it, and a map that sums to their number (maps then add)."""

    points: list[np.ndarray]
    masses: Tensor
    given: dict[str, Any]
    """What every row is scored with: negatives and baseline."""

    @classmethod
    def of(cls, observers: Sequence[np.ndarray], *, shape: MapShape, given: dict[str, Any]) -> "_Image":
        points = [each[inside_image(each, shape.size)] for each in observers]
        masses = torch.stack([len(each) * shape.density(each) for each in points])
        return cls(points, masses, given)

    def score_map(self, prediction: Tensor, *, shape: MapShape) -> dict[str, Tensor]:
        """Metrics of one map against all observers."""
        return self._score(prediction[None], self.masses.sum(dim=0)[None], [_all_points(self.points)], shape=shape)

    def score_groups(self, groups: Sequence[Sequence[int]], *, shape: MapShape) -> dict[str, Tensor]:
        """Mean metrics of the map of all others against each group of observers; empty where no group can be scored."""
        member = torch.zeros(len(groups), len(self.points))
        for row, group in enumerate(groups):
            member[row, list(group)] = 1
        counts = torch.tensor([len(each) for each in self.points], dtype=torch.float32)
        scored = ((member @ counts > 0) & ((1 - member) @ counts > 0)).nonzero().flatten().tolist()
        if not scored:
            return {}
        rest, own = (torch.tensordot(side[scored], self.masses, dims=1) for side in (1 - member, member))
        points = [_all_points([self.points[index] for index in groups[row]]) for row in scored]
        return self._score(rest, own, points, shape=shape)

    def _score(
        self, predictions: Tensor, targets: Tensor, points: Sequence[np.ndarray], *, shape: MapShape
    ) -> dict[str, Tensor]:
        padded, valid = shape.pad(points)
        scores = evaluate_maps(predictions, target=targets, fixations=padded, valid=valid, **self.given)
        return {name: values.double().mean() for name, values in scores.items()}


def human_baselines(
    gaze: Gaze, *, shape: MapShape, evaluated: Sequence[int] | None = None, num_negatives: int = 2000, seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """Score what needs no model with every metric of `evaluate_maps`, image by image.

    * uniform: every pixel alike, against all observers;
    * centre_bias: the mean density of all the other images (`leave_image_out`), against all observers;
    * one_human: the map of all other observers against each observer, mean over observers;
    * split_half: the map of a random half of the observers against the other half, mean of both ways.

    Args:
        gaze: per image, per observer, `(num_fixations, 2)` x, y.
        shape: how gaze becomes maps.
        evaluated: indices of the images that are scored (all of them make the centre bias); None for all.
        num_negatives: fixations of other scored images drawn per image for shuffled AUC.
        seed: of the halves and of the draws.

    Returns:
        Row to metric to values `(num_evaluated,)` float64; information gain is over the centre bias. NaN for
        one_human and split_half of an image on which fewer than two observers have fixations.

    Raises:
        ValueError: fewer than two images, or a sigma that is not positive.
    """
    chosen = list(range(len(gaze)) if evaluated is None else evaluated)
    center = leave_image_out(torch.stack([shape.density(_all_points(observers)) for observers in gaze]))
    draws = torch.Generator().manual_seed(seed)
    pool = shape.pad([_all_points(gaze[index]) for index in chosen])
    negatives, usable = shuffled_negatives(*pool, num=num_negatives, generator=draws)
    halves = np.random.default_rng(seed)
    rows: dict[str, list[dict[str, Tensor]]] = {name: [] for name in ROWS}
    for place, index in enumerate(chosen):
        given = {"negatives": negatives[place], "negatives_valid": usable[place], "baseline": center[index]}
        image = _Image.of(gaze[index], shape=shape, given=given)
        order = halves.permutation(len(image.points)).tolist()
        half = len(order) // 2
        rows["uniform"].append(image.score_map(uniform(shape.grid), shape=shape))
        rows["centre_bias"].append(image.score_map(center[index], shape=shape))
        rows["one_human"].append(image.score_groups([[observer] for observer in order], shape=shape))
        rows["split_half"].append(image.score_groups([order[:half], order[half:]], shape=shape))
    return {name: _stack(scores, names=list(rows["uniform"][0])) for name, scores in rows.items()}


def _stack(scores: list[dict[str, Tensor]], *, names: list[str]) -> dict[str, Tensor]:
    missing = torch.tensor(torch.nan, dtype=torch.float64)
    return {name: torch.stack([image.get(name, missing) for image in scores]) for name in names}
