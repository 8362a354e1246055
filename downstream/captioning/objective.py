"""The loss of captioning: the words, the doubly stochastic term, and the attention loss of the words that name objects.

`L = L_words + L_stochastic + weight * L_attention` (Kim et al., ICA; weight 0.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.supervision import SUPERVISION, lovasz_hinge, supervise
from downstream.captioning.config import CaptionConfig
from downstream.captioning.matching import grid_labels
from downstream.captioning.models.base import Told
from downstream.captioning.vocabulary import PADDING
from downstream.data import Batch
from engine.passes import Backward
from engine.ranks import Ranks

BorderName = Literal["mean", "middle", "zero"]
BASELINE, ICA = "baseline", "ica"
# Arms of the ICA loss: what parts object from background in the energies; see `ica_loss`.
BORDERS: Mapping[str, BorderName] = {ICA: "mean", "ica_middle": "middle", "ica_zero": "zero"}
ARMS = (BASELINE, *BORDERS, *sorted(SUPERVISION))


def word_losses(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of all tokens behind the first, in nats, and their number.

    Args:
        logits: `(batch, length - 1, words)`.
        tokens: `(batch, length)`; padding counts for nothing.
    """
    targets = tokens[:, 1:]
    total = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="sum"
    )
    return total, (targets != PADDING).sum()


def doubly_stochastic(maps: Tensor, tokens: Tensor) -> Tensor:
    """`mean_i (1 - sum_t alpha_ti)^2` over captions and places (Xu et al., 2015, equation 14, as a mean).

    Args:
        maps: `(batch, length - 1, height, width)`.
    """
    steps = (tokens[:, 1:] != PADDING)[:, :, None, None]
    return (1 - (maps.float() * steps).sum(1)).square().mean()


def object_losses(arm: str, told: Told, positions: Tensor, coverage: Tensor) -> Tensor:
    """Mean attention loss over the objects that a caption names, per caption; 0 where it names none.

    An arm of `BORDERS` is the Lovasz hinge of the word's energies, less their border (`ica_loss`), against the cells
    that the object covers by half, at least the fullest; every other arm is a loss of `attention.supervision` between
    the word's map and the coverage, normalised to sum 1. An object that covers no cell is void and counts for nothing.

    Args:
        positions: `(batch, objects)`, step of the word; -1 where there is none.
        coverage: `(batch, objects, height, width)`, share of each cell.

    Returns:
        `(batch,)`.
    """
    area = coverage.flatten(2).sum(2)
    given = (positions >= 0) & (area > 0)
    captions = torch.arange(len(positions), device=positions.device).unsqueeze(1).expand_as(positions)
    steps = positions.clamp(min=0)
    if arm in BORDERS:
        energies = told.energies[captions, steps].float().flatten(2)
        losses = ica_loss(energies.flatten(0, 1), coverage.flatten(0, 1).flatten(1), border=BORDERS[arm]).view_as(area)
    else:
        pred = told.maps[captions, steps].float().flatten(0, 1)
        uniform = torch.full_like(coverage, 1 / coverage[0, 0].numel())
        target = torch.where(given[:, :, None, None], coverage / area.clamp(min=1e-6)[:, :, None, None], uniform)
        losses = supervise(arm, pred, target.flatten(0, 1), checked=True).view_as(area)
    losses = torch.where(given, losses, torch.zeros_like(losses))
    return losses.sum(1) / given.sum(1).clamp(min=1)


def ica_loss(energies: Tensor, coverage: Tensor, *, border: BorderName = "mean") -> Tensor:
    """Lovasz hinge (Berman et al., 2018) of energies against masks on the grid, per map.

    A softmax map has a mean of 1/n, which leaves every hinge open, so energies before it are taken, and a border that
    parts object from background, which the paper does not name: their mean; the middle between their means inside and
    outside the mask (a mask of few cells then needs no larger energies than one of many); or 0, which they are free to
    move to, since the softmax does not see a shift. All-void maps, whose mask covers nothing, give 0.

    Args:
        energies: `(maps, places)`.
        coverage: `(maps, places)`, share of each cell in [0, 1].

    Returns:
        `(maps,)`, at least 0.
    """
    labels = grid_labels(coverage)
    shift = energies.new_zeros(len(energies), 1)
    if border != "zero":
        shift = energies.mean(1, keepdim=True)
    if border == "middle":
        inside, outside = labels.sum(1, keepdim=True), (~labels).sum(1, keepdim=True)
        high = (energies * labels).sum(1, keepdim=True) / inside.clamp(min=1)
        low = (energies * ~labels).sum(1, keepdim=True) / outside.clamp(min=1)
        shift = torch.where((inside > 0) & (outside > 0), (high + low) / 2, shift)
    scores = energies - shift
    return torch.where(labels.any(1), lovasz_hinge(scores, labels), scores.sum(1) * 0)


@dataclass
class CaptionObjective:
    """Computes the loss of a batch; called by the training loop once per step.

    Attributes:
        module: the captioner as prepared for the launcher.
        arm: one of `ARMS`.
    """

    module: nn.Module
    arm: str
    config: CaptionConfig
    ranks: Ranks
    device: torch.device

    def __call__(self, batch: Batch, *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Gradients of this rank's `batch`, and named scalars."""
        batch = batch.on(self.device)
        inputs: dict[str, Any] = batch.inputs
        told: Told = self.module({k: v for k, v in inputs.items() if k not in ("positions", "coverage")})
        total, count = word_losses(told.logits, inputs["tokens"])
        # by the mean number of words over the ranks: the sum over ranks is then that of one rank with the whole batch
        words = total / (self.ranks.mean({"words": count})["words"] if self.ranks.world_size > 1 else count)
        stochastic = doubly_stochastic(told.maps, inputs["tokens"])
        loss = words + self.config.doubly_stochastic * stochastic
        scalars = {"words": words, "stochastic": stochastic}
        if self.arm != BASELINE:
            attention = object_losses(self.arm, told, inputs["positions"], inputs["coverage"]).mean()
            loss = loss + self.config.weight * attention
            scalars["attention"] = attention
        backward(loss)
        return {"loss": loss, **scalars}
