"""NT-Xent over the global batch (SimCLR, Chen et al. 2020, equation 1)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order; the gradient of a row comes back from every rank that used it."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """`(rows, dim)` of every rank, equally many each, as `(world * rows, dim)`, with gradient."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return _GatherRows.apply(rows)
    return rows


def nt_xent(first: Tensor, second: Tensor, *, temperature: float, valid: Tensor | None = None) -> Tensor:
    """Normalised temperature-scaled cross entropy between two views, negatives from all ranks.

    `-log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) )`, `s` the cosine similarity, `j` the other view of `i`; the mean
    over this rank's rows. The mean of it over ranks is the loss of the global batch, and averaging gradients over ranks
    (as DDP and DeepSpeed do) gives that loss's gradient.

    Args:
        first, second: embeddings of the two views `(batch, dim)`, any norm; the same batch on every rank. Computed in
            fp32 at least.
        temperature: T > 0.
        valid: bool `(batch,)`; an image that is false is neither anchor nor negative. The mean still divides by the
            batch, so that no rank needs to know the others' counts.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: the two views have different shapes.
    """
    if first.shape != second.shape:
        raise ValueError(f"views must have equal shapes, got {tuple(first.shape)} and {tuple(second.shape)}")
    batch = len(first)
    dtype = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        local = functional.normalize(torch.cat([first, second]).to(dtype), dim=1)
        everyone = gather_rows(local)
        logits = local @ everyone.t() / temperature
        rank = dist.get_rank() if len(everyone) != len(local) else 0
        rows = torch.arange(2 * batch, device=local.device)
        offset = rank * 2 * batch
        logits[rows, rows + offset] = -torch.inf
        positives = (rows + batch) % (2 * batch) + offset
        if valid is None:
            return functional.cross_entropy(logits, positives)
        mask = valid.repeat(2)
        everywhere = gather_rows(mask.to(dtype).unsqueeze(1)).squeeze(1) > 0
        columns = torch.where(everywhere, 0.0, -torch.inf).to(dtype)
        losses = functional.cross_entropy(logits[mask] + columns, positives[mask], reduction="sum")
        return losses / (2 * batch)
