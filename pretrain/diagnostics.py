"""What a contrastive training looks like from inside: alignment, uniformity, embedding rank, the losses' gradients.

Nothing here changes a training: no weight, gradient, running statistic or random number.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.state import unwrap
from pretrain.batch_statistics import kept_statistics
from pretrain.contrast import Exchange
from pretrain.micro_batch import RandomState
from pretrain.model import StudentOutput

# Pairs grow with the square of the rows; the mean over those of this many rows varies by less than a step does.
UNIFORMITY_ROWS = 2048
# Losses are scaled up before their backward, as fp16 gradients would otherwise vanish; a power of two changes no norm.
GRADIENT_SCALE = 2.0**10


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of the two views of an image: `mean |x - y|^2` (Wang & Isola 2020, alpha = 2).

    Args:
        first, second: embeddings `(batch, dim)`, any norm; compared on the unit sphere.

    Returns:
        Scalar in [0, 4], 0 where views agree; NaN for no images.
    """
    first, second = functional.normalize(first, dim=1), functional.normalize(second, dim=1)
    return (first - second).square().sum(1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """How evenly embeddings cover the unit sphere: `log mean_{i<j} exp(-2 |x_i - x_j|^2)` (Wang & Isola 2020, t = 2).

    Args:
        embeddings: one view each of different images, `(batch, dim)`, any norm.

    Returns:
        Scalar in [-8, 0], 0 where all agree, about -4 for evenly spread ones in many dimensions; NaN for fewer than
        two.
    """
    rows = functional.normalize(embeddings, dim=1)
    return torch.pdist(rows).square().mul(-2).exp().mean().log()


def embedding_rank(embeddings: Tensor, *, eps: float = 1e-7) -> Tensor:
    """RankMe: `exp(-sum p_k log p_k)`, `p_k = sigma_k / sum sigma + eps`, sigma singular values (Garrido et al. 2023).

    Args:
        embeddings: `(batch, dim)`, neither normalised nor centred.

    Returns:
        Scalar from 1 to min(batch, dim); NaN for no rows, for zeros only, and where a value is not finite.
    """
    usable = torch.isfinite(embeddings).all() & (embeddings != 0).any()
    rows = torch.where(usable, embeddings, 1.0).double()
    gram = rows.t() @ rows if len(rows) >= rows.shape[1] else rows @ rows.t()
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = sigma / sigma.sum() + eps
    return torch.where(usable, (-(p * p.log()).sum()).exp(), torch.nan).to(embeddings.dtype)


def describe_embeddings(first: Tensor, second: Tensor, *, valid: Tensor) -> dict[str, Tensor]:
    """`alignment`, `uniformity` (the mean of both views') and `embedding_rank` over the images of all ranks.

    A collective call. Uniformity takes the first `UNIFORMITY_ROWS` of the images.

    Args:
        first, second: embeddings of the two views `(batch, dim)`, equally many on every rank.
        valid: bool `(batch,)`, the images that count.
    """
    exchange = Exchange.equal(len(first))
    kept = exchange.gather(valid)
    views = [exchange.gather(view.detach())[kept] for view in (first, second)]
    few = [view[:UNIFORMITY_ROWS] for view in views]
    return {
        "alignment": alignment(views[0], views[1]),
        "uniformity": (uniformity(few[0]) + uniformity(few[1])) / 2,
        "embedding_rank": embedding_rank(torch.cat(views)),
    }


def gradient_norms(
    module: nn.Module, images: Tensor, losses: Callable[[StudentOutput], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """L2 norm of each loss's gradient with respect to all parameters of the trunk (the backbone), on this rank.

    One more forward of the student, outside of its launcher, and one backward per loss. Batch norm normalises with
    these images' statistics.

    Args:
        module: the student, prepared or not.
        images: as the student takes them.
        losses: of the student's output, scalars by name.

    Returns:
        Scalars by name; none where the weights do not lie whole on this rank (ZeRO 3).
    """
    student = unwrap(module)
    trunk = [p for p in student.get_submodule("backbone").parameters() if p.requires_grad]
    if any(hasattr(p, "ds_id") for p in trunk):
        return {}
    with kept_statistics(student), RandomState.now(images.device).replayed(), torch.enable_grad():
        found = losses(student.forward(images))  # not a call: a compiled student would be compiled for these images
        return {
            name: _norm(torch.autograd.grad(GRADIENT_SCALE * loss, trunk, retain_graph=True, allow_unused=True))
            for name, loss in found.items()
        }


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.nn.utils.get_total_norm([g.float() for g in gradients if g is not None]) / GRADIENT_SCALE
