"""Earth mover's distance of maps, solved exactly by POT. Degenerate input: see `attention.metrics`."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from attention.maps import check_pair, to_density


def _ground_distance(grid: tuple[int, int]) -> Tensor:
    """Euclidean distances between cell centres of a grid laid over the unit square: `(cells, cells)` float64."""
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid)
    centres = torch.cartesian_prod(rows, columns)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def emd(prediction: Tensor, target: Tensor, *, grid: tuple[int, int] = (14, 14)) -> Tensor:
    """Earth mover's distance between two densities, Euclidean ground distance on the unit square.

    Maps larger than `grid` are averaged down to it (the cost grows with the fourth power of the side); smaller ones
    are kept.

    Args:
        prediction: `(batch, height, width)`.
        target: `(batch, height, width)`.
        grid: height and width to solve on at most; (14, 14) is that of the VQA human-attention study.

    Returns:
        `(batch,)` in [0, sqrt(2)], 0 where equal, lower is better; without gradient, on the CPU's POT solver one map
        at a time.

    Raises:
        ImportError: POT is not installed.
        ValueError: the shapes disagree.

    Source: `ot.emd2` of POT (Flamary et al. 2021).
    """
    prediction, target = check_pair(prediction, target)
    try:
        import ot
    except ImportError as error:
        remedy = "pip install -e '.[metrics]' (or: pip install POT)"
        raise ImportError(f"emd needs POT, which is not installed: {remedy}") from error
    grid = (min(grid[0], prediction.shape[1]), min(grid[1], prediction.shape[2]))
    finite = torch.isfinite((prediction.double() + target.double()).sum(dim=(1, 2)))
    p, q = (
        to_density(adaptive_avg_pool2d(to_density(each.detach().double()), grid)).flatten(1).cpu().numpy()
        for each in (prediction, target)
    )
    ground = _ground_distance(grid).numpy()
    distances = [float(ot.emd2(first, second, ground)) for first, second in zip(p, q, strict=True)]
    result = torch.tensor(distances, dtype=prediction.dtype, device=prediction.device)
    return torch.where(finite, result, torch.nan)
