"""Maps against human gaze by every metric of `attention/`, with what needs no model beside."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention.baselines import ROWS, MapShape, human_baselines, leave_image_out, uniform
from attention.fixations import shuffled_negatives
from attention.maps import inside_image
from attention.metrics import emd, evaluate_maps, spearman
from engine.files import write_json
from pretrain.evaluators.cache import key_digest
from shards.gaze import CHUNK, GazeTarget, resize_density

Values = dict[str, np.ndarray]


def slow_metrics() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Of two batches of maps, those that `evaluate_maps` leaves out: Spearman, and EMD where POT is installed."""
    return {"spearman": spearman, "emd": emd} if find_spec("ot") else {"spearman": spearman}


def emd_note() -> str:
    """How EMD was computed, or why not, for protocols."""
    return "by POT on at most 14 x 14 cells" if "emd" in slow_metrics() else "left out: POT is not installed"


@dataclass(frozen=True)
class _Group:
    """Images of one size, and what they are scored with; one image alone has no others to compare with."""

    numbers: list[int]
    shape: MapShape
    human: Tensor
    points: Tensor
    valid: Tensor
    others: dict[str, Tensor]

    def given(self, rows: slice) -> dict[str, Any]:
        """Negatives and centre bias of some of the images."""
        return {name: value[rows] for name, value in self.others.items()}

    @property
    def targets(self) -> int:
        return len(self.numbers)


class GazeRows:
    """Scores rows of maps for one set of gaze targets, all with the same human maps, negatives and centre bias.

    Args:
        targets: images without a fixation inside are left out.
        stride: image pixels per cell of the maps that are compared.
        negatives: fixations of other images of the same size drawn per image, for shuffled AUC.
        seed: of those draws and of the split halves.
    """

    def __init__(self, targets: Sequence[GazeTarget], *, stride: int, negatives: int, seed: int) -> None:
        self.targets, self.stride, self.negatives, self.seed = targets, stride, negatives, seed
        self.slow = slow_metrics()
        sizes: dict[tuple[int, int], list[int]] = {}
        for number, target in enumerate(targets):
            if target.num_inside:
                sizes.setdefault(target.size, []).append(number)
        self.groups = [self._group(numbers) for numbers in sizes.values()]

    def _group(self, numbers: list[int]) -> _Group:
        chosen = [self.targets[number] for number in numbers]
        first = chosen[0]
        shape = MapShape(size=first.size, sigma=first.sigma, grid=first.grid(self.stride))
        human = torch.stack([shape.density(target.points) for target in chosen])
        points, valid = shape.pad([target.points for target in chosen])
        others: dict[str, Tensor] = {}
        if len(chosen) > 1:
            draws = torch.Generator().manual_seed(self.seed)
            negatives, usable = shuffled_negatives(points, valid, num=self.negatives, generator=draws)
            others = {"negatives": negatives, "negatives_valid": usable, "baseline": leave_image_out(human)}
        return _Group(numbers, shape, human, points, valid, others)

    def score_each(self, densities: Sequence[np.ndarray | Tensor] | Tensor) -> Values:
        """Metrics of one density per target, on any grid: name to `(num_targets,)`, NaN where there is none."""
        results: Values = {}
        for group in self.groups:
            for start in range(0, group.targets, CHUNK):
                rows = slice(start, start + CHUNK)
                numbers = group.numbers[rows]
                maps = torch.stack([torch.as_tensor(densities[n]).float() for n in numbers])
                maps = resize_density(maps, group.shape.grid)
                scores = evaluate_maps(
                    maps,
                    target=group.human[rows],
                    fixations=group.points[rows],
                    valid=group.valid[rows],
                    **group.given(rows),
                )
                scores |= {name: metric(maps, group.human[rows]) for name, metric in self.slow.items()}
                scores.pop("num_fixations")
                for name, values in scores.items():
                    place = results.setdefault(name, np.full(len(self.targets), np.nan))
                    place[numbers] = values.double().numpy()
        return results

    def baselines(self, cache: Path | None, *, digest: str) -> dict[str, dict[str, float]]:
        """Mean scores of uniform, centre_bias, one_human and split_half; computed once per set where there is a cache.

        Args:
            digest: identity of the gaze set.
        """
        keys = key_digest([target.key for target in self.targets])
        key = key_digest([digest, self.stride, self.negatives, self.seed, keys, ROWS, list(self.slow)])[:32]
        path = cache / f"gaze-baselines-{key}.json" if cache is not None else None
        if path is not None and path.is_file():
            try:
                found: dict[str, dict[str, float]] = json.loads(path.read_bytes())
                return found
            except ValueError:
                pass  # damaged: computed again
        rows = self._baselines()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, rows)
        return rows

    def _baselines(self) -> dict[str, dict[str, float]]:
        collected: dict[str, dict[str, list[Tensor]]] = {}
        for group in self.groups:
            if group.targets < 2:
                continue
            gaze = [_by_observer(self.targets[number]) for number in group.numbers]
            found = human_baselines(gaze, shape=group.shape, num_negatives=self.negatives, seed=self.seed)
            for row, columns in found.items():
                for name, values in (columns | self._slow_columns(group, row)).items():
                    collected.setdefault(row, {}).setdefault(name, []).append(values)
        rows = {
            row: means({name: torch.cat(parts).numpy() for name, parts in scores.items()})
            for row, scores in collected.items()
        }
        return {row: {k: v for k, v in found.items() if k != "num_fixations"} for row, found in rows.items() if found}

    def _slow_columns(self, group: _Group, row: str) -> dict[str, Tensor]:
        """The slow metrics of a baseline, `(group.targets,)` float64, NaN where there is none."""
        pairs: dict[str, Callable[[], Iterator[tuple[Tensor, Tensor]]]] = {
            "uniform": lambda: ((uniform(group.shape.grid)[None], human) for human in group.human[:, None]),
            "centre_bias": lambda: zip(group.others["baseline"][:, None], group.human[:, None], strict=True),
            "one_human": lambda: self._observers(group),
            "split_half": lambda: self._halves(group),
        }
        columns: dict[str, list[Tensor]] = {}
        for first, second in pairs[row]():
            for name, metric in self.slow.items():
                columns.setdefault(name, []).append(metric(first, second).double().nanmean())
        return {name: torch.stack(values) for name, values in columns.items()}

    def _observers(self, group: _Group) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each image the map of all other observers and that of each, `(observers, rows, columns)`."""
        for number in group.numbers:
            observers = _by_observer(self.targets[number])
            numbers = range(len(observers))
            others = [[other for other in numbers if other != one] for one in numbers]
            yield (
                torch.stack([_group_map(observers, chosen, group.shape) for chosen in others]),
                torch.stack([_group_map(observers, [one], group.shape) for one in numbers]),
            )

    def _halves(self, group: _Group) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps of two halves of each image's observers, drawn as `human_baselines` draws them.

        The slow metrics stay the same when the maps change places: one way stands for both.
        """
        rng = np.random.default_rng(self.seed)
        for number in group.numbers:
            observers = _by_observer(self.targets[number])
            order = rng.permutation(len(observers)).tolist()
            half = len(order) // 2
            first, second = (_group_map(observers, side, group.shape)[None] for side in (order[:half], order[half:]))
            yield first, second


def means(values: Values) -> dict[str, float]:
    """Mean of each metric over the images that have it; a metric that none has is left out."""
    return {name: float(np.nanmean(each)) for name, each in values.items() if np.isfinite(each).any()}


def _by_observer(target: GazeTarget) -> list[np.ndarray]:
    count = int(target.observers.max()) + 1 if len(target.observers) else 0
    return [target.points[target.observers == observer] for observer in range(count)]


def _group_map(observers: list[np.ndarray], chosen: list[int], shape: MapShape) -> Tensor:
    """Density of some observers' fixations, NaN where none lies inside the image."""
    points = np.concatenate([np.zeros((0, 2)), *(observers[index] for index in chosen)])
    return shape.density(points) if inside_image(points, shape.size).any() else torch.full(shape.grid, torch.nan)
