"""Contrast over a local batch that the encoder sees in parts: the gradient of the whole batch in the memory of a part.

The gradient of NT-Xent reaches the weights through the embeddings alone (Gao et al. 2021, "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup"). So the first pass computes all embeddings without a graph; the loss of
all of them gives the gradient of each; the second pass computes each part again, with a graph, and goes backward from
`<embedding, gradient>`, whose gradient is the loss's. The second pass draws the same random numbers as the first.

An encoder without batch statistics gets exactly the gradient of one pass. Batch norm normalises each part with the
statistics of that part (synchronised: of the parts that all ranks hold at the time), in both passes alike, as it
normalises each rank's batch with the rank's own; its running statistics take in each part once, in the second pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.batch_statistics import kept_statistics
from pretrain.contrast import Exchange, nt_xent
from pretrain.data import Batch


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into parts of `size` images (the last may hold fewer), all views of an image in the same part.

    0, or a size that holds the whole batch, leaves it in one piece.
    """
    count = len(batch.valid)
    if size == 0 or size >= count:
        return [batch]
    cuts = [slice(start, start + size) for start in range(0, count, size)]
    return [
        replace(
            batch,
            images=batch.images[:, cut],
            boxes=batch.boxes[:, cut],
            flips=batch.flips[:, cut],
            colours=batch.colours[:, cut],
            maps=batch.maps[cut] if batch.maps is not None else None,
            labels=batch.labels[cut],
            valid=batch.valid[cut],
            sizes=batch.sizes[cut] if batch.sizes is not None else None,
        )
        for cut in cuts
    ]


@dataclass
class Contrast:
    """NT-Xent of a local batch, and how it changes with each embedding.

    Attributes:
        loss: scalar, without gradient.
        embeddings: per part, `(2 * part, dim)`, first views before second ones, without gradient.
        gradients: the loss's gradient with respect to them.
    """

    loss: Tensor
    embeddings: list[Tensor]
    gradients: list[Tensor]

    def views(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the first and of the second views, `(batch, dim)` each."""
        first, second = _views(self.embeddings)
        return first, second


def _views(parts: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(halves) for halves in zip(*(part.chunk(2) for part in parts), strict=True)]


def contrast(embeddings: Sequence[Tensor], *, temperature: float, valid: Tensor | None) -> Contrast:
    """NT-Xent over the embeddings of all parts and of all ranks, each of which must hold equally many.

    Args:
        embeddings: per part, `(2 * part, dim)`, first views before second ones.
        valid: bool `(batch,)`, as in `nt_xent`.
    """
    known = [part.detach().to(torch.promote_types(part.dtype, torch.float32)) for part in embeddings]
    views = [view.requires_grad_() for view in _views(known)]
    exchange = Exchange.equal(2 * len(views[0]))
    loss = nt_xent(views[0], views[1], temperature=temperature, valid=valid, exchange=exchange)
    sizes = [len(part) // 2 for part in known]
    halves = (gradient.split(sizes) for gradient in torch.autograd.grad(loss, views))
    return Contrast(loss.detach(), known, [torch.cat(pair) for pair in zip(*halves, strict=True)])


@dataclass
class RandomState:
    """The state of torch's generators of the CPU and of the device that computes."""

    device: torch.device
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The present state."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), gpu)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw again what was drawn from this state on; afterwards go on as if nothing had been drawn."""
        with torch.random.fork_rng(devices=[self.device] if self.gpu is not None else []):
            torch.set_rng_state(self.cpu)
            if self.gpu is not None:
                torch.cuda.set_rng_state(self.gpu, self.device)
            yield


def embed(
    module: nn.Module, parts: Sequence[Batch], *, prepare: Callable[[Batch], Tensor], device: torch.device
) -> tuple[list[Tensor], list[RandomState]]:
    """The first pass: embeddings of each part, without a graph, and the random state that each began with.

    Args:
        module: the prepared student.
        prepare: images of a part on `device`, as the student takes them.
    """
    # DDP itself would send batch norm's buffers to all ranks, here and not in the pass that uses them.
    student = module.module if isinstance(module, DistributedDataParallel) else module
    embeddings, states = [], []
    with torch.no_grad(), kept_statistics(module):
        for part in parts:
            images = prepare(part.to(device))
            states.append(RandomState.now(device))
            embeddings.append(student(images).embeddings)
    return embeddings, states
