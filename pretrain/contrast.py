"""NT-Xent over the global batch (SimCLR, Chen et al. 2020, equation 1), without the matrix of all similarities.

Rows are normalised embeddings; this rank's are anchors, everyone's are columns. The forward walks over tiles of the
matrix with an online log-sum-exp. The backward computes each tile again and uses that similarity is symmetric: with
`p_ij = exp(s_ij / T - m_i) / t_i`, m_i the largest logit of row i, t_i its sum, and `g_i` the gradient of anchor i's
loss,

    dL/dz_i = 1/T sum_j (g_i p_ij + g_j p_ji) z_j - 1/T (g_i + g_i') z_i',        i' the other view of i,

where the first term is row i as an anchor and the second row i among the columns of every other anchor, on whichever
rank. So what the ranks exchange for the backward is two numbers a row, `m` and `g / t`, and no gradient of a column.

In fp32 value and gradient (by norm) are those of float64 to 1e-6 relative, for embeddings of noise and T of 0.01 and
more. At T = 0.01 half an ulp of a similarity is 3e-6 of its exponential, so nothing is rounded that need not be:
products are scaled after they are added up, which also keeps the matrix symmetric, and m and log t stay two numbers.
Where the views of an image lie far nearer to each other than to the rest, 1 - p is what little remains of two equal
numbers, in any fp32 formula: the gradient of a loss of 0.2 at T = 0.1 is right to some 1e-6.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Entries of a tile. On a CPU it stays in the cache of a core; on a GPU it is large enough to hide the kernels' start.
CPU_TILE, GPU_TILE = 1 << 18, 1 << 21
MAX_TILE_ROWS = 1024


@dataclass(frozen=True)
class Exchange:
    """Who takes part in a loss: every rank's number of rows, and the gathering of their rows.

    Attributes:
        counts: rows of each rank, in rank order.
        rank: this rank.
    """

    counts: tuple[int, ...]
    rank: int = 0

    @classmethod
    def of(cls, num_rows: int, *, device: torch.device) -> "Exchange":
        """All ranks of the process group, each with a number of rows of its own; a collective call."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls((num_rows,))
        mine = torch.tensor([num_rows], device=device)
        counts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, mine)
        return cls(tuple(int(count) for count in torch.cat(counts).tolist()), dist.get_rank())

    @classmethod
    def equal(cls, num_rows: int) -> "Exchange":
        """All ranks of the process group, each known to have `num_rows` rows; costs no communication."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls((num_rows,))
        return cls((num_rows,) * dist.get_world_size(), dist.get_rank())

    @property
    def offset(self) -> int:
        """Place of this rank's first row among everyone's."""
        return sum(self.counts[: self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """`(num_rows, ...)` of every rank as `(sum of counts, ...)`, in rank order, without gradient."""
        if len(self.counts) == 1:
            return rows
        longest = max(self.counts)
        padded = rows.contiguous()
        if len(rows) < longest:  # ranks can only gather what has one shape
            padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        gathered = rows.new_empty(len(self.counts) * longest, *rows.shape[1:])
        parts = gathered.split(longest)
        dist.all_gather(list(parts), padded)
        if min(self.counts) == longest:
            return gathered
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])


def nt_xent(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float,
    valid: Tensor | None = None,
    exchange: Exchange | None = None,
    tile: int | None = None,
) -> Tensor:
    """Normalised temperature-scaled cross entropy between two views, negatives from all ranks.

    `-log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) )`, `s` the cosine similarity, `j` the other view of `i`, scaled
    so that the mean over ranks is the mean over the global batch, and averaging gradients over ranks (as DDP and
    DeepSpeed do) gives that loss's gradient. Where ranks hold equally many images it is the mean over this rank's.

    Args:
        first, second: embeddings of the two views `(batch, dim)`, any norm; batches may differ between ranks. Computed
            in fp32 at least.
        temperature: T > 0.
        valid: bool `(batch,)`; an image that is false is neither anchor nor negative. The mean still divides by the
            global batch, so that a lost image leaves the others' weight alone. All ranks give it or none does.
        exchange: the rows of each rank, two per image; by default the ranks tell each other.
        tile: entries of the similarity matrix held at a time; by default what suits the device.

    Returns:
        Scalar, at least 0. It has no second derivative.

    Raises:
        ValueError: the two views have different shapes.
    """
    if first.shape != second.shape:
        raise ValueError(f"views must have equal shapes, got {tuple(first.shape)} and {tuple(second.shape)}")
    dtype = torch.promote_types(first.dtype, torch.float32)
    device = first.device
    with torch.autocast(device.type, enabled=False):
        local = functional.normalize(torch.cat([first, second]).to(dtype), dim=1)
        if exchange is None:
            exchange = Exchange.of(len(local), device=device)
        mask = valid.repeat(2) if valid is not None else None
        tile = tile or (GPU_TILE if device.type == "cuda" else CPU_TILE)
        total = _NTXent.apply(local, mask, temperature, exchange, tile)
        return total * (len(exchange.counts) / max(sum(exchange.counts), 1))


class _NTXent(torch.autograd.Function):
    """Sum of the losses of this rank's valid rows."""

    @staticmethod
    def forward(
        context: Any, local: Tensor, mask: Tensor | None, temperature: float, exchange: Exchange, tile: int
    ) -> Tensor:
        everyone = exchange.gather(local)
        columns = exchange.gather(mask) if mask is not None else None
        # Of each row so far: the largest logit, finite so that a tile of -inf alone adds 0; sum exp(logit - largest).
        largest = local.new_full((len(local),), torch.finfo(local.dtype).min)
        total = local.new_zeros(len(local))
        for rows, cols in _tiles(len(local), len(everyone), tile):
            logits = _logits(local, everyone, rows, cols, temperature=temperature, offset=exchange.offset)
            if columns is not None:
                logits.masked_fill_(~columns[cols], -torch.inf)
            now = torch.maximum(largest[rows], logits.amax(1))
            total[rows] *= (largest[rows] - now).exp_()
            total[rows] += logits.sub_(now.unsqueeze(1)).exp_().sum(1)
            largest[rows] = now
            del logits  # else two tiles are held while the next is made
        losses = total.log() + (largest - (local * _partners(local)).sum(1) * (1 / temperature))
        if mask is not None:
            losses = torch.where(mask, losses, 0.0)
            # make every p_ij of an anchor that does not count 0
            largest, total = torch.where(mask, largest, torch.inf), torch.where(mask, total, 1.0)
        context.save_for_backward(local, everyone, largest, total, mask, columns)
        context.temperature, context.exchange, context.tile = temperature, exchange, tile
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        local, everyone, largest, total, mask, columns = context.saved_tensors
        exchange, temperature = context.exchange, context.temperature
        weights = gradient.expand(len(local)) if mask is None else gradient * mask
        with torch.autocast(local.device.type, enabled=False):
            shares = weights / total
            all_largest, all_shares = exchange.gather(torch.stack([largest, shares], dim=1)).unbind(1)
            result = -(weights + _partners(weights)).unsqueeze(1) * _partners(local)
            for rows, cols in _tiles(len(local), len(everyone), context.tile):
                logits = _logits(local, everyone, rows, cols, temperature=temperature, offset=exchange.offset)
                if columns is not None:
                    logits.masked_fill_(~columns[cols], -torch.inf)
                share = (logits - largest[rows, None]).exp_().mul_(shares[rows, None])
                share.addcmul_(logits.sub_(all_largest[cols]).exp_(), all_shares[cols])
                result[rows].addmm_(share, everyone[cols])
                del logits, share
        if mask is not None:
            result = torch.where(mask.unsqueeze(1), result, 0.0)
        return result.div_(temperature), None, None, None, None


def _partners(rows: Tensor) -> Tensor:
    """The other view's row of each row."""
    return rows.roll(len(rows) // 2, 0)


def _tiles(num_rows: int, num_columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cover a matrix by tiles of at most `size` entries, all columns of some rows first."""
    height = max(1, min(num_rows, MAX_TILE_ROWS, size))
    width = max(1, size // height)
    for top in range(0, num_rows, height):
        for left in range(0, num_columns, width):
            yield slice(top, min(top + height, num_rows)), slice(left, min(left + width, num_columns))


def _logits(local: Tensor, everyone: Tensor, rows: slice, cols: slice, *, temperature: float, offset: int) -> Tensor:
    """One tile of `s / T`, -inf where a row meets itself; `offset` is the column of the first row."""
    logits = (local[rows] @ everyone[cols].t()).mul_(1 / temperature)
    start, stop = max(rows.start + offset, cols.start), min(rows.stop + offset, cols.stop)
    if start < stop:
        row, column, length = start - offset - rows.start, start - cols.start, stop - start
        logits[row : row + length, column : column + length].fill_diagonal_(-torch.inf)
    return logits
