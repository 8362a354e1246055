"""Masks that a surrogate miner probes a model with (Patro et al., WACV 2021)."""

from itertools import combinations
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional


def grid_masks(size: tuple[int, int], *, count: int, scale: int, seed: int, keep: float = 0.5) -> Tensor:
    """All ones, and `count` random masks: Bernoulli grids of `size / scale`, enlarged bilinearly.

    Where `scale` does not divide `size` the coarse grid is rounded up (our choice; the paper's 14 / 6 gives 3). The
    same masks serve every image (our choice), so that the work is one batched product.

    Args:
        size: `(height, width)` of the feature map.
        scale: s, positions per cell of the coarse grid.
        keep: probability that a cell stays.

    Returns:
        float32 `(count + 1, height, width)` in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = (ceil(size[0] / scale), ceil(size[1] / scale))
    cells = (torch.rand((count, 1, *coarse), generator=generator) < keep).float()
    fine = functional.interpolate(cells, size=size, mode="bilinear", align_corners=False)
    return torch.cat([torch.ones(1, *size), fine.squeeze(1).clamp(0, 1)])


def pair_masks(length: int, *, size: int) -> Tensor:
    """All ones, and every masking of two of the first `length` tokens; positions behind them stay 1.

    A text of one token has nothing to leave out in pairs, and gets the unmasked probe alone.

    Returns:
        float32 `(1 + length * (length - 1) / 2, size)` of zeros and ones.
    """
    pairs = torch.combinations(torch.arange(length), 2)
    masks = torch.ones(1 + len(pairs), size)
    masks[1:].scatter_(1, pairs, 0)
    return masks


def keep_only_masks(length: int, *, num_kept: int, size: int) -> Tensor:
    """Every masking that keeps `num_kept` of the first `length` tokens, for analysis.

    Returns:
        float32 `(combinations, size)` of zeros and ones.
    """
    kept = list(combinations(range(length), min(num_kept, length)))
    masks = torch.ones(len(kept), size)
    masks[:, :length] = 0
    for row, tokens in enumerate(kept):
        masks[row, list(tokens)] = 1
    return masks
