"""Colours of a batch of views, on whatever device it is on, each view with its own parameters.

Operations and their definitions are torchvision's (v2 functional), batched: every operation runs once over the views
that want it, and a view's result does not depend on the others in its batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.recolour_cpu import recolour_views
from pretrain.views import BLUR, BRIGHTNESS, CONTRAST, GREY, HUE, ORDER, ORDERS, SATURATION, SOLARIZE

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 as torchvision rounds it


def recolour(images: Tensor, colours: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Recolour and normalise views on their device; on a CPU with `pretrain.recolour_cpu`, which is faster there.

    Args:
        images: uint8 `(batch, height, width, 3)`.
        colours: float32 `(batch, NUM_COLOURS)`, columns as in `pretrain.views`.

    Returns:
        float32 `(batch, 3, height, width)`.
    """
    if images.device.type == "cpu":
        views = recolour_views(images.numpy(), colours.numpy(), mean=mean, std=std)
        return torch.from_numpy(views).permute(0, 3, 1, 2)
    return normalize(augment(images, colours), mean=mean, std=std)


def augment(images: Tensor, colours: Tensor) -> Tensor:
    """Recolour views.

    Args:
        images: uint8 `(batch, height, width, 3)`.
        colours: float32 `(batch, NUM_COLOURS)`, columns as in `pretrain.views`.

    Returns:
        float32 `(batch, 3, height, width)` in [0, 1].
    """
    out = images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
    jittered = colours[:, ORDER] >= 0
    orders = torch.as_tensor(ORDERS, device=colours.device)[colours[:, ORDER].clamp(min=0).long()]
    operations: tuple[tuple[Callable[[Tensor, Tensor], Tensor], int], ...] = (
        (adjust_brightness, BRIGHTNESS),
        (adjust_contrast, CONTRAST),
        (adjust_saturation, SATURATION),
        (adjust_hue, HUE),
    )
    for place in range(len(operations)):
        for number, (operation, column) in enumerate(operations):
            _apply(out, jittered & (orders[:, place] == number), operation, colours[:, column])
    _apply(out, colours[:, GREY] > 0, lambda x, _: grey(x).expand_as(x), colours[:, GREY])
    _apply(out, colours[:, BLUR] > 0, gaussian_blur, colours[:, BLUR])
    _apply(out, colours[:, SOLARIZE] > 0, solarize, colours[:, SOLARIZE])
    return out


def normalize(images: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract `mean` and divide by `std` per channel of `(batch, 3, height, width)`."""
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def grey(images: Tensor) -> Tensor:
    """Luma of `(batch, 3, height, width)` as `(batch, 1, height, width)`."""
    red, green, blue = images.unbind(1)
    return (GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue).unsqueeze(1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply by `factor` `(batch,)`, clipped to [0, 1]."""
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with each view's mean luma: 0 gives flat grey, 1 the view."""
    return _blend(images, grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey view: 0 gives grey, 1 the view."""
    return _blend(images, grey(images), factor)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue by `turns` `(batch,)` in [-0.5, 0.5], in HSV."""
    red, green, blue = images.unbind(1)
    value, _ = images.max(1)
    chroma = value - images.min(1).values
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = hue + 6 * turns.view(-1, 1, 1)
    # channel n of HSV -> RGB: value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + hue) mod 6
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(n + turned, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1).clamp_(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian of `sigma` pixels `(batch,)`; the kernel is a tenth of the view, odd; borders reflect."""
    batch, channels, height, width = images.shape
    kernel = max(height // 10, 1) | 1
    if kernel == 1:
        return images
    half = kernel // 2
    offsets = torch.arange(-half, half + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma.view(-1, 1)) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = images.reshape(1, batch * channels, height, width)
    flat = functional.pad(flat, (half, half, half, half), mode="reflect")
    flat = functional.conv2d(flat, weights.view(-1, 1, 1, kernel), groups=batch * channels)
    flat = functional.conv2d(flat, weights.view(-1, 1, kernel, 1), groups=batch * channels)
    return flat.view(batch, channels, height, width)


def solarize(images: Tensor, _: Tensor) -> Tensor:
    """Invert what is brighter than one half."""
    return torch.where(images >= 0.5, 1 - images, images)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    weight = factor.view(-1, 1, 1, 1)
    return (weight * images + (1 - weight) * other).clamp_(0, 1)


def _apply(out: Tensor, wanted: Tensor, operation: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> None:
    index = wanted.nonzero().squeeze(1)
    if len(index):
        out[index] = operation(out[index], values[index])
