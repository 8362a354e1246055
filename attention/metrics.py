"""Saliency metrics, batched: one value per map, `(batch,)`, in float32 (float64 where the input is).

Predictions and targets are maps `(batch, height, width)`; fixations are padded points (see `attention.fixations`).

Answers where a formula has none, for every metric here and in `auc`, `ranks` and `transport`:

* constant map (one pixel included): what it says is nothing, so NSS, CC and Spearman are 0, every AUC is 0.5; SIM,
  KLD, EMD and information gain read it as the uniform density;
* no usable fixation: the value of chance (NSS 0, AUC 0.5, information gain 0); `evaluate_maps` also tells
  `num_fixations`;
* NaN or infinity in a map: NaN for that map, and for no other of the batch.
"""

from functools import cached_property

import torch
from torch import Tensor

from attention.auc import Fixated, Ranks, auc_borji, auc_judd, auc_shuffled
from attention.blocks import Maps, PixelSums, pixel_sums, visit
from attention.fixations import Located, locate
from attention.maps import check_pair
from attention.ranks import spearman
from attention.transport import emd

__all__ = [
    "auc_borji",
    "auc_judd",
    "auc_shuffled",
    "cc",
    "emd",
    "evaluate_maps",
    "information_gain",
    "kld",
    "nss",
    "sim",
    "spearman",
]

# The constant of the MATLAB reference (its `eps`), and so of the MIT/Tuebingen benchmark.
MATLAB_EPS = 2.2204e-16


def _nan_where_broken(values: Tensor, *maps: Maps) -> Tensor:
    finite = torch.stack([each.finite.expand(len(values)) for each in maps]).all(dim=0)
    return torch.where(finite, values, torch.nan).to(maps[0].flat.dtype)


def _mean_where(values: Tensor, usable: Tensor) -> Tensor:
    return torch.where(usable, values, 0).sum(dim=-1) / usable.sum(dim=-1).clamp(min=1)


def _pair(prediction: Tensor, target: Tensor, *, minmax: bool = False) -> tuple[Maps, Maps]:
    prediction, target = check_pair(prediction, target)
    return Maps(prediction, minmax=minmax), Maps(target, minmax=minmax)


def _nss(maps: Maps, square: Tensor, fixations: Located, ddof: int) -> Tensor:
    index, usable = fixations
    deviation = (torch.where(maps.constant, 1, square) / max(maps.num_pixels - ddof, 1)).sqrt()
    score = _mean_where(maps.flat.gather(1, index).double() - maps.mean, usable) / deviation
    return _nan_where_broken(torch.where(maps.constant, 0, score), maps)


def _cc(prediction: Maps, target: Maps, squares: tuple[Tensor, Tensor], product: Tensor) -> Tensor:
    constant = prediction.constant | target.constant
    # Two roots, not one of the product: the product of two small variances underflows.
    first, second = (torch.where(constant, 1, square).sqrt() for square in squares)
    return _nan_where_broken(torch.where(constant, 0, product / first / second), prediction, target)


def _gain(prediction: Maps, baseline: Maps, fixations: Located, eps: float) -> Tensor:
    index, usable = fixations
    p, b = (each.density(each.flat.expand(len(index), -1).gather(1, index).double()) for each in (prediction, baseline))
    score = _mean_where(torch.log2(eps + p) - torch.log2(eps + b), usable)
    return _nan_where_broken(score, prediction, baseline)


def _baseline(prediction: Tensor, baseline: Tensor) -> Maps:
    """One baseline map serves the whole batch without being copied."""
    baseline = baseline if baseline.ndim == 3 else baseline[None]
    return Maps(check_pair(prediction, baseline.expand_as(prediction))[1][: len(baseline)])


def nss(prediction: Tensor, fixations: Tensor, valid: Tensor | None = None, *, ddof: int = 0) -> Tensor:
    """Normalised scanpath saliency: mean over fixations of `(m - mean(m)) / std(m)`.

    Args:
        prediction: `(batch, height, width)`.
        fixations: `(batch, num_points, 2)` x, y.
        valid: `(batch, num_points)` bool, or None.
        ddof: 0 as numpy and pysaliency; 1 as MATLAB's `std`.

    Returns:
        `(batch,)`, chance 0, higher is better.

    Source: Peters, Iyer, Itti, Koch, Vision Research 2005; pysaliency's `NSS`.
    """
    maps = Maps(prediction)
    return _nss(maps, pixel_sums(["square"], maps)[0], locate(fixations, valid, maps.size), ddof)


def kld(prediction: Tensor, target: Tensor, *, eps: float = MATLAB_EPS) -> Tensor:
    """Kullback-Leibler divergence in nats: `sum q * log(eps + q / (p + eps))`, `p` and `q` (the target) scaled to sum
    1.

    Args:
        prediction: `(batch, height, width)`.
        target: `(batch, height, width)`, the human map.
        eps: keeps the logarithm finite where either is 0.

    Returns:
        `(batch,)`, 0 where equal, lower is better.

    Raises:
        ValueError: the shapes disagree.

    Source: the MIT/Tuebingen benchmark (cvzoya/saliency); pysaliency's `MIT_KLDiv`.
    """
    pair = _pair(prediction, target)
    return _nan_where_broken(pixel_sums(["divergence"], *pair, eps=eps)[0], *pair)


def cc(prediction: Tensor, target: Tensor) -> Tensor:
    """Pearson's linear correlation of two maps, pixel by pixel: `cov(p, q) / (std(p) * std(q))`.

    Args:
        prediction: `(batch, height, width)`.
        target: `(batch, height, width)`.

    Returns:
        `(batch,)` in [-1, 1], higher is better.

    Raises:
        ValueError: the shapes disagree.

    Source: pysaliency's `CC` (which gives NaN where both maps are constant).
    """
    pair = _pair(prediction, target)
    first, second, product = pixel_sums(["square", "target_square", "product"], *pair)
    return _cc(*pair, (first, second), product)


def sim(prediction: Tensor, target: Tensor, *, minmax: bool = False) -> Tensor:
    """Similarity, the histogram intersection of two densities: `sum min(p, q)`.

    Args:
        prediction: `(batch, height, width)`.
        target: `(batch, height, width)`.
        minmax: scale each map to [0, 1] first, as the MATLAB reference does and pysaliency does not.

    Returns:
        `(batch,)` in [0, 1], higher is better.

    Raises:
        ValueError: the shapes disagree.

    Source: Judd, Durand, Torralba 2012; pysaliency's `SIM`.
    """
    pair = _pair(prediction, target, minmax=minmax)
    return _nan_where_broken(pixel_sums(["overlap"], *pair)[0], *pair)


def information_gain(
    prediction: Tensor, baseline: Tensor, fixations: Tensor, valid: Tensor | None = None, *, eps: float = MATLAB_EPS
) -> Tensor:
    """Information gain over a baseline, in bits a fixation: mean of `log2(eps + p) - log2(eps + b)` at the fixations.

    Args:
        prediction: `(batch, height, width)`; scaled to sum 1 here.
        baseline: `(batch, height, width)` or `(height, width)`, usually the centre bias; scaled to sum 1 here.
        fixations: `(batch, num_points, 2)` x, y.
        valid: `(batch, num_points)` bool, or None.
        eps: keeps the logarithm finite where a density is 0.

    Returns:
        `(batch,)`, 0 where the prediction is no better than the baseline.

    Raises:
        ValueError: the shapes disagree.

    Source: Kuemmerer, Wallis, Bethge, PNAS 2015; pysaliency's `information_gain`.
    """
    maps = Maps(prediction)
    return _gain(maps, _baseline(prediction, baseline), locate(fixations, valid, maps.size), eps)


class _MapScores:
    """What a human map allows; `tasks` are to be visited before `results`."""

    def __init__(self, prediction: Tensor, target: Tensor, *, minmax: bool) -> None:
        self.pair = _pair(prediction, target)
        names = ["square", "target_square", "product", "divergence", *([] if minmax else ["overlap"])]
        self.names, self.minmax = names, minmax
        self.tasks = [PixelSums(names, *self.pair, eps=MATLAB_EPS)]
        if minmax:
            self.tasks.append(PixelSums(["overlap"], *_pair(prediction, target, minmax=True)))

    @cached_property
    def sums(self) -> dict[str, Tensor]:
        values = [value for task in self.tasks for value in task.result()]
        return dict(zip([*self.names, *(["overlap"] if self.minmax else [])], values, strict=True))

    def results(self) -> dict[str, Tensor]:
        return {
            "kld": _nan_where_broken(self.sums["divergence"], *self.pair),
            "cc": _cc(*self.pair, (self.sums["square"], self.sums["target_square"]), self.sums["product"]),
            "sim_minmax" if self.minmax else "sim": _nan_where_broken(self.sums["overlap"], *self.pair),
        }


class _GazeScores:
    """What fixations allow; `tasks` are to be visited before `results`."""

    def __init__(self, maps: Maps, fixations: Located, *, negatives: Located | None, baseline: Maps | None) -> None:
        self.maps, self.fixations, self.baseline = maps, fixations, baseline
        self.fixated = Fixated(maps, fixations)
        self.tasks = [Ranks(maps, self.fixated.positives)]
        if negatives is not None:
            self.tasks.append(Ranks(maps, self.fixated.positives, negatives))
            self.num_negatives = negatives[1].expand(len(maps.flat), -1).sum(dim=1)

    def results(self, square: Tensor, ddof: int) -> dict[str, Tensor]:
        results = {
            "nss" if ddof == 0 else f"nss_ddof{ddof}": _nss(self.maps, square, self.fixations, ddof),
            "auc_judd": self.fixated.judd(self.tasks[0]),
            "auc_borji": self.fixated.against(self.tasks[0], self.maps.num_pixels),
        }
        if len(self.tasks) > 1:
            results["auc_shuffled"] = self.fixated.against(self.tasks[1], self.num_negatives)
        if self.baseline is not None:
            results["information_gain"] = _gain(self.maps, self.baseline, self.fixations, MATLAB_EPS)
        return results | {"num_fixations": self.fixations[1].sum(dim=1)}


def evaluate_maps(
    prediction: Tensor,
    *,
    target: Tensor | None = None,
    fixations: Tensor | None = None,
    valid: Tensor | None = None,
    baseline: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_valid: Tensor | None = None,
    nss_ddof: int = 0,
    sim_minmax: bool = False,
) -> dict[str, Tensor]:
    """Every metric that the given material allows; what they share is computed once.

    Args:
        prediction: `(batch, height, width)`.
        target: `(batch, height, width)` human maps: gives kld, cc, sim.
        fixations: `(batch, num_points, 2)` x, y: gives nss, auc_judd, auc_borji, num_fixations.
        valid: `(batch, num_points)` bool, or None.
        baseline: as in `information_gain`; with fixations gives information_gain.
        negatives: as in `auc_shuffled`; with fixations gives auc_shuffled.
        negatives_valid: as in `auc_shuffled`.
        nss_ddof: as `ddof` of `nss`; 1 names the result nss_ddof1.
        sim_minmax: as `minmax` of `sim`; True names the result sim_minmax.

    Returns:
        Name to `(batch,)`, without gradient; auc_borji is the exact expectation over draws. EMD and Spearman, which
        are slow, are left to their own functions.

    Raises:
        ValueError: the shapes disagree, or neither target nor fixations are given.
    """
    if target is None and fixations is None:
        raise ValueError("evaluate_maps needs target maps or fixations")
    with torch.no_grad():
        human = None if target is None else _MapScores(prediction, target, minmax=sim_minmax)
        maps = Maps(prediction) if human is None else human.pair[0]
        gaze = None
        if fixations is not None:
            others = None if negatives is None else locate(negatives, None, maps.size)
            if others is not None and negatives_valid is not None:
                others = (others[0], others[1] & negatives_valid)
            prior = None if baseline is None else _baseline(prediction, baseline)
            gaze = _GazeScores(maps, locate(fixations, valid, maps.size), negatives=others, baseline=prior)
        square = PixelSums(["square"], maps)
        visit([*([square] if human is None else human.tasks), *([] if gaze is None else gaze.tasks)], maps)
        results = {} if human is None else human.results()
        if gaze is None:
            return results
        return results | gaze.results(square.result()[0] if human is None else human.sums["square"], nss_ddof)
