"""A discriminator that tells given attention maps from predicted ones, and learns by itself (Patro et al., 2021)."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional


class Adversary(nn.Module):
    """Adversarial attention loss: predicted maps shall look like given ones to a discriminator.

    The discriminator's weights and its Adam moments are buffers: they belong to the state of the module that holds
    this one, are left alone by its optimiser, and are updated by `learn`. Architecture and rates are our choice: MLP
    for tokens, two convolutions for grids, LeakyReLU 0.2, BCE, Adam 1e-4 with betas (0.5, 0.999).

    Args:
        positions: shape of a map: `(tokens,)` or `(height, width)`.
        orientation: "non_saturating": the model minimises `-log D(p)`. "paper": it minimises `log(1 - D(p))`, the
            minimax form of the paper, whose gradient fades where the discriminator wins.

    Raises:
        ValueError: maps of neither one nor two dimensions.
    """

    def __init__(
        self,
        positions: tuple[int, ...],
        *,
        rate: float = 1e-4,
        orientation: Literal["non_saturating", "paper"] = "non_saturating",
    ) -> None:
        super().__init__()
        if len(positions) not in (1, 2):
            raise ValueError(f"an adversary needs maps over tokens or over a grid, got positions {positions}")
        self.positions, self.rate, self.orientation = positions, rate, orientation
        network = _token_network(positions[0]) if len(positions) == 1 else _grid_network()
        self._names = [name.replace(".", "_") for name, _ in network.named_parameters()]
        self._keys = [name for name, _ in network.named_parameters()]
        for name, weight in zip(self._names, network.parameters(), strict=True):
            self.register_buffer(f"weight_{name}", weight.detach().clone())
            self.register_buffer(f"mean_{name}", torch.zeros_like(weight))
            self.register_buffer(f"square_{name}", torch.zeros_like(weight))
        self.num_updates: Tensor
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        # a plain attribute in a tuple, so that it is no submodule and its parameters are nobody's
        self._network = (network.to("meta"),)

    def forward(self, maps: Tensor) -> Tensor:
        """Logits `(batch,)` that maps `(batch, *positions)` are given ones, without a gradient to the discriminator."""
        return self._scores(self._weights(), maps)

    def loss(self, maps: Tensor) -> Tensor:
        """The model's loss `(batch,)` for its predicted maps `(batch, *positions)`."""
        logits = self(maps)
        if self.orientation == "paper":
            return -functional.softplus(logits)
        return functional.softplus(-logits)

    def learn(self, given: Tensor, predicted: Tensor) -> Tensor:
        """One Adam step of the discriminator; gradients are averaged over ranks.

        Args:
            given, predicted: maps `(batch, *positions)`; no gradient flows back to them. A rank may have none, but
                every rank must call.

        Returns:
            The discriminator's loss before the step, a scalar without gradient.
        """
        weights = [w.detach().clone().requires_grad_() for w in self._weights()]
        with torch.enable_grad(), torch.autocast(given.device.type, enabled=False):
            real = functional.softplus(-self._scores(weights, given.detach().float()))
            fake = functional.softplus(self._scores(weights, predicted.detach().float()))
            loss = (real.sum() + fake.sum()) / max(len(given), 1)
            gradients = torch.autograd.grad(loss, weights)
        self.num_updates.add_(1)
        for name, gradient in zip(self._names, gradients, strict=True):
            self._adam(name, _mean_over_ranks(gradient))
        return loss.detach()

    def _weights(self) -> list[Tensor]:
        return [getattr(self, f"weight_{name}") for name in self._names]

    def _scores(self, weights: list[Tensor], maps: Tensor) -> Tensor:
        # in units of the uniform density, so that the scale does not depend on the number of positions
        scaled = maps * maps.shape[1:].numel()
        rows = scaled if len(self.positions) == 1 else scaled.unsqueeze(1)
        return functional_call(self._network[0], dict(zip(self._keys, weights, strict=True)), rows).flatten()

    def _adam(self, name: str, gradient: Tensor, *, betas: tuple[float, float] = (0.5, 0.999)) -> None:
        weight, mean, square = (getattr(self, f"{part}_{name}") for part in ("weight", "mean", "square"))
        mean.lerp_(gradient, 1 - betas[0])
        square.lerp_(gradient.square(), 1 - betas[1])
        count = self.num_updates.to(weight.dtype)
        corrected = mean / (1 - betas[0] ** count)
        weight -= self.rate * corrected / ((square / (1 - betas[1] ** count)).sqrt() + 1e-8)


def _token_network(tokens: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(tokens, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
    )


def _grid_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 1),
    )


def _mean_over_ranks(gradient: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient
