"""Spearman's rank correlation of maps. Degenerate input: see `attention.metrics`."""

import numpy as np
import torch
from torch import Tensor

from attention.maps import check_pair


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks 0, 1, ... along the last dimension, ties sharing their mean: `(batch, num_values)` float64."""
    if values.device.type == "cpu":
        # numpy's CPU sort is several times faster than torch's.
        order = torch.from_numpy(np.argsort(values.numpy(), axis=-1))
    else:
        order = values.argsort(dim=-1)
    ordered = values.gather(-1, order)
    position = torch.arange(values.shape[-1], device=values.device).expand_as(values)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    ends = starts.roll(-1, dims=-1)
    ends[..., -1] = True
    first = torch.where(starts, position, 0).cummax(dim=-1).values
    last = torch.where(ends, position, values.shape[-1]).flip(-1).cummin(dim=-1).values.flip(-1)
    mean_rank = (first + last).double() / 2
    return torch.empty_like(mean_rank).scatter_(-1, order, mean_rank)


def spearman(prediction: Tensor, target: Tensor) -> Tensor:
    """Spearman's rank correlation: Pearson's correlation of the ranks, ties sharing their mean rank.

    Args:
        prediction: `(batch, height, width)`.
        target: `(batch, height, width)`.

    Returns:
        `(batch,)` in [-1, 1], 0 where either map is constant, without gradient.

    Raises:
        ValueError: the shapes disagree.

    Source: `scipy.stats.spearmanr`; the rank correlation of the VQA human-attention (HAT) study, Das et al. 2016.
    """
    prediction, target = check_pair(prediction, target)
    maps = [each.detach().flatten(1) for each in (prediction, target)]
    middle = (maps[0].shape[1] - 1) / 2
    p, q = (_average_ranks(each) - middle for each in maps)
    norm = torch.linalg.vector_norm(p, dim=1) * torch.linalg.vector_norm(q, dim=1)
    score = torch.linalg.vecdot(p, q) / torch.where(norm > 0, norm, 1)
    finite = torch.isfinite(maps[0].sum(dim=1)) & torch.isfinite(maps[1].sum(dim=1))
    return torch.where(finite, score, torch.nan).to(prediction.dtype)
