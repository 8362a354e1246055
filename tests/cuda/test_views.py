"""Colours, blur and maps on the device: the values of the CPU, for the same draws."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from attention.maps import crop_mass, decode_map, encode_map, to_density, warp
from pretrain import augment as ours
from pretrain.config import ViewsConfig
from pretrain.views import draw_views

COUNT, SIZE = 64, 40
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# Operation to values of its parameter; grey and normalise have none.
OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float]]] = {
    "brightness": (ours.adjust_brightness, (0.2, 1.8)),
    "contrast": (ours.adjust_contrast, (0.2, 1.8)),
    "saturation": (ours.adjust_saturation, (0.2, 1.8)),
    "hue": (ours.adjust_hue, (-0.5, 0.5)),
    "blur": (ours.gaussian_blur, (0.1, 2.0)),
    "solarise": (ours.solarize, (0.0, 1.0)),
    "grey": (lambda images, _: ours.grey(images), (0.0, 1.0)),
    "normalise": (lambda images, _: ours.normalize(images, mean=MEAN, std=STD), (0.0, 1.0)),
}


@pytest.fixture
def pixels() -> Tensor:
    """Smooth images, one of them grey, uint8 `(batch, height, width, 3)`."""
    small = torch.rand(COUNT, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(small, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    smooth[0] = smooth[0, :1]
    return (255 * smooth).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def drawn() -> Tensor:
    """Colours of one view each, as the loader draws them, with every operation among them."""
    config = ViewsConfig(solarize=0.3)
    views = draw_views(config, seed=3, epochs=[0] * COUNT, samples=range(COUNT), sizes=[(64, 64)] * COUNT, num_views=1)
    return torch.from_numpy(views.colours[0])


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_operation(device: torch.device, pixels: Tensor, name: str) -> None:
    operation, (low, high) = OPERATIONS[name]
    images = pixels.permute(0, 3, 1, 2).float() / 255
    values = torch.linspace(low, high, COUNT)
    expected = operation(images, values)
    found = operation(images.to(device), values.to(device))
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-5)


def test_the_whole_recipe(device: torch.device, pixels: Tensor) -> None:
    """The float path on both devices within 1e-4 of full scale, and the door that the objective uses."""
    colours = drawn()
    expected = ours.normalize(ours.augment(pixels, colours), mean=MEAN, std=STD)
    found = ours.normalize(ours.augment(pixels.to(device), colours.to(device)), mean=MEAN, std=STD)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4 / min(STD))
    door = ours.recolour(pixels.to(device), colours.to(device), mean=MEAN, std=STD)
    if device.type != "cpu":  # there it is the uint8 path
        assert torch.equal(door, found)
    levels = (door.cpu() - ours.recolour(pixels, colours, mean=MEAN, std=STD)).abs() * torch.tensor(STD).view(3, 1, 1)
    assert (levels.mean((1, 2, 3)) < 2 / 255).all()


def test_maps_follow_their_views(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(16, 56, 56, generator=generator)
    maps[3] = 0
    corner = 0.7 * torch.rand(16, 2, generator=generator)
    boxes = torch.cat([corner, (1 - corner) * (0.3 + 0.7 * torch.rand(16, 2, generator=generator))], dim=1)
    flips = torch.rand(16, generator=generator) < 0.5
    there = [tensor.to(device) for tensor in (maps, boxes, flips)]
    torch.testing.assert_close(warp(*there, (7, 9)).cpu(), warp(maps, boxes, flips, (7, 9)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(crop_mass(*there[:2]).cpu(), crop_mass(maps, boxes), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_density(there[0]).cpu(), to_density(maps), rtol=1e-5, atol=1e-9)
    codes, expected = encode_map(there[0]).cpu().int(), encode_map(maps).int()
    assert (codes - expected).abs().max() <= 1 and (codes != expected).float().mean() < 0.01
    torch.testing.assert_close(decode_map(encode_map(there[0])).cpu(), decode_map(codes.byte()), rtol=1e-5, atol=1e-9)
    assert np.isfinite(decode_map(encode_map(there[0])).cpu().numpy()).all()
