"""Areas under the ROC curve of a map that tells fixated pixels from others: Judd's, Borji's, shuffled.

No loop over fixations or thresholds: the pixels of a map are sorted once, and counts at the thresholds are binary
searches. Degenerate input: see `attention.metrics`.
"""

import numpy as np
import torch
from torch import Tensor

from attention.blocks import Maps, PerThread, visit
from attention.counting import Counter
from attention.fixations import Located, locate


def sort_values(values: Tensor) -> Tensor:
    """Sort along the last dimension, ascending, without gradient."""
    values = values.detach()
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    # torch's CPU sort carries indices along and is some 20 times slower than numpy's vectorised one.
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))


def _finish(area: Tensor, *, defined: Tensor, maps: Maps) -> Tensor:
    """Chance where there is nothing to tell apart, NaN where the map is broken."""
    return torch.where(maps.finite, torch.where(defined, area, 0.5), torch.nan)


def _area(hits: Tensor, false_alarms: Tensor) -> Tensor:
    """Trapezoids under ROC points `(batch, num_thresholds)`, thresholds falling, (0, 0) and (1, 1) added."""
    hits, false_alarms = (
        torch.nn.functional.pad(torch.nn.functional.pad(each, (1, 0), value=0.0), (0, 1), value=1.0)
        for each in (hits, false_alarms)
    )
    return torch.trapezoid(hits, false_alarms, dim=1)


def _num_at_least(ordered: Tensor, thresholds: Tensor, total: Tensor) -> Tensor:
    return total[:, None] - torch.searchsorted(ordered, thresholds)


class Ranks:
    """Ranks of values among the pixels of their map, or among some of them; a task for `visit`."""

    def __init__(self, maps: Maps, values: Tensor, among: Located | None = None) -> None:
        """Say what to rank.

        Args:
            maps: of the pixels.
            values: `(batch, num_values)`.
            among: of `locate`, `(batch, num_pixels)` or `(num_pixels,)` each; None for all pixels.
        """
        self._maps, self._values, self._among = maps, values, among
        if maps.flat.device.type == "cpu":
            self._below, self._up_to = np.zeros((2, *values.shape), dtype=np.int64)
            dtype = maps.rows.dtype
            self._counter = PerThread(lambda: Counter(maps.num_pixels, dtype))

    def visit(self, row: int) -> None:
        """Look at one map."""
        pixels, values = self._maps.rows[row], self._values[row].numpy()
        if self._among is None:
            ranks = self._counter.get().ranks(pixels, values)
        else:
            index, usable = (each.numpy() if each.ndim == 1 else each[row].numpy() for each in self._among)
            ranks = self._counter.get().ranks_among(pixels, index, usable, values)
        self._below[row], self._up_to[row] = ranks

    def result(self) -> tuple[Tensor, Tensor]:
        """How many of the pixels are below each value, and how many not above it: two `(batch, num_values)` int64."""
        if self._maps.flat.device.type == "cpu":
            return torch.from_numpy(self._below), torch.from_numpy(self._up_to)
        pixels = self._maps.flat.detach()
        if self._among is not None:
            index, usable = (each.expand(len(pixels), -1) for each in self._among)
            pixels = torch.where(usable, pixels.gather(1, index), torch.inf)
        ordered = pixels.sort(dim=1).values
        return torch.searchsorted(ordered, self._values), torch.searchsorted(ordered, self._values, right=True)


class Fixated:
    """Values of maps at their fixations, sorted (unusable ones +inf, at the end), and the areas that follow."""

    def __init__(self, maps: Maps, fixations: Located) -> None:
        """Read the values at fixations of `locate`."""
        index, usable = fixations
        self.maps = maps
        values = maps.flat.detach().gather(1, index)
        self.positives = sort_values(torch.where(usable, values, torch.inf))
        seen, order = torch.where(usable, index, -1).sort(dim=1)
        first = torch.cat([seen[:, :1] >= 0, (seen[:, 1:] != seen[:, :-1]) & (seen[:, 1:] >= 0)], dim=1)
        self.distinct = sort_values(torch.where(first, values.gather(1, order), torch.inf))
        self.num_positives, self.num_distinct = usable.sum(dim=1), first.sum(dim=1)

    def judd(self, ranks: Ranks, *, unique: bool = False) -> Tensor:
        """AUC-Judd out of the ranks among all pixels, see `auc_judd`."""
        num_negatives = self.maps.num_pixels - self.num_distinct
        pixels = self.maps.num_pixels - ranks.result()[0]
        false_alarms = pixels - _num_at_least(self.distinct, self.positives, self.num_distinct)
        counted, total = (self.distinct, self.num_distinct) if unique else (self.positives, self.num_positives)
        hits = _num_at_least(counted, self.positives, total)
        rates = [
            count.flip(1).to(self.positives.dtype) / num.clamp(min=1)[:, None]
            for count, num in ((hits, total), (false_alarms, num_negatives))
        ]
        return _finish(_area(*rates), defined=(total > 0) & (num_negatives > 0), maps=self.maps)

    def against(self, ranks: Ranks, num_others: Tensor | int) -> Tensor:
        """`P(positive > other) + P(equal) / 2`, the area over all thresholds, out of the ranks among the others."""
        below, up_to = ranks.result()
        total = torch.as_tensor(num_others, device=below.device).expand(len(below))[:, None]
        share = (below + up_to).to(self.positives.dtype) / (2 * total.clamp(min=1))
        real = torch.arange(share.shape[1], device=share.device) < self.num_positives[:, None]
        area = torch.where(real, share, 0).sum(dim=1) / self.num_positives.clamp(min=1)
        return _finish(area, defined=(self.num_positives > 0) & (total[:, 0] > 0), maps=self.maps)


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
    maps = Maps(prediction.detach())
    fixated = Fixated(maps, locate(fixations, valid, maps.size))
    ranks = Ranks(maps, fixated.positives)
    visit([ranks], maps)
    return fixated.judd(ranks, unique=unique)


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


def _auc_between(maps: Maps, fixations: Located, others: Located, step: float | None) -> Tensor:
    """ROC area between the values at fixated pixels `(batch, num_points)` and at others `(batch, num)` or `(num,)`."""
    others_usable = others[1].expand(len(maps.flat), -1)
    if step is None:
        fixated = Fixated(maps, fixations)
        ranks = Ranks(maps, fixated.positives, others)
        visit([ranks], maps)
        return fixated.against(ranks, others_usable.sum(dim=1))
    low, high = maps.flat.amin(dim=1, keepdim=True), maps.flat.amax(dim=1, keepdim=True)
    values, negatives = (
        (maps.flat.gather(1, index.expand(len(maps.flat), -1)) - low) / torch.where(high > low, high - low, 1)
        for index in (fixations[0], others[0])
    )
    area = _auc_on_grid(values, fixations[1], negatives, others_usable, step)
    return _finish(area, defined=fixations[1].any(dim=1) & others_usable.any(dim=1), maps=maps)


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
    maps = Maps(prediction.detach())
    located = locate(fixations, valid, maps.size)
    if num_splits is None and step is None:
        fixated = Fixated(maps, located)
        ranks = Ranks(maps, fixated.positives)
        visit([ranks], maps)
        return fixated.against(ranks, maps.num_pixels)
    device = prediction.device
    if num_splits is None:
        negatives = torch.arange(maps.num_pixels, device=device)
        return _auc_between(maps, located, (negatives, torch.ones_like(negatives, dtype=torch.bool)), step)
    if generator is None:
        generator = torch.Generator(device=device).manual_seed(0)
    index, usable = located
    shape = (len(prediction), num_splits * index.shape[1])
    negatives = torch.randint(maps.num_pixels, shape, generator=generator, device=device)
    return _auc_between(maps, located, (negatives, usable.repeat(1, num_splits)), step)


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
    maps = Maps(prediction.detach())
    others, others_usable = locate(negatives, None, maps.size)
    if negatives_valid is not None:
        others_usable = others_usable & negatives_valid
    return _auc_between(maps, locate(fixations, valid, maps.size), (others, others_usable), step)
