"""Losses that pull predicted attention maps towards given ones, in one registry for every task.

Maps are densities `(batch, *positions)`, over a grid or over tokens, sum 1 where `mask` allows. A loss gives one value
per sample, `(batch,)`; those that compare the two batches as sets (`coral`, `mmd`) give every sample the same value.
Sources: Patro et al., WACV 2021 (MSE, CORAL, MMD, adversarial; the adversary is in `attention/adversary.py`); Yao et
al., CVPR 2023 (KLD, NSS); Kim et al. (Lovasz hinge).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from attention.maps import as_float

SupervisionLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

EPS = 1e-8
KERNEL_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def supervise(name: str, pred: Tensor, target: Tensor, *, mask: Tensor | None = None, checked: bool = False) -> Tensor:
    """The named loss between predicted and given maps.

    Args:
        name: a key of `SUPERVISION`.
        pred: `(batch, *positions)` densities.
        target: `(batch, *positions)` densities.
        mask: bool `(batch, *positions)`, true where a position exists (tokens that are no padding); None for all.
        checked: the targets are known to be finite; asking a GPU about them would wait for it in every step.

    Returns:
        `(batch,)`, lower is better.

    Raises:
        ValueError: unknown name, shapes that differ, or a target with values that are not finite.
    """
    if name not in SUPERVISION:
        raise ValueError(f"attention loss '{name}' is not known: take from {', '.join(sorted(SUPERVISION))}")
    if pred.shape != target.shape or pred.dim() < 2:
        raise ValueError(f"maps must share a shape (batch, *positions), got {tuple(pred.shape)}, {tuple(target.shape)}")
    if not checked and not bool(torch.isfinite(target).all()):
        raise ValueError("the maps to learn from hold values that are not finite: mine or label them again")
    flat_pred, flat_target = as_float(pred).flatten(1), as_float(target).flatten(1)
    valid = torch.ones_like(flat_pred, dtype=torch.bool) if mask is None else mask.flatten(1)
    return SUPERVISION[name](flat_pred * valid, flat_target * valid, valid)


def mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """`mean_i (n p_i - n q_i)^2` over a sample's n existing positions; n makes it independent of their number."""
    count = mask.sum(1).clamp(min=1)
    return ((pred - target) * count.unsqueeze(1)).square().sum(1) / count


def kld(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """`sum q log(q / p)` in nats."""
    log_pred = pred.clamp(min=EPS).log()
    return (torch.xlogy(target, target) - target * log_pred).sum(1)


def nss(pred: Tensor, target: Tensor, mask: Tensor, *, eps: float = 1e-3) -> Tensor:
    """Minus `sum q z(p)`, `z` standardising over the existing positions; 0 for a constant prediction."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    relative = (pred * count / pred.sum(1, keepdim=True).clamp(min=EPS) - 1) * mask
    spread = (relative.square().sum(1, keepdim=True) / count + eps**2).sqrt()
    return -(target * relative / spread).sum(1)


def coral(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """`1/4 ||C(p) - C(q)||_F^2`, C the covariance of positions over the batch (Patro et al., 2021).

    Maps are taken in units of the uniform density. A batch of one has no covariance, and no loss.
    """
    return _coral(pred, target, mask) / 4


def deep_coral(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """`1/(4 d^2) ||C(p) - C(q)||_F^2` for d positions (Sun and Saenko, 2016, equation 1)."""
    return _coral(pred, target, mask) / (4 * pred.shape[1] ** 2)


def _coral(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum(1, keepdim=True).clamp(min=1)
    difference = _covariance(pred * count) - _covariance(target * count)
    return difference.square().sum().expand(len(pred))


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0, keepdim=True)
    return centred.t() @ centred / max(len(rows) - 1, 1)


def mmd(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the two batches of maps (Gretton et al., 2012, biased estimate).

    Of a batch of one it is `2 - 2 k(p, q)`, which compares the two maps themselves. The kernel k is the mean of five
    Gaussians; their widths are multiples of the targets' mean squared norm (our choice).
    """
    both, width = torch.cat([pred, target]), _width(target)
    kernel = _kernel((both.unsqueeze(1) - both.unsqueeze(0)).square().sum(2), width)
    n = len(pred)
    value = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    return value.clamp(min=0).expand(n)


def mmd_pairs(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The MMD of batches of one: `2 - 2 k(p, q)` for each map and its own target, kernel as in `mmd`.

    Where `mmd` lets the maps of a batch change places, this one holds each to its own.
    """
    return 2 - 2 * _kernel((pred - target).square().sum(1), _width(target))


def _width(target: Tensor) -> Tensor:
    return target.detach().square().sum(1).mean().clamp(min=EPS)


def _kernel(distances: Tensor, width: Tensor) -> Tensor:
    return torch.stack([torch.exp(-distances / (2 * w * width)) for w in KERNEL_WIDTHS]).mean(0)


def lovasz(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Lovasz hinge of the centred map against the target's upper part: positions at or above half its maximum.

    The map is centred and scaled to its own spread first: a density has a mean of 1/n, which would leave every hinge
    open (our choice). Padding counts as background that is always right.
    """
    count = mask.sum(1, keepdim=True).clamp(min=1)
    relative = (pred * count - 1) * mask
    spread = (relative.square().sum(1, keepdim=True) / count + EPS).sqrt()
    scores = torch.where(mask, relative / spread, torch.full_like(pred, -1e4))
    labels = (target >= 0.5 * target.amax(1, keepdim=True)) & mask
    return lovasz_hinge(scores, labels)


def lovasz_hinge(scores: Tensor, labels: Tensor) -> Tensor:
    """Convex surrogate of the Jaccard loss (Berman et al., 2018, algorithm 1), per sample.

    `e_i = 1 - F_i (2 y_i - 1)` in descending order, `sum_i relu(e_i) (J_i - J_{i-1})`, J the Jaccard loss of the set
    of the i largest errors.

    Args:
        scores: F, `(batch, positions)`, any range, 0 being the border.
        labels: y, bool `(batch, positions)`. Without any true position the loss is `relu` of the largest error.

    Returns:
        `(batch,)`, at least 0.
    """
    truth = labels.to(scores.dtype)
    errors = 1 - scores * (2 * truth - 1)
    errors, order = errors.sort(dim=1, descending=True)
    sorted_truth = truth.gather(1, order)
    positives = sorted_truth.sum(1, keepdim=True)
    intersection = positives - sorted_truth.cumsum(1)
    union = positives + (1 - sorted_truth).cumsum(1)
    jaccard = 1 - intersection / union
    steps = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], dim=1)
    return (functional.relu(errors) * steps).sum(1)


SUPERVISION: Mapping[str, SupervisionLoss] = {
    "mse": mse,
    "kld": kld,
    "nss": nss,
    "coral": coral,
    "deep_coral": deep_coral,
    "mmd": mmd,
    "mmd_pairs": mmd_pairs,
    "lovasz": lovasz,
}
