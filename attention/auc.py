"""Areas under the ROC curve of a map that tells fixated pixels from others: Judd's, Borji's, shuffled.

No loop over maps, fixations or thresholds: values are sorted once per map, and counts at the thresholds are binary
searches. Degenerate input: see `attention.metrics`.
"""

import numpy as np
import torch
from torch import Tensor

from attention.fixations import locate
from attention.maps import as_float


def sort_values(values: Tensor) -> Tensor:
    """Sort along the last dimension, ascending, without gradient."""
    values = values.detach()
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    # torch's CPU sort carries indices along and is some 20 times slower than numpy's vectorised one.
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))


def _area(hits: Tensor, false_alarms: Tensor) -> Tensor:
    """Trapezoids under ROC points `(batch, num_thresholds)`, thresholds falling, (0, 0) and (1, 1) added."""
    hits, false_alarms = (
        torch.nn.functional.pad(torch.nn.functional.pad(each, (1, 0), value=0.0), (0, 1), value=1.0)
        for each in (hits, false_alarms)
    )
    return torch.trapezoid(hits, false_alarms, dim=1)


def _finish(area: Tensor, *, defined: Tensor, prediction: Tensor) -> Tensor:
    """Chance where there is nothing to tell apart, NaN where the map is broken."""
    finite = torch.isfinite(prediction.sum(dim=(1, 2)))
    return torch.where(finite, torch.where(defined, area, 0.5), torch.nan)


def _num_at_least(ordered: Tensor, thresholds: Tensor, total: Tensor) -> Tensor:
    return total[:, None] - torch.searchsorted(ordered, thresholds)


def _ranks_among_pixels(flat: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """How many pixels of its map are below each value, and how many not above it: two `(batch, num_values)` int64."""
    if flat.device.type != "cpu":
        ordered = flat.sort(dim=1).values
        return torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    below, up_to = np.empty(values.shape, dtype=np.int64), np.empty(values.shape, dtype=np.int64)
    # One buffer, reused: fresh memory for every sorted map costs as much as the sorting.
    ordered_row = np.empty(flat.shape[1], dtype=flat.numpy().dtype)
    for row, (pixels, wanted) in enumerate(zip(flat.numpy(), values.numpy(), strict=True)):
        np.copyto(ordered_row, pixels)
        ordered_row.sort()
        below[row], up_to[row] = ordered_row.searchsorted(wanted), ordered_row.searchsorted(wanted, side="right")
    return torch.from_numpy(below), torch.from_numpy(up_to)


class _Fixated:
    """Values of maps at their fixations, sorted (unusable ones +inf, at the end), and their ranks among all pixels."""

    def __init__(self, prediction: Tensor, fixations: Tensor, valid: Tensor | None) -> None:
        self.prediction = as_float(prediction).detach()
        self.flat = self.prediction.flatten(1)
        self.index, self.usable = locate(fixations, valid, (prediction.shape[1], prediction.shape[2]))
        values = self.flat.gather(1, self.index)
        self.positives = sort_values(torch.where(self.usable, values, torch.inf))
        self.below, self.up_to = _ranks_among_pixels(self.flat, self.positives)
        seen, order = torch.where(self.usable, self.index, -1).sort(dim=1)
        first = torch.cat([seen[:, :1] >= 0, (seen[:, 1:] != seen[:, :-1]) & (seen[:, 1:] >= 0)], dim=1)
        self.distinct = sort_values(torch.where(first, values.gather(1, order), torch.inf))
        self.num_positives, self.num_distinct = self.usable.sum(dim=1), first.sum(dim=1)

    def judd(self, *, unique: bool) -> Tensor:
        """AUC-Judd, see `auc_judd`."""
        num_negatives = self.flat.shape[1] - self.num_distinct
        pixels = self.flat.shape[1] - self.below
        false_alarms = pixels - _num_at_least(self.distinct, self.positives, self.num_distinct)
        counted, total = (self.distinct, self.num_distinct) if unique else (self.positives, self.num_positives)
        hits = _num_at_least(counted, self.positives, total)
        rates = [
            count.flip(1).to(self.flat.dtype) / num.clamp(min=1)[:, None]
            for count, num in ((hits, total), (false_alarms, num_negatives))
        ]
        return _finish(_area(*rates), defined=(total > 0) & (num_negatives > 0), prediction=self.prediction)

    def against_all(self) -> Tensor:
        """AUC against every pixel, see `auc_borji`."""
        share = (self.below + self.up_to).to(self.flat.dtype) / (2 * self.flat.shape[1])
        real = torch.arange(share.shape[1], device=share.device) < self.num_positives[:, None]
        area = torch.where(real, share, 0).sum(dim=1) / self.num_positives.clamp(min=1)
        return _finish(area, defined=self.num_positives > 0, prediction=self.prediction)


def auc_judd(
    prediction: Tensor,
    fixations: Tensor,
    valid: Tensor | None = None,
    *,
    unique: bool = False,
) -> Tensor:
    """AUC-Judd: thresholds at the fixated values; positives are the fixations, negatives all pixels never fixated.

    At threshold `t`: hit rate `#(fixations >= t) / Nf`, false alarms `#(unfixated pixels >= t) / (Npix - Nfixated)`.
    Ties are counted exactly; no jitter is added.

    Args:
        prediction: `(batch, height, width)`.
        fixations: `(batch, num_points, 2)` x, y.
        valid: `(batch, num_points)` bool, or None.
        unique: count a pixel fixated several times as one positive (the MATLAB reference, which reads a binary map)
            instead of once a fixation (pysaliency).

    Returns:
        `(batch,)` in [0, 1], chance 0.5, higher is better.

    Source: Judd, Durand, Torralba 2012; pysaliency's `AUC_Judd(jitter=False)`.
    """
    return _Fixated(prediction, fixations, valid).judd(unique=unique)


def auc_judd_and_borji(prediction: Tensor, fixations: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`auc_judd` and the exact `auc_borji` of the same maps, which are sorted only once."""
    fixated = _Fixated(prediction, fixations, valid)
    return fixated.judd(unique=False), fixated.against_all()


def _auc_of_values(positives: Tensor, usable: Tensor, negatives: Tensor, negatives_usable: Tensor) -> Tensor:
    """`P(positive > negative) + P(equal) / 2`, the ROC area over all thresholds: `(batch,)`."""
    ordered = sort_values(torch.where(negatives_usable, negatives, torch.inf))
    below = torch.searchsorted(ordered, positives) + torch.searchsorted(ordered, positives, right=True)
    share = below.to(positives.dtype) / (2 * negatives_usable.sum(dim=1).clamp(min=1))[:, None]
    return torch.where(usable, share, 0).sum(dim=1) / usable.sum(dim=1).clamp(min=1)


def _auc_on_grid(positives: Tensor, usable: Tensor, negatives: Tensor, negatives_usable: Tensor, step: float) -> Tensor:
    """ROC area over the thresholds 0, step, 2 step ... 1, values already in [0, 1]."""
    thresholds = torch.arange(int(1 / step), -1, -1, dtype=positives.dtype, device=positives.device) * step
    rates = []
    for values, real in ((positives, usable), (negatives, negatives_usable)):
        total = real.sum(dim=1)
        ordered = sort_values(torch.where(real, values, torch.inf))
        counts = _num_at_least(ordered, thresholds.expand(len(values), -1).contiguous(), total)
        rates.append(counts.to(values.dtype) / total.clamp(min=1)[:, None])
    return _area(*rates)


def _auc(
    prediction: Tensor, index: Tensor, usable: Tensor, negatives: Tensor, negatives_usable: Tensor, step: float | None
) -> Tensor:
    """ROC area between the values at two sets of pixels `(batch, num)`."""
    flat = prediction.flatten(1)
    if step is not None:
        low, high = flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
        flat = (flat - low) / torch.where(high > low, high - low, 1)
    arguments = (flat.gather(1, index), usable, flat.gather(1, negatives), negatives_usable)
    area = _auc_of_values(*arguments) if step is None else _auc_on_grid(*arguments, step)
    return _finish(area, defined=usable.any(dim=1) & negatives_usable.any(dim=1), prediction=prediction)


def auc_borji(
    prediction: Tensor,
    fixations: Tensor,
    valid: Tensor | None = None,
    *,
    num_splits: int | None = None,
    step: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """AUC-Borji: negatives are as many random pixels as fixations, mean over many draws.

    The mean over draws of one size is the area with all draws pooled, so nothing is looped; and over ever more draws
    it comes to the area against all pixels, which is the default here: exact, and the same every time.

    Args:
        prediction: `(batch, height, width)`.
        fixations: `(batch, num_points, 2)` x, y.
        valid: `(batch, num_points)` bool, or None.
        num_splits: number of draws (the MATLAB reference: 100); None for the exact expectation (pysaliency's
            "uniform").
        step: None for all thresholds; 0.1 with the map scaled to [0, 1] is the MATLAB reference's coarse grid.
        generator: source of the draws, on the prediction's device; by default one seeded with 0, so that results
            repeat.

    Returns:
        `(batch,)` in [0, 1], chance 0.5, higher is better.

    Source: Borji, Sihite, Itti 2013; `AUC_Borji` of cvzoya/saliency; pysaliency's `AUC(nonfixations=...)`.
    """
    if num_splits is None and step is None:
        return _Fixated(prediction, fixations, valid).against_all()
    prediction = as_float(prediction).detach()
    index, usable = locate(fixations, valid, (prediction.shape[1], prediction.shape[2]))
    num_pixels = prediction.shape[1] * prediction.shape[2]
    if num_splits is None:
        negatives = torch.arange(num_pixels, device=prediction.device).expand(len(prediction), -1)
        return _auc(prediction, index, usable, negatives, torch.ones_like(negatives, dtype=torch.bool), step)
    if generator is None:
        generator = torch.Generator(device=prediction.device).manual_seed(0)
    shape = (len(prediction), num_splits * index.shape[1])
    negatives = torch.randint(num_pixels, shape, generator=generator, device=prediction.device)
    return _auc(prediction, index, usable, negatives, usable.repeat(1, num_splits), step)


def auc_shuffled(
    prediction: Tensor,
    fixations: Tensor,
    valid: Tensor | None = None,
    *,
    negatives: Tensor,
    negatives_valid: Tensor | None = None,
    step: float | None = None,
) -> Tensor:
    """Shuffled AUC: negatives are fixations of other images, so that looking at the centre earns nothing.

    Args:
        prediction: `(batch, height, width)`.
        fixations: `(batch, num_points, 2)` x, y.
        valid: `(batch, num_points)` bool, or None.
        negatives: `(batch, num_negatives, 2)` x, y, or one pool `(num_negatives, 2)` for all (`shuffled_negatives`
            makes it).
        negatives_valid: `(batch, num_negatives)` bool, or None.
        step: as in `auc_borji`.

    Returns:
        `(batch,)` in [0, 1], chance 0.5, higher is better.

    Source: Zhang et al., SUN, Journal of Vision 2008; pysaliency's `AUC(nonfixations="shuffled")`.
    """
    prediction = as_float(prediction).detach()
    size = (prediction.shape[1], prediction.shape[2])
    index, usable = locate(fixations, valid, size)
    other, other_usable = locate(negatives, None, size)
    other, other_usable = (each.expand(len(prediction), -1) for each in (other, other_usable))
    if negatives_valid is not None:
        other_usable = other_usable & negatives_valid
    return _auc(prediction, index, usable, other, other_usable, step)
