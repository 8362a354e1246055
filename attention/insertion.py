"""Insertion and deletion: does revealing (or hiding) what a map attends to raise (or lower) a model's score?"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import gaussian_blur

from attention.maps import as_float

Score = Callable[[Tensor], Tensor]


class Curve(NamedTuple):
    """How a score moves while pixels are revealed or hidden."""

    auc: Tensor
    """`(batch,)` area under the curve by the trapezoid rule over the fraction, 0 to 1."""
    scores: Tensor
    """`(batch, num_steps + 1)` score after each step."""
    fractions: Tensor
    """`(num_steps + 1,)` share of the pixels changed so far, 0 to 1."""


def blurred(images: Tensor) -> Tensor:
    """Blur images `(batch, channels, height, width)`, 11x11 Gaussian of sigma 5: the start of the insertion game."""
    return gaussian_blur(images, kernel_size=[11, 11], sigma=[5.0, 5.0])


def _play(score: Score, maps: Tensor, *, start: Tensor, end: Tensor, num_steps: int) -> Curve:
    """Replace pixels of `start` by those of `end`, the most attended first."""
    if num_steps < 1 or maps.ndim != 3 or start.ndim != 4 or len(maps) != len(start):
        wanted = "images (batch, channels, height, width), maps (batch, height, width), num_steps of at least 1"
        raise ValueError(f"expected {wanted}, got {tuple(start.shape)}, {tuple(maps.shape)}, {num_steps}")
    size = (start.shape[2], start.shape[3])
    attended = interpolate(as_float(maps).detach()[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)
    # A stable sort makes the order of ties, and so the curve, the same on every device.
    order = attended.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    fractions = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    scores = []
    with torch.no_grad():
        for fraction in fractions.tolist():
            changed = (ranks < round(fraction * order.shape[1])).view(len(start), 1, *size)
            scores.append(as_float(score(torch.where(changed, end, start))))
    table = torch.stack(scores, dim=1)
    fractions = fractions.to(table)
    return Curve(torch.trapezoid(table, fractions, dim=1), table, fractions)


def insertion_auc(
    score: Score, images: Tensor, maps: Tensor, *, num_steps: int = 50, start: Tensor | None = None
) -> Curve:
    """Insertion game: reveal the pixels of an image in falling order of attention, from a blurred start.

    Args:
        score: takes images `(batch, channels, height, width)`, returns `(batch,)`: the probability of the true class.
            It is called `num_steps + 1` times, without gradient.
        images: `(batch, channels, height, width)`.
        maps: `(batch, any height, any width)`, resized bilinearly to the images; NaN counts as least attended.
        num_steps: number of equal steps from nothing to all pixels.
        start: images to start from; None for `blurred(images)`.

    Returns:
        The curve; its area is higher the better the map.

    Raises:
        ValueError: the shapes are not these, or `num_steps` is below 1.

    Source: Petsiuk, Das, Saenko, RISE, BMVC 2018.
    """
    return _play(score, maps, start=blurred(images) if start is None else start, end=images, num_steps=num_steps)


def deletion_auc(
    score: Score, images: Tensor, maps: Tensor, *, num_steps: int = 50, end: Tensor | None = None
) -> Curve:
    """Deletion game: hide the pixels of an image in falling order of attention.

    Args, Raises, Source: as `insertion_auc`; `end` is what pixels are replaced by, None for zeros.

    Returns:
        The curve; its area is lower the better the map.
    """
    return _play(score, maps, start=images, end=torch.zeros_like(images) if end is None else end, num_steps=num_steps)
