"""The loss of the attention branch network, of its mining branch, and of maps given to it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attention.maps import to_density
from attention.supervision import supervise
from downstream.branch.config import BranchConfig, MapLoss
from downstream.branch.model import BranchOutput
from downstream.branch.pictures import Batch, PictureSet
from engine.passes import Backward


@dataclass
class BranchObjective:
    """`L = L_att + L_per (+ alpha * sum_i S_i^c) (+ gamma * L_map)`; called by the training loop once per step.

    L_att, L_per: cross entropy of the two branches (Fukui et al.). S_i^c: softmax probability of the true class
    without what the map shows, summed over the global batch (Iwayoshi et al.). L_map: see `map_loss`.

    Attributes:
        module: the network as prepared for the launcher.
        pictures: what the batches' rows are rows of, on the training device.
        batch_size: over all ranks.
        use_maps: whether maps supervise.
    """

    module: nn.Module
    pictures: PictureSet
    config: BranchConfig
    batch_size: int
    grid: tuple[int, int]
    use_maps: bool

    def __call__(self, batch: Batch, *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Gradients of this rank's `batch`, and named scalars."""
        views = self.pictures.views(batch, size=self.config.size, grid=self.grid if self.use_maps else None)
        found: BranchOutput = self.module(views.images)
        logits = found.logits.float()
        attention = cross_entropy(found.attention_logits.float(), views.targets)
        perception = cross_entropy(logits, views.targets)
        loss = attention + perception
        scalars = {
            "attention": attention,
            "perception": perception,
            "score": (logits.detach().argmax(1) == views.targets).float().mean(),
        }
        if found.masked_logits is not None:
            # the ranks' gradients are averaged, so the batch's sum is its size times this rank's mean
            scalars["masked_score"] = true_class_score(found.masked_logits, views.targets).mean()
            loss = loss + self.config.alpha * self.batch_size * scalars["masked_score"]
        if views.maps is not None:
            losses = map_loss(self.config.map_loss, found.maps, views.maps)
            scalars["map"] = (losses * views.use).mean()
            loss = loss + self.config.gamma * scalars["map"]
        backward(loss)
        return {"loss": loss, **scalars}


def true_class_score(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax probability of the true class, `(batch,)`."""
    return logits.float().softmax(1).gather(1, targets[:, None]).squeeze(1)


def map_loss(name: MapLoss, maps: Tensor, given: Tensor) -> Tensor:
    """How far the network's maps are from given ones.

    "l2" is `||M' - M||_2` over the positions (Mitsuhara et al.), M' the given map scaled to peak 1 [our choice: edited
    maps are in [0, 1], densities are not]; the others compare the two as densities (`attention.supervision`).

    Args:
        maps: `(batch, height, width)` in (0, 1).
        given: `(batch, height, width)`, at least 0, of any scale.

    Returns:
        `(batch,)`.
    """
    maps, given = maps.float(), given.float()
    if name != "l2":
        return supervise(name, to_density(maps), to_density(given))
    peak = given.amax(dim=(1, 2), keepdim=True)
    return torch.linalg.vector_norm(maps - given / torch.where(peak > 0, peak, 1.0), dim=(1, 2))
