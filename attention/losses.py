"""Losses that teach a predicted attention map: KLD and NSS as in `L = A * KLD - B * NSS`; CC, MSE and BCE beside them.

Every function takes maps `(batch, height, width)`, works in float32 at least, and returns one value per sample,
`(batch,)`. `kld`, `mse` and `bce` are costs; `nss` and `cc` are scores, which `weighted_loss` subtracts.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from attention.maps import as_float, check_pair, log_density, to_density

NssTarget = Literal["soft", "sampled", "top"]
COSTS = ("kld", "mse", "bce")
SCORES = ("nss", "cc")


def kld(log_pred: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the prediction from the target, in nats: `sum q * (log q - log p)`.

    Args:
        log_pred: `(batch, height, width)` log-densities, as `log_density` gives them.
        target: `(batch, height, width)` densities; where one is 0 the position adds nothing.

    Returns:
        `(batch,)`, at least 0.
    """
    log_pred, target = as_float(log_pred), as_float(target)
    divergence = torch.xlogy(target, target) - torch.where(target > 0, target * log_pred, 0.0)
    return divergence.sum(dim=(-2, -1))


def _soft_zscore(maps: Tensor, eps: float) -> Tensor:
    """`(m / mean(m) - 1) / sqrt(var(m / mean(m)) + eps^2)`: a z-score whose gradient stays finite on a constant map."""
    maps = as_float(maps)
    relative = maps / maps.mean(dim=(-2, -1), keepdim=True) - 1
    return relative / (relative.square().mean(dim=(-2, -1), keepdim=True) + eps**2).sqrt()


def nss(pred: Tensor, weights: Tensor, *, eps: float = 1e-3) -> Tensor:
    """Normalised scanpath saliency with soft weights: `sum(w * z(p))`, where `z` standardises the prediction.

    Where the weights are a fixation map divided by its number of fixations this is the NSS metric.

    Args:
        pred: `(batch, height, width)` densities.
        weights: `(batch, height, width)`, sum 1: the target density, or what `nss_weights` makes of it.
        eps: contrast (standard deviation over mean) below which a prediction counts as flat. At `eps` the score is
            0.7 of the metric's; at ten times `eps`, 0.995.

    Returns:
        `(batch,)`, 0 for a constant prediction, higher is better.
    """
    return (as_float(weights) * _soft_zscore(pred, eps)).sum(dim=(-2, -1))


def nss_weights(
    target: Tensor,
    *,
    kind: NssTarget = "soft",
    num_points: int = 50,
    top_share: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Turn a target density into the weights of `nss` where there are no fixations.

    Args:
        target: `(batch, height, width)` densities.
        kind: "soft", the density itself; "sampled", `num_points` points drawn from it with replacement; "top", its
            highest `top_share` of positions, equally weighted.
        num_points: number of points of "sampled".
        top_share: share of positions of "top", in (0, 1]; at least one position is kept.
        generator: source of the draws of "sampled".

    Returns:
        `(batch, height, width)`, sum 1, without gradient for "sampled" and "top".

    Raises:
        ValueError: unknown kind, or a number out of its range.
    """
    if num_points < 1 or not 0 < top_share <= 1:
        raise ValueError(f"num_points must be at least 1 and top_share in (0, 1], got {num_points} and {top_share}")
    density = to_density(target)
    flat = density.detach().flatten(-2)
    if kind == "soft":
        return density
    if kind == "sampled":
        points = torch.multinomial(flat, num_points, replacement=True, generator=generator)
    elif kind == "top":
        points = flat.topk(max(1, round(top_share * flat.shape[-1])), dim=-1).indices
    else:
        raise ValueError(f"nss_target must be 'soft', 'sampled' or 'top', got {kind!r}")
    share = torch.full_like(points, 1, dtype=flat.dtype) / points.shape[-1]
    return torch.zeros_like(flat).scatter_add_(-1, points, share).view(density.shape)


def cc(pred: Tensor, target: Tensor, *, eps: float = 1e-3) -> Tensor:
    """Pearson correlation of two maps: `mean(z(p) * z(q))`.

    Args:
        pred: `(batch, height, width)` densities.
        target: `(batch, height, width)` densities.
        eps: contrast below which a map counts as flat, as in `nss`.

    Returns:
        `(batch,)` in [-1, 1], 0 where either map is constant, higher is better.
    """
    return (_soft_zscore(pred, eps) * _soft_zscore(target, eps)).mean(dim=(-2, -1))


def mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of two densities in units of the uniform density: `mean((N p - N q)^2)`, N positions.

    The unit makes the value independent of the grid. Args and result as in `cc`, at least 0.
    """
    num_positions = pred.shape[-2] * pred.shape[-1]
    return (num_positions * (as_float(pred) - as_float(target))).square().mean(dim=(-2, -1))


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each position, `-mean(t log s + (1 - t) log(1 - s))`, `s = sigmoid(l)`, `t = q / max(q)`.

    Args:
        logits: `(batch, height, width)`.
        target: `(batch, height, width)`, non-negative.

    Returns:
        `(batch,)`, at least 0.
    """
    logits, density = as_float(logits), to_density(target)
    scaled = (density / density.amax(dim=(-2, -1), keepdim=True)).to(logits)
    return binary_cross_entropy_with_logits(logits, scaled, reduction="none").mean(dim=(-2, -1))


def _mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    kept = mask.to(values.device).bool()
    return torch.where(kept, values, 0.0).sum() / kept.sum().clamp(min=1)


def weighted_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weights: Mapping[str, float],
    nss_target: NssTarget = "soft",
    nss_map: Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the losses above: `sum_costs w * cost - sum_scores w * score`, each a mean over the samples kept.

    Args:
        logits: `(batch, height, width)` predicted map before its softmax over positions.
        target: `(batch, height, width)` maps; scaled to sum 1 here.
        weights: weight of each of "kld", "nss", "cc", "mse", "bce"; what is 0 or missing is not computed.
        nss_target: what NSS compares with, see `nss_weights`.
        nss_map: `(batch, height, width)` human fixation counts; where given, NSS compares with them instead.
        mask: `(batch,)` bool, the samples that count; with none, every term is 0 and still has a gradient (of zeros).
        generator: source of the draws of `nss_target="sampled"`.

    Returns:
        The sum, a scalar, and each term before weighting, scalars without gradient.

    Raises:
        ValueError: unknown name in weights, shapes that disagree, unknown `nss_target`.
    """
    unknown = sorted(set(weights) - {*COSTS, *SCORES})
    if unknown:
        raise ValueError(f"unknown attention losses {unknown}; known are {[*COSTS, *SCORES]}")
    logits, target = check_pair(logits, target)
    log_pred, density = log_density(logits), to_density(target)
    pred = log_pred.exp()

    def term(name: str) -> Tensor:
        if name == "nss":
            if nss_map is not None:
                return nss(pred, to_density(nss_map))
            return nss(pred, nss_weights(density, kind=nss_target, generator=generator))
        if name == "kld":
            return kld(log_pred, density)
        if name == "bce":
            return bce(logits, density)
        return cc(pred, density) if name == "cc" else mse(pred, density)

    means = {name: _mean_over(term(name), mask) for name, weight in weights.items() if weight != 0}
    total = (0.0 * log_pred).sum() if not means else torch.zeros((), dtype=log_pred.dtype, device=log_pred.device)
    for name, value in means.items():
        total = total + (weights[name] if name in COSTS else -weights[name]) * value
    return total, {name: value.detach() for name, value in means.items()}


def attention_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kld_weight: float = 1.0,
    nss_weight: float = 0.1,
    nss_target: NssTarget = "soft",
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The attention loss `mean over samples of A * KLD(m, p) - B * NSS(m, p)`, a scalar.

    Args, Returns and Raises: see `weighted_loss`. Source: Yao, Ye, He, Elsayed, CVPR 2023 (A = `kld_weight` and
    B = `nss_weight` are not published; the defaults are our choice).
    """
    weights = {"kld": kld_weight, "nss": nss_weight}
    return weighted_loss(logits, target, weights=weights, nss_target=nss_target, mask=mask, generator=generator)[0]
