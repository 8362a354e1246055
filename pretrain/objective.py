"""The student's loss: contrastive or cross entropy, plus lambda times the attention loss of every head."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.losses import weighted_loss
from attention.maps import crop_mass, warp
from engine.passes import Backward
from pretrain.augment import recolour
from pretrain.config import AttentionConfig, Config
from pretrain.data import Batch
from pretrain.diagnostics import describe_embeddings, gradient_norms
from pretrain.micro_batch import Contrast, contrast, embed, split_batch
from pretrain.model import StudentOutput

# Images of a rank on which the gradients of the losses are compared.
GRADIENT_IMAGES = 32
MAIN_GRADIENT = "main_gradient"


@dataclass
class Objective:
    """Computes the gradient of a batch; called by the training loop once per step.

    Attributes:
        module: the student as prepared by accelerate; all views of a part of the batch pass through it in one forward.
        statistics: mean and standard deviation per channel of the backbone's input.
    """

    module: nn.Module
    config: Config
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    device: torch.device

    def __call__(self, batch: Batch, *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Gradients of this rank's `batch`, and named scalars whose means over ranks are those of the global batch.

        Makes one pass of `backward.passes` for every `optim.micro_batch` images; it may be called inside a pass of the
        caller's. Every rank must hold equally many images. All means divide by the number of images, unreadable and
        unlabelled ones counted in: these lower every loss, and `accuracy`, by their share.
        """
        parts = split_batch(batch, self.config.optim.micro_batch)
        known, states = None, None
        if self.config.contrastive and len(parts) > 1:
            embeddings, states = embed(self.module, parts, prepare=self.prepare, device=self.device)
            known = self._contrast(embeddings, batch)
        scalars: dict[str, Tensor] = {}
        for index in backward.passes(len(parts)):
            part = parts[index].to(self.device)
            images = self.prepare(part)
            with nullcontext() if states is None else states[index].replayed():
                output: StudentOutput = self.module(images)
            if self.config.contrastive and known is None:
                assert output.embeddings is not None
                known = self._contrast([output.embeddings], batch)
            gradient = None if known is None else known.gradients[index]
            share = len(part.valid) / len(batch.valid)
            if index == 0 and self._looks(step):
                scalars |= self._look(batch, part, images, known)
            losses, terms = self._losses(output, part, gradient, share=share)
            backward(torch.stack(list(losses.values())).sum())
            for name, value in terms.items():
                scalars[name] = scalars.get(name, torch.zeros_like(value)) + share * value
        if known is not None:
            scalars["nt_xent"] = known.loss
        loss = scalars["nt_xent" if known is not None else "cross_entropy"]
        if self.config.attends:
            loss = loss + self.config.attention.weight * scalars["attention"]
        return {"loss": loss, **scalars}

    def prepare(self, batch: Batch) -> Tensor:
        """All views of the batch, recoloured and normalised: `(num_views * batch, 3, size, size)`."""
        images, colours = batch.images.flatten(0, 1), batch.colours.flatten(0, 1)
        with torch.no_grad():
            views = recolour(images, colours, mean=self.statistics[0], std=self.statistics[1])
            return views.contiguous(memory_format=memory_format(self.config))

    def _contrast(self, embeddings: list[Tensor], batch: Batch) -> Contrast:
        valid = None if bool(batch.valid.all()) and not _distributed() else batch.valid.to(self.device)
        return contrast(embeddings, temperature=self.config.temperature, valid=valid)

    def _losses(
        self, output: StudentOutput, part: Batch, gradient: Tensor | None, *, share: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a part, `share` of the batch, adds to the loss of the batch; and means over the part by name.

        Where `gradient` is given, NT-Xent's with respect to the part's embeddings, "main" has NT-Xent's gradient, and
        a value that means nothing.
        """
        terms: dict[str, Tensor] = {}
        if gradient is not None:
            assert output.embeddings is not None
            losses = {"main": (output.embeddings.to(gradient.dtype) * gradient).sum()}
        else:
            assert output.class_logits is not None
            logits = output.class_logits.float()
            labelled = part.valid & (part.labels >= 0)
            entropies = functional.cross_entropy(logits, part.labels.clamp(min=0), reduction="none")
            mean = (entropies * labelled).mean()
            losses = {"main": share * mean}
            terms["cross_entropy"] = mean.detach()
            terms["accuracy"] = ((logits.argmax(1) == part.labels) & labelled).float().mean()
        if self.config.attends:
            attention, more = attention_objective(output.attention, part, self.config.attention)
            losses["attention"] = share * self.config.attention.weight * attention
            terms |= {"attention": attention.detach(), **more}
        return losses, terms

    def _looks(self, step: int) -> bool:
        every = self.config.diagnostics_every
        return every > 0 and (step + 1) % every == 0

    def _look(self, batch: Batch, part: Batch, images: Tensor, known: Contrast | None) -> dict[str, Tensor]:
        """Diagnostics of a step: the embeddings of all ranks, and the gradients of the first images of `part`.

        `gradient_ratio` is the norm of lambda L_attn's gradient over that of the contrastive loss (or of cross
        entropy), with respect to the trunk's parameters. The images' share of the contrastive gradient is that of the
        whole batch, negatives of all ranks included. In arm co-train, whose attention loss is of other images,
        `MAIN_GRADIENT` is the second of the two norms, scaled up from these images to the batch.
        """
        found: dict[str, Tensor] = {}
        if known is not None:
            found |= describe_embeddings(*known.views(), valid=batch.valid.to(self.device))
        if self.config.has_heads:
            few = split_batch(part, GRADIENT_IMAGES)[0]
            gradient = None if known is None else self._first_rows(known.gradients[0], few)
            share = len(few.valid) / len(batch.valid)
            norms = gradient_norms(
                self.module,
                self._first_rows(images, few),
                lambda output: self._losses(output, few, gradient, share=share)[0],
            )
            if norms and self.config.attends:
                found["gradient_ratio"] = norms["attention"] / norms["main"]
            elif norms:
                found[MAIN_GRADIENT] = norms["main"] / share
        return found

    def _first_rows(self, rows: Tensor, few: Batch) -> Tensor:
        """Of rows `(num_views * part, ...)`, those of the views of the first images."""
        return rows.unflatten(0, (self.config.num_views, -1))[:, : len(few.valid)].flatten(0, 1)


def attention_objective(
    logits: list[Tensor], batch: Batch, config: AttentionConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """`sum_k mean_i (A * KLD - B * NSS)` over heads k and views i; a view with too little attention in it counts 0.

    The mean divides by the number of views, counted out or not, so that ranks need not exchange counts.
    """
    num_views = batch.boxes.shape[0]
    maps = batch.densities().repeat(num_views, 1, 1)
    boxes, flips = batch.boxes.flatten(0, 1), batch.flips.flatten()
    used = (crop_mass(maps, boxes) >= config.min_mass) & batch.valid.repeat(num_views)
    share = used.float().mean()
    total: Tensor = torch.zeros((), device=maps.device)
    parts: dict[str, Tensor] = {"attention_views": share}
    for head in logits:
        target = warp(maps, boxes, flips, (head.shape[1], head.shape[2]))
        loss, terms = weighted_loss(
            head, target, weights={"kld": config.kld, "nss": config.nss}, nss_target=config.nss_target, mask=used
        )
        total = total + share * loss
        for name, value in terms.items():
            parts[name] = parts.get(name, torch.zeros_like(value)) + share * value
    return total, parts


def memory_format(config: Config) -> Any:
    """torch memory format of images and convolution weights."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def _distributed() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
