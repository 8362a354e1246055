"""Maps: normalising, warping with a view of the image, 8-bit storage, densities of fixations."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torchvision.transforms.v2 import functional as vision

from attention.losses import kld
from attention.maps import (
    center_bias,
    crop_mass,
    decode_map,
    decode_map_np,
    encode_map,
    encode_map_np,
    fixation_density,
    inside_image,
    is_constant,
    log_density,
    to_density,
    warp,
    zscore,
)

HEIGHT, WIDTH = 24, 32
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
NO_FLIP = torch.tensor([False])


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, int, int, int], bool, tuple[int, int]]:
    """A crop box on pixel borders (top, left, height, width), a flip, and an output size."""
    height, width = draw(st.integers(4, HEIGHT)), draw(st.integers(4, WIDTH))
    top, left = draw(st.integers(0, HEIGHT - height)), draw(st.integers(0, WIDTH - width))
    size = (draw(st.integers(3, 40)), draw(st.integers(3, 40)))
    return (top, left, height, width), draw(st.booleans()), size


def as_fractions(box: tuple[int, int, int, int]) -> torch.Tensor:
    top, left, height, width = box
    return torch.tensor([[top / HEIGHT, left / WIDTH, height / HEIGHT, width / WIDTH]], dtype=torch.float64)


def centroid(image: np.ndarray) -> np.ndarray:
    rows, columns = np.indices(image.shape)
    return np.array([(rows * image).sum(), (columns * image).sum()]) / image.sum()


@settings(deadline=None, max_examples=60)
@given(view=views(), data=st.data())
def test_warp_moves_a_delta_where_torchvision_moves_the_image(view, data):
    box, flip, size = view
    row, column = data.draw(st.integers(0, HEIGHT - 1)), data.draw(st.integers(0, WIDTH - 1))
    image = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.float64)
    image[0, row, column] = 1
    top, left, height, width = box
    expected = vision.resized_crop(image, top, left, height, width, list(size), antialias=True)
    expected = vision.horizontal_flip(expected) if flip else expected
    moved = warp(image, as_fractions(box), torch.tensor([flip]), size)
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=60)
@given(view=views(), data=st.data())
def test_warp_moves_a_spot_where_opencv_moves_the_image(view, data):
    box, flip, size = view
    top, left, height, width = box
    # One pixel clear of the border of the crop, where every resizer clamps in its own way.
    row, column = data.draw(st.integers(top + 1, top + height - 2)), data.draw(st.integers(left + 1, left + width - 2))
    image = np.zeros((HEIGHT, WIDTH))
    image[row, column] = 1
    crop = image[top : top + height, left : left + width]
    # One axis at a time: OpenCV's INTER_AREA only averages where both axes shrink.
    vertical, horizontal = (
        cv2.INTER_LINEAR if new > old else cv2.INTER_AREA for new, old in zip(size, (height, width), strict=True)
    )
    expected = cv2.resize(crop, (width, size[0]), interpolation=vertical)
    expected = cv2.resize(expected, (size[1], size[0]), interpolation=horizontal)
    expected = cv2.flip(expected, 1) if flip else expected
    moved = warp(torch.from_numpy(image)[None], as_fractions(box), torch.tensor([flip]), size)[0].numpy()
    scale = max(size[0] / height, size[1] / width, 1)
    assert np.abs(centroid(moved) - centroid(expected)).max() < 0.5 * scale


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*[st.floats(0, 0.5)] * 2, *[st.floats(0.3, 0.5)] * 2),
    st.booleans(),
    st.floats(0.2, 0.8),
    st.floats(0.2, 0.8),
)
def test_warp_of_a_coarse_map_follows_a_box_between_cells(box, flip, share_y, share_x):
    top, left, height, width = box
    x, y = left + share_x * width, top + share_y * height
    density = fixation_density(np.array([[x * 800, y * 600]]), size=(600, 800), sigma=20, grid=(56, 56))
    moved = warp(torch.from_numpy(density)[None], torch.tensor([box]), torch.tensor([flip]), (28, 28))[0].numpy()
    expected = np.array([share_y, 1 - share_x if flip else share_x]) * 28 - 0.5
    assert np.abs(centroid(moved) - expected).max() < 1.0


def test_warp_of_the_whole_map_is_the_map_and_keeps_constants():
    maps = torch.rand(1, HEIGHT, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(warp(maps, WHOLE, NO_FLIP, (HEIGHT, WIDTH)), maps, atol=1e-12, rtol=0)
    flipped = warp(maps, WHOLE, torch.tensor([True]), (HEIGHT, WIDTH))
    torch.testing.assert_close(flipped, maps.flip(-1), atol=1e-12, rtol=0)
    box = torch.tensor([[0.13, 0.21, 0.37, 0.59]])
    torch.testing.assert_close(warp(torch.full((1, 7, 9), 3.0), box, NO_FLIP, (5, 4)), torch.full((1, 5, 4), 3.0))


def test_warp_keeps_what_is_outside_the_box_out():
    maps = torch.ones(1, 8, 8)
    maps[:, :, 4:] = 100
    left_half = torch.tensor([[0.0, 0.0, 1.0, 0.5]])
    torch.testing.assert_close(warp(maps, left_half, NO_FLIP, (3, 3)), torch.ones(1, 3, 3))


def test_warp_treats_each_sample_by_its_own_box():
    maps = torch.rand(3, 10, 12)
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.7, 0.4]])
    flips = torch.tensor([True, False, True])
    together = warp(maps, boxes, flips, (6, 5))
    alone = torch.cat([warp(maps[i : i + 1], boxes[i : i + 1], flips[i : i + 1], (6, 5)) for i in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("shape", [(8, 8), (2, 1, 8, 8)])
def test_warp_and_crop_mass_refuse_other_shapes(shape):
    with pytest.raises(ValueError, match="batch, height, width"):
        warp(torch.rand(*shape), WHOLE, NO_FLIP, (4, 4))
    with pytest.raises(ValueError, match="boxes"):
        crop_mass(torch.rand(2, 8, 8), WHOLE)


@settings(deadline=None, max_examples=40)
@given(view=views())
def test_crop_mass_is_the_sum_inside(view):
    (top, left, height, width), _, _ = view
    maps = torch.rand(1, HEIGHT, WIDTH, dtype=torch.float64)
    expected = maps[:, top : top + height, left : left + width].sum() / maps.sum()
    torch.testing.assert_close(crop_mass(maps, as_fractions((top, left, height, width)))[0], expected)


def test_crop_mass_shares_a_cut_cell_and_reads_an_empty_map_as_uniform():
    maps = torch.zeros(2, 4, 4)
    maps[0, 1, 1] = 5
    boxes = torch.tensor([[0.25, 0.25, 0.25, 0.125], [0.0, 0.0, 0.5, 0.5]])
    torch.testing.assert_close(crop_mass(maps, boxes), torch.tensor([0.5, 0.25]))


def test_to_density_sums_to_one_and_shifts_negatives():
    maps = torch.tensor([[[1.0, 3.0]], [[-1.0, 1.0]]])
    torch.testing.assert_close(to_density(maps), torch.tensor([[[0.25, 0.75]], [[0.0, 1.0]]]))
    torch.testing.assert_close(to_density(torch.tensor([[[0.0, 2.0]]]), eps=1.0), torch.tensor([[[0.25, 0.75]]]))


@pytest.mark.parametrize("value", [0.0, 7.0, torch.nan, torch.inf, -3.0])
def test_to_density_of_a_map_that_says_nothing_is_uniform(value):
    maps = torch.rand(2, 3, 4)
    maps[1] = value
    density = to_density(maps)
    torch.testing.assert_close(density[1], torch.full((3, 4), 1 / 12))
    torch.testing.assert_close(density[0], maps[0] / maps[0].sum())


def test_one_broken_pixel_makes_its_map_uniform():
    maps = torch.rand(1, 3, 4)
    maps[0, 1, 2] = torch.nan
    torch.testing.assert_close(to_density(maps), torch.full((1, 3, 4), 1 / 12))


def test_types_are_kept_or_widened():
    assert to_density(torch.ones(1, 2, 2, dtype=torch.float64)).dtype == torch.float64
    assert to_density(torch.ones(1, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert to_density(torch.ones(1, 2, 2, dtype=torch.uint8)).dtype == torch.float32
    assert log_density(torch.zeros(1, 2, 2, dtype=torch.float16)).dtype == torch.float32


def test_zscore_equals_numpy_for_both_ddof():
    maps = torch.rand(3, 5, 6, dtype=torch.float64)
    for ddof in (0, 1):
        expected = np.stack([(m - m.mean()) / m.std(ddof=ddof) for m in maps.numpy()])
        torch.testing.assert_close(zscore(maps, ddof=ddof), torch.from_numpy(expected))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 9)])
def test_zscore_of_a_constant_map_is_zero_and_has_a_gradient(shape):
    maps = torch.full(shape, 0.1, requires_grad=True)
    zscore(maps, ddof=1).sum().backward()
    assert torch.equal(zscore(maps), torch.zeros(shape))
    assert maps.grad is not None and torch.isfinite(maps.grad).all()


def test_is_constant():
    maps = torch.full((3, 2, 2), 0.1)
    maps[1, 1, 1], maps[2] = 0.2, torch.nan
    assert is_constant(maps).tolist() == [True, False, False]


def test_log_density_is_a_log_of_a_density():
    logits = 40 * torch.randn(2, 5, 7)
    torch.testing.assert_close(log_density(logits).exp().sum(dim=(1, 2)), torch.ones(2))


@pytest.mark.parametrize("sigma", [2.0, 5.0, 12.0])
def test_eight_bits_lose_less_than_a_thousandth_of_a_nat(sigma):
    rng = np.random.default_rng(0)
    maps = np.stack([gaussian_filter(rng.random((56, 56)) ** 20, sigma) for _ in range(8)])
    density = to_density(torch.from_numpy(maps))
    codes = encode_map(density)
    assert codes.dtype == torch.uint8 and (codes.amax(dim=(1, 2)) == 255).all()
    assert kld(decode_map(codes).log(), density).max() < 1e-3
    assert np.array_equal(encode_map_np(maps), codes.numpy())
    np.testing.assert_allclose(decode_map_np(codes.numpy()), decode_map(codes).numpy(), rtol=1e-5)


def test_codes_of_fixation_densities_lose_less_than_a_thousandth_of_a_nat():
    points = np.random.default_rng(1).uniform([100, 100], [700, 500], size=(60, 2))
    density = torch.from_numpy(fixation_density(points, size=(600, 800), sigma=24, grid=(56, 56)))
    decoded = to_density(decode_map(encode_map(density)) + 1e-12)
    assert kld(decoded.log(), density) < 1e-3


def test_codes_of_a_map_that_says_nothing_are_uniform():
    assert torch.equal(encode_map(torch.zeros(1, 3, 3)), torch.full((1, 3, 3), 255, dtype=torch.uint8))
    zeros = torch.zeros(1, 3, 3, dtype=torch.uint8)
    torch.testing.assert_close(decode_map(zeros), torch.full((1, 3, 3), 1 / 9))
    np.testing.assert_allclose(decode_map_np(zeros.numpy()), np.full((1, 3, 3), 1 / 9), rtol=1e-6)


def test_fixation_density_equals_scipy_at_pixel_resolution():
    points = np.array([[3, 4], [30.7, 20.2], [0, 0], [39, 29]], dtype=float)
    counts = np.zeros((30, 40))
    np.add.at(counts, (points[:, 1].astype(int), points[:, 0].astype(int)), 1)
    expected = gaussian_filter(counts, 4.0, truncate=8)
    density = fixation_density(points, size=(30, 40), sigma=4.0, grid=(30, 40))
    assert density.dtype == np.float32
    # Ours integrates the Gaussian over a pixel where scipy samples it: a variance of 1/12 px^2 apart.
    np.testing.assert_allclose(density, expected / expected.sum(), atol=0.01 * density.max())
    np.testing.assert_allclose(density.sum(), 1, rtol=1e-6)


def test_fixation_density_puts_a_narrow_spot_in_its_cell():
    density = fixation_density(np.array([[650.0, 90.0]]), size=(600, 800), sigma=1, grid=(6, 8))
    assert np.unravel_index(density.argmax(), density.shape) == (0, 6)
    assert density.max() > 0.99


def test_points_outside_the_image_are_ignored():
    points = np.array([[-0.1, 5], [40, 5], [5, 30], [np.nan, 5], [5, 5], [39.9, 29.9]])
    assert inside_image(points, (30, 40)).tolist() == [False, False, False, False, True, True]
    options = {"size": (30, 40), "sigma": 3.0, "grid": (15, 20)}
    np.testing.assert_array_equal(fixation_density(points, **options), fixation_density(points[4:], **options))
    np.testing.assert_allclose(fixation_density(points[:4], **options), np.full((15, 20), 1 / 300), rtol=1e-6)
    np.testing.assert_allclose(fixation_density(np.zeros((0, 2)), **options), np.full((15, 20), 1 / 300), rtol=1e-6)


def test_fixation_density_refuses_a_sigma_of_zero():
    with pytest.raises(ValueError, match="sigma"):
        fixation_density(np.zeros((1, 2)), size=(4, 4), sigma=0, grid=(4, 4))


def test_center_bias_peaks_in_the_middle():
    prior = center_bias((9, 11))
    assert prior.argmax() == 4 * 11 + 5
    torch.testing.assert_close(prior, prior.flip(0, 1))
    torch.testing.assert_close(prior.sum(), torch.tensor(1.0))
