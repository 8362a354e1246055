"""Human gaze read from shards, and predicted maps scored against it the way the field does."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention import metrics
from attention.baselines import leave_image_out
from attention.fixations import pad_fixations
from attention.maps import fixation_density, inside_image, warp
from engine.errors import InputError
from shards.reader import BadSample, ShardSet

METRICS = ("nss", "kld", "cc", "sim", "auc_judd")
CHUNK = 32
_NO_FIXATION = (
    "{root}: not one of {count} samples has a fixation inside its image: pack the set again from images with their gaze"
)


@dataclass(frozen=True)
class GazeTarget:
    """Where people looked in one image.

    Attributes:
        key: the sample's key.
        size: height and width of the image in pixels.
        points: `(num_fixations, 2)` float64 x, y in pixels of the image, counted from 0; some may lie outside it.
        observers: `(num_fixations,)` int64, whose fixation each is; observers count from 0.
        sigma: standard deviation in pixels of the Gaussian that makes a human map of the points.
        shard, row: where the sample stands in its set.
    """

    key: str
    size: tuple[int, int]
    points: np.ndarray
    observers: np.ndarray
    sigma: float
    shard: int
    row: int

    @property
    def num_inside(self) -> int:
        """Fixations inside the image; without any the image cannot be scored."""
        return int(inside_image(self.points, self.size).sum())

    def grid(self, stride: int) -> tuple[int, int]:
        """Height and width of the maps that the image is scored on: a cell is about `stride` pixels."""
        return math.ceil(self.size[0] / stride), math.ceil(self.size[1] / stride)

    def density(self, grid: tuple[int, int], *, sigma: float | None = None) -> np.ndarray:
        """The human map on `grid` (rows, columns), float32, sum 1; `sigma` in pixels, None for the set's own."""
        return fixation_density(self.points, size=self.size, sigma=sigma or self.sigma, grid=grid)


def gaze_sigma(shards: ShardSet) -> float:
    """Sigma in pixels of the human maps of a gaze set, from its manifest.

    Raises:
        InputError: the set was packed without gaze, or its manifest gives no usable sigma.
    """
    gaze = shards.manifest.extra.get("gaze")
    if not isinstance(gaze, dict):
        raise InputError(
            f"{shards.root}: these shards hold no gaze: pack a gaze set (shards/pack.py --source.kind salicon or osie)"
        )
    sigma = gaze.get("sigma")
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
        raise InputError(f"{shards.root}: gaze.sigma is {sigma!r} in manifest.json: pack the gaze set again")
    return float(sigma)


def parse_target(info: dict[str, Any], *, key: str, sigma: float, shard: int, row: int) -> GazeTarget:
    """A target from a sample's JSON member; an image without gaze gives one without points.

    Raises:
        ValueError: no size, or fixations that are no list of [x, y] per observer.
    """
    try:
        size = int(info["height"]), int(info["width"])
        parts = [np.asarray(one, dtype=np.float64).reshape(-1, 2) for one in info.get("fixations") or []]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"unusable gaze entry: {error}") from error
    if min(size) < 1:
        raise ValueError(f"an image of {size[1]}x{size[0]} pixels")
    points = np.concatenate([np.zeros((0, 2)), *parts])
    observers = np.repeat(np.arange(len(parts)), [len(one) for one in parts]).astype(np.int64)
    return GazeTarget(key, size, points, observers, sigma, shard, row)


def load_targets(
    shards: ShardSet, *, sigma: float | None = None, limits: Sequence[int] | np.ndarray | None = None
) -> list[GazeTarget]:
    """Targets of all samples whose gaze can be read, in the order of the shards.

    Args:
        sigma: pixels; None takes the set's own.
        limits: for each shard, the number of its first samples that are taken; None takes all.

    Raises:
        InputError: the set holds no gaze, or not one fixation inside an image.
    """
    targets = list(_targets(shards, sigma=sigma or gaze_sigma(shards), limits=limits))
    if not any(target.num_inside for target in targets):
        raise InputError(_NO_FIXATION.format(root=shards.root, count=shards.num_samples))
    return targets


def check_gaze(shards: ShardSet) -> None:
    """Make sure that the set has gaze, reading no further than the first fixation.

    Raises:
        InputError: as `load_targets`.
    """
    if not any(target.num_inside for target in _targets(shards, sigma=gaze_sigma(shards))):
        raise InputError(_NO_FIXATION.format(root=shards.root, count=shards.num_samples))


def _targets(
    shards: ShardSet, *, sigma: float, limits: Sequence[int] | np.ndarray | None = None
) -> Iterator[GazeTarget]:
    """Targets in the order of the shards; what cannot be read is passed over."""
    for shard in range(len(shards.shard_sizes)):
        try:
            keys = shards.keys(shard)
        except BadSample:
            continue
        for row, key in enumerate(keys if limits is None else keys[: limits[shard]]):
            try:
                info = shards.read_info(shard, row)
                target = parse_target(info, key=key, sigma=sigma, shard=shard, row=row)
            except ValueError:
                continue
            yield target


def score_each(
    targets: Sequence[GazeTarget],
    densities: Sequence[np.ndarray | Tensor] | Tensor,
    *,
    stride: int = 4,
    sigma: float | None = None,
) -> dict[str, np.ndarray]:
    """Score one predicted map per target: NSS, KLD, CC, SIM and AUC-Judd of `attention.metrics`.

    A map of any size is brought to the target's grid (a cell is about `stride` image pixels) by bilinear
    interpolation of the density itself, area-correct where it shrinks, and scaled to sum 1. The human map is the
    Gaussian of the fixations on that grid; fixations are moved to it too.

    Args:
        densities: per target `(rows, columns)`, non-negative, any grid.
        stride: image pixels a cell, 4 as facts for OSIE are given.
        sigma: pixels of the image; None takes each target's own.

    Returns:
        Metric to `(num_targets,)` float64; NaN for images without a fixation inside.

    Raises:
        ValueError: not one density per target.
    """
    if len(targets) != len(densities):
        raise ValueError(f"one density per target is needed, got {len(densities)} for {len(targets)}")
    results = {name: np.full(len(targets), np.nan) for name in METRICS}
    groups: dict[tuple[tuple[int, int], tuple[int, ...]], list[int]] = {}
    for i, target in enumerate(targets):
        if target.num_inside:
            groups.setdefault((target.size, tuple(densities[i].shape)), []).append(i)
    for members in groups.values():
        for start in range(0, len(members), CHUNK):
            chunk = members[start : start + CHUNK]
            maps = torch.stack([torch.as_tensor(densities[i]).detach().float().cpu() for i in chunk])
            scores = _score_chunk([targets[i] for i in chunk], maps, stride=stride, sigma=sigma)
            for name, values in scores.items():
                results[name][chunk] = values.double().numpy()
    return results


def score_densities(
    targets: Sequence[GazeTarget],
    densities: Sequence[np.ndarray | Tensor] | Tensor,
    *,
    stride: int = 4,
    sigma: float | None = None,
) -> dict[str, float]:
    """Means of `score_each` over the images with fixations, with `num_images` scored and `num_skipped`."""
    return mean_scores(score_each(targets, densities, stride=stride, sigma=sigma))


def centre_bias_scores(
    targets: Sequence[GazeTarget], *, stride: int = 4, sigma: float | None = None
) -> dict[str, float]:
    """Scores of the leave-image-out centre bias: each image is predicted by the mean map of all other images.

    Positions count as fractions of the image, so sets of mixed sizes work.

    Raises:
        ValueError: fewer than two images have fixations.
    """
    used = [target for target in targets if target.num_inside]
    if len(used) < 2:
        raise ValueError(f"a leave-image-out centre bias needs 2 images with fixations, got {len(used)}")
    grid = used[0].grid(stride)
    densities = torch.from_numpy(np.stack([target.density(grid, sigma=sigma) for target in used]))
    scores = score_each(used, leave_image_out(densities), stride=stride, sigma=sigma)
    return mean_scores(scores) | {"num_skipped": float(len(targets) - len(used))}


def mean_scores(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the images that were scored; `num_images` and `num_skipped` count them."""
    scored = ~np.isnan(scores["nss"])
    count = int(scored.sum())
    means = {name: float(values[scored].mean()) if count else 0.0 for name, values in scores.items()}
    return means | {"num_images": float(count), "num_skipped": float(len(scored) - count)}


def _score_chunk(targets: list[GazeTarget], maps: Tensor, *, stride: int, sigma: float | None) -> dict[str, Tensor]:
    """Scores of images of one size whose maps are of one size, `(batch,)` each."""
    size, grid = targets[0].size, targets[0].grid(stride)
    prediction = resize_density(maps, grid)
    human = torch.from_numpy(np.stack([target.density(grid, sigma=sigma) for target in targets]))
    points, valid = pad_fixations([target.points for target in targets], size=size, grid=grid)
    return {
        "nss": metrics.nss(prediction, points, valid),
        "kld": metrics.kld(prediction, human),
        "cc": metrics.cc(prediction, human),
        "sim": metrics.sim(prediction, human),
        "auc_judd": metrics.auc_judd(prediction, points, valid),
    }


def resize_density(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Densities `(batch, rows, columns)` on another grid: bilinear, area-correct where it shrinks; not scaled."""
    if tuple(maps.shape[1:]) == grid:
        return maps
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=maps.device).expand(len(maps), 4)
    return warp(maps, whole, torch.zeros(len(maps), dtype=torch.bool, device=maps.device), grid)
