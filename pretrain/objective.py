"""The student's loss: contrastive or cross entropy, plus lambda times the attention loss of every head."""

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
from pretrain.contrast import nt_xent
from pretrain.data import Batch
from pretrain.model import StudentOutput


@dataclass
class Objective:
    """Computes the loss of a batch; called by the training loop once per step.

    Attributes:
        module: the student as prepared by accelerate; all views pass through it in one forward.
        statistics: mean and standard deviation per channel of the backbone's input.
    """

    module: nn.Module
    config: Config
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    device: torch.device

    def __call__(self, batch: Batch, *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Gradients of this rank's `batch`, and named scalars whose means over ranks are those of the global batch."""
        batch = batch.to(self.device)
        images = self.prepare(batch)
        output: StudentOutput = self.module(images)
        scalars: dict[str, Tensor] = {}
        if self.config.contrastive:
            assert output.embeddings is not None
            first, second = output.embeddings.chunk(2)
            valid = None if bool(batch.valid.all()) and not _distributed() else batch.valid
            loss = nt_xent(first, second, temperature=self.config.temperature, valid=valid)
            scalars["nt_xent"] = loss
        else:
            assert output.class_logits is not None
            logits = output.class_logits.float()
            labelled = batch.valid & (batch.labels >= 0)
            losses = functional.cross_entropy(logits, batch.labels.clamp(min=0), reduction="none")
            loss = (losses * labelled).mean()
            scalars["cross_entropy"] = loss
            scalars["accuracy"] = ((logits.argmax(1) == batch.labels) & labelled).float().mean()
        if self.config.attends:
            attention, more = attention_objective(output.attention, batch, self.config.attention)
            loss = loss + self.config.attention.weight * attention
            scalars |= {"attention": attention, **more}
        backward(loss)
        return {"loss": loss, **scalars}

    def prepare(self, batch: Batch) -> Tensor:
        """All views of the batch, recoloured and normalised: `(num_views * batch, 3, size, size)`."""
        images, colours = batch.images.flatten(0, 1), batch.colours.flatten(0, 1)
        with torch.no_grad():
            views = recolour(images, colours, mean=self.statistics[0], std=self.statistics[1])
            return views.contiguous(memory_format=memory_format(self.config))


def attention_objective(
    logits: list[Tensor], batch: Batch, config: AttentionConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """`sum_k mean_i (A * KLD - B * NSS)` over heads k and views i; a view with too little attention in it counts 0.

    The mean divides by the number of views, counted out or not, so that ranks need not exchange counts.
    """
    assert batch.maps is not None
    num_views = batch.boxes.shape[0]
    maps = batch.maps.repeat(num_views, 1, 1)
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
