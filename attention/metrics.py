"""Saliency metrics, batched: one value per map, `(batch,)`, in float32 (float64 where the input is).

Predictions and targets are maps `(batch, height, width)`; fixations are padded points (see `attention.fixations`).

Answers where a formula has none, for every metric here and in `auc`, `ranks` and `transport`:

* constant map (one pixel included): what it says is nothing, so NSS, CC and Spearman are 0, every AUC is 0.5; SIM,
  KLD, EMD and information gain read it as the uniform density;
* no usable fixation: the value of chance (NSS 0, AUC 0.5, information gain 0); `evaluate_maps` also tells
  `num_fixations`;
* NaN or infinity in a map: NaN for that map, and for no other of the batch.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attention.auc import auc_borji, auc_judd, auc_judd_and_borji, auc_shuffled
from attention.blocks import Block, Maps, block_sums
from attention.fixations import locate
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
# On a CPU: few enough maps for the cache, enough to pay for the calls.
ROWS_AT_ONCE = 8


def _nan_where_broken(values: Tensor, *maps: Maps) -> Tensor:
    finite = torch.stack([each.finite for each in maps]).all(dim=0)
    return torch.where(finite, values, torch.nan).to(maps[0].flat.dtype)


def _mean_where(values: Tensor, usable: Tensor) -> Tensor:
    return torch.where(usable, values, 0).sum(dim=-1) / usable.sum(dim=-1).clamp(min=1)


def _pair(prediction: Tensor, target: Tensor, *, minmax: bool = False) -> tuple[Maps, Maps]:
    prediction, target = check_pair(prediction, target)
    return Maps(prediction, minmax=minmax), Maps(target, minmax=minmax)


def _square(block: Block) -> Tensor:
    return torch.linalg.vecdot(block.centred, block.centred)


def _product(prediction: Block, target: Block) -> Tensor:
    return torch.linalg.vecdot(prediction.centred, target.centred)


def _overlap(prediction: Block, target: Block) -> Tensor:
    return torch.minimum(prediction.density, target.density).sum(dim=1)


def _divergence(prediction: Block, target: Block, *, eps: float = MATLAB_EPS) -> Tensor:
    return torch.linalg.vecdot(target.density, (target.density / (prediction.density + eps)).add_(eps).log())


def _nss(maps: Maps, square: Tensor, fixations: Tensor, valid: Tensor | None, ddof: int) -> Tensor:
    index, usable = locate(fixations, valid, maps.size)
    deviation = (torch.where(maps.constant, 1, square) / max(maps.num_pixels - ddof, 1)).sqrt()
    score = _mean_where(maps.flat.gather(1, index) - maps.mean, usable) / deviation
    return _nan_where_broken(torch.where(maps.constant, 0, score), maps)


def _cc(prediction: Maps, target: Maps, squares: tuple[Tensor, Tensor], product: Tensor) -> Tensor:
    constant = prediction.constant | target.constant
    # Two roots, not one of the product: the product of two small variances underflows.
    first, second = (torch.where(constant, 1, square).sqrt() for square in squares)
    return _nan_where_broken(torch.where(constant, 0, product / first / second), prediction, target)


def _gain(prediction: Maps, baseline: Maps, fixations: Tensor, valid: Tensor | None, eps: float) -> Tensor:
    index, usable = locate(fixations, valid, prediction.size)
    p, b = (each.density(each.flat.expand(len(index), -1).gather(1, index)) for each in (prediction, baseline))
    score = _mean_where(torch.log2(eps + p) - torch.log2(eps + b), usable)
    finite = prediction.finite & baseline.finite
    return torch.where(finite, score, torch.nan)


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
    return _nss(maps, block_sums([_square], maps)[0], fixations, valid, ddof)


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
    return _nan_where_broken(block_sums([partial(_divergence, eps=eps)], *pair)[0], *pair)


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
    first, second, product = block_sums([lambda p, _: _square(p), lambda _, q: _square(q), _product], *pair)
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
    return _nan_where_broken(block_sums([_overlap], *pair)[0], *pair)


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
    return _gain(Maps(prediction), _baseline(prediction, baseline), fixations, valid, eps)


@dataclass(frozen=True)
class _Material:
    """What a batch of maps is scored with; see `evaluate_maps`."""

    prediction: Tensor
    target: Tensor | None
    fixations: Tensor | None
    valid: Tensor | None
    baseline: Tensor | None
    negatives: Tensor | None
    negatives_valid: Tensor | None

    def rows(self, rows: slice) -> "_Material":
        """Return a part of the batch; what serves all maps alike is kept whole."""
        shared = {"negatives": 2, "negatives_valid": 1, "baseline": 2}
        parts: dict[str, Tensor | None] = {}
        for name, value in vars(self).items():
            whole = value is None or value.ndim == shared.get(name) or len(value) != len(self.prediction)
            parts[name] = value if whole else value[rows]
        return _Material(**parts)  # type: ignore[arg-type]


def _score(given: _Material, nss_ddof: int, sim_minmax: bool) -> dict[str, Tensor]:
    """Every metric of a batch, its pixels read once for the sums and sorted once for the AUCs."""
    results: dict[str, Tensor] = {}
    maps = Maps(given.prediction)
    if given.target is not None:
        maps, human = _pair(given.prediction, given.target)
        terms = [lambda p, _: _square(p), lambda _, q: _square(q), _product, _divergence, _overlap]
        square, other, product, divergence, overlap = block_sums(terms, maps, human)
        results["kld"] = _nan_where_broken(divergence, maps, human)
        results["cc"] = _cc(maps, human, (square, other), product)
        if sim_minmax:
            results["sim_minmax"] = sim(given.prediction, given.target, minmax=True)
        else:
            results["sim"] = _nan_where_broken(overlap, maps, human)
    elif given.fixations is not None:
        square = block_sums([_square], maps)[0]
    if given.fixations is None:
        return results
    fixations, valid = given.fixations, given.valid
    results["nss" if nss_ddof == 0 else f"nss_ddof{nss_ddof}"] = _nss(maps, square, fixations, valid, nss_ddof)
    results["auc_judd"], results["auc_borji"] = auc_judd_and_borji(given.prediction, fixations, valid)
    if given.negatives is not None:
        results["auc_shuffled"] = auc_shuffled(
            given.prediction, fixations, valid, negatives=given.negatives, negatives_valid=given.negatives_valid
        )
    if given.baseline is not None:
        prior = _baseline(given.prediction, given.baseline)
        results["information_gain"] = _gain(maps, prior, fixations, valid, MATLAB_EPS)
    return results | {"num_fixations": locate(fixations, valid, maps.size)[1].sum(dim=1)}


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
    given = _Material(prediction, target, fixations, valid, baseline, negatives, negatives_valid)
    num_rows = ROWS_AT_ONCE if prediction.device.type == "cpu" else len(prediction)
    with torch.no_grad():
        starts = range(0, max(len(prediction), 1), max(num_rows, 1))
        parts = [_score(given.rows(slice(start, start + num_rows)), nss_ddof, sim_minmax) for start in starts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
