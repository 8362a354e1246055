"""Batched colour operations against torchvision's, one by one and in order."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from pretrain import augment as ours
from pretrain import recolour_cpu as on_cpu
from pretrain.views import BLUR, BRIGHTNESS, CONTRAST, GREY, HUE, NUM_COLOURS, ORDER, ORDERS, SATURATION, SOLARIZE

LIMIT = 2 / 255


def smooth_images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(6, 3, size // 5, size // 5, generator=generator)
    smooth = torch.nn.functional.interpolate(small, size=(size, size), mode="bicubic").clamp(0, 1)
    smooth[0] = smooth[0, :1]  # a grey image: hue and saturation have nothing to turn
    return smooth


@pytest.fixture(name="images")
def images_fixture() -> Tensor:
    return smooth_images(40)


@pytest.mark.parametrize(
    ("operation", "theirs", "values"),
    [
        (ours.adjust_brightness, reference.adjust_brightness, [0.2, 0.7, 1.0, 1.3, 1.8, 0.0]),
        (ours.adjust_contrast, reference.adjust_contrast, [0.2, 0.7, 1.0, 1.3, 1.8, 0.0]),
        (ours.adjust_saturation, reference.adjust_saturation, [0.2, 0.7, 1.0, 1.3, 1.8, 0.0]),
        (ours.adjust_hue, reference.adjust_hue, [-0.5, -0.2, 0.0, 0.1, 0.2, 0.5]),
    ],
)
def test_each_jitter_operation_is_torchvisions(
    images: Tensor, operation: Callable[..., Tensor], theirs: Callable[..., Tensor], values: list[float]
) -> None:
    found = operation(images, torch.tensor(values))
    for one, value, result in zip(images, values, found, strict=True):
        expected = theirs(one, value)
        assert (result - expected).abs().mean() < LIMIT / 20  # the same formula, in another order of roundings


SIGMAS = [0.1, 0.4, 0.8, 1.2, 1.6, 2.0]
KERNELS = {40: 5, 96: 9, 224: 23}  # by size of the view: a tenth, and odd, as SimCLR's


@pytest.mark.parametrize(("size", "kernel"), KERNELS.items())
def test_blur_is_torchvisions(size: int, kernel: int) -> None:
    images = smooth_images(size)
    pixels = (images * 255).round().to(torch.uint8)
    found = ours.gaussian_blur(images, torch.tensor(SIGMAS))
    for one, eight_bits, s, result in zip(images, pixels, SIGMAS, found, strict=True):
        expected = reference.gaussian_blur(one, kernel_size=[kernel, kernel], sigma=[s, s])
        assert (result - expected).abs().max() < 1e-4
        fast = on_cpu.gaussian_blur(np.ascontiguousarray(eight_bits.permute(1, 2, 0).numpy()), s)
        assert np.abs(fast - 255 * expected.permute(1, 2, 0).numpy()).mean() < 1


def test_grey_and_solarize_are_torchvisions(images: Tensor) -> None:
    sigma = torch.tensor(SIGMAS)
    assert (ours.grey(images) - reference.rgb_to_grayscale(images)).abs().max() < 1e-5
    assert torch.equal(ours.solarize(images, sigma), reference.solarize(images, 0.5))


def test_a_view_is_the_operations_in_its_own_order(images: Tensor) -> None:
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    colours = torch.zeros(6, NUM_COLOURS)
    colours[:, [BRIGHTNESS, CONTRAST, SATURATION]] = torch.tensor([1.3, 0.6, 1.5])
    colours[:, HUE] = 0.1
    colours[:, ORDER] = torch.tensor([0, 5, 11, 17, 23, -1])
    colours[3, GREY] = 1
    colours[4, BLUR] = 1.0
    colours[5, SOLARIZE] = 1
    found = ours.augment(pixels, colours)
    steps = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)
    for i in range(6):
        expected = pixels[i].permute(2, 0, 1).float() / 255
        order = ORDERS[int(colours[i, ORDER])] if colours[i, ORDER] >= 0 else []
        for number in order:
            expected = steps[number](expected, float(colours[i, number]))
        if i == 3:
            expected = reference.rgb_to_grayscale(expected, num_output_channels=3)
        if i == 4:
            expected = reference.gaussian_blur(expected, kernel_size=[5, 5], sigma=[1.0, 1.0])
        if i == 5:
            expected = reference.solarize(expected, 0.5)
        assert (found[i] - expected).abs().mean() < LIMIT


def test_a_view_does_not_depend_on_its_neighbours(images: Tensor) -> None:
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    rng = np.random.default_rng(0)
    colours = torch.from_numpy(rng.uniform(0.5, 1.5, (6, NUM_COLOURS)).astype(np.float32))
    colours[:, ORDER] = torch.tensor([3, -1, 7, 3, 20, 1])
    together = ours.augment(pixels, colours)
    for i in range(6):
        torch.testing.assert_close(together[i], ours.augment(pixels[i : i + 1], colours[i : i + 1])[0])


@pytest.mark.parametrize(
    ("operation", "theirs", "values"),
    [
        (on_cpu.adjust_brightness, reference.adjust_brightness, [0.2, 0.7, 1.0, 1.3, 1.8, 0.0]),
        (on_cpu.adjust_contrast, reference.adjust_contrast, [0.2, 0.7, 1.0, 1.3, 1.8, 0.0]),
        (on_cpu.adjust_saturation, reference.adjust_saturation, [0.2, 0.7, 1.0, 1.3, 1.8, 0.0]),
        (on_cpu.adjust_hue, reference.adjust_hue, [-0.5, -0.2, 0.0, 0.1, 0.2, 0.5]),
    ],
)
def test_each_operation_on_the_cpu_is_torchvisions(
    images: Tensor, operation: Callable[..., np.ndarray], theirs: Callable[..., Tensor], values: list[float]
) -> None:
    pixels = (images * 255).round().to(torch.uint8)
    for one, value in zip(pixels, values, strict=True):
        found = operation(np.ascontiguousarray(one.permute(1, 2, 0).numpy()), value)
        expected = theirs(one.float() / 255, value).permute(1, 2, 0) * 255
        assert np.abs(found - expected.numpy()).mean() < 1  # of 255: rounding to 8 bits, hue in 256 steps


@pytest.mark.parametrize(
    ("column", "theirs"),
    [
        (GREY, lambda image: reference.rgb_to_grayscale(image, num_output_channels=3)),
        (SOLARIZE, lambda image: reference.solarize(image, 128)),
    ],
    ids=["grey", "solarize"],
)
def test_grey_and_solarize_on_the_cpu_are_torchvisions(column: int, theirs: Callable[[Tensor], Tensor]) -> None:
    """Of all 256 levels of every channel."""
    levels = torch.arange(256, dtype=torch.uint8)
    image = torch.stack([levels.roll(turn) for turn in (0, 85, 170)]).reshape(3, 16, 16)
    colours = np.zeros(NUM_COLOURS, dtype=np.float32)
    colours[ORDER] = -1
    before = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    assert np.array_equal(on_cpu.recolour(before, colours), before)
    colours[column] = 1
    expected = theirs(image).permute(1, 2, 0).numpy()
    difference = np.abs(on_cpu.recolour(before, colours).astype(int) - expected)
    assert difference.max() <= (column == GREY)  # one level of rounding; inverting is exact


def test_both_doors_give_the_same_views(images: Tensor) -> None:
    """The uint8 path of the CPU and the float path of devices, whole recipe and normalisation."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    rng = np.random.default_rng(1)
    colours = torch.zeros(6, NUM_COLOURS)
    colours[:, [BRIGHTNESS, CONTRAST, SATURATION]] = torch.from_numpy(rng.uniform(0.4, 1.6, (6, 3)).astype(np.float32))
    colours[:, HUE] = torch.tensor([0.2, -0.2, 0.1, -0.1, 0.05, 0.0])
    colours[:, ORDER] = torch.tensor([0, 7, 13, 22, 4, -1])
    colours[4, BLUR], colours[2, GREY], colours[5, SOLARIZE] = 1.3, 1, 1
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    fast = ours.recolour(pixels, colours, mean=mean, std=std)
    slow = ours.normalize(ours.augment(pixels, colours), mean=mean, std=std)
    difference = (fast - slow).abs() * torch.tensor(std).view(1, 3, 1, 1)
    assert fast.shape == slow.shape and (difference.mean((1, 2, 3)) < LIMIT).all()


def test_normalize_by_value() -> None:
    images = torch.full((1, 3, 2, 2), 0.5)
    out = ours.normalize(images, mean=(0.5, 0.25, 0.0), std=(1.0, 0.5, 0.25))
    assert out[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.5, 2.0])
