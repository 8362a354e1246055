"""Ranks of values among pixels, by table and by sorting: both are what comparing every pixel gives."""

import numpy as np
import pytest

from attention import counting
from attention.counting import Counter

NUM_PIXELS = 20_000


def compared(pixels: np.ndarray, values: np.ndarray) -> tuple[list[int], list[int]]:
    return [int((pixels < v).sum()) for v in values], [int((pixels <= v).sum()) for v in values]


def check(pixels: np.ndarray, values: np.ndarray) -> None:
    below, up_to = Counter(len(pixels), pixels.dtype).ranks(pixels, np.sort(values))
    assert (below.tolist(), up_to.tolist()) == compared(pixels, np.sort(values))


def by_table(pixels: np.ndarray, values: np.ndarray) -> bool:
    return Counter(len(pixels), pixels.dtype)._by_table(pixels, np.unique(values)) is not None


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("spread", [0.01, 8.0])
def test_a_table_counts_exactly(rng, dtype, scale, spread):
    pixels = (scale * np.exp(rng.normal(0, spread, NUM_PIXELS))).astype(dtype)
    values = rng.choice(pixels, 150)
    # With infinities as padding and with repetitions, as fixations come.
    check(pixels, np.concatenate([values, values[:20], [np.inf] * 3]).astype(dtype))
    assert by_table(pixels, values)


def test_neighbouring_floats_are_told_apart(rng):
    pixels = (np.float32(0.1).view(np.int32) + rng.integers(0, 50, NUM_PIXELS, dtype=np.int32)).view(np.float32)
    values = np.unique(pixels)[5:8]
    check(np.concatenate([pixels, [np.float32(1e-9)], [np.float32(1e6)]]).astype(np.float32), values)


@pytest.mark.parametrize("background", [0.0, 1e-9])
def test_a_background_of_one_value_is_counted_by_table(rng, background):
    pixels = rng.random(NUM_PIXELS).astype(np.float32) + np.float32(0.1)
    pixels[rng.random(NUM_PIXELS) < 0.6] = background
    values = np.concatenate([[np.float32(background)], pixels[pixels > background][:50]])
    check(pixels, values)
    assert by_table(pixels, values)


@pytest.mark.parametrize("kind", ["negative", "minus zero", "few levels", "many values", "few pixels", "outside"])
def test_where_a_table_does_not_serve_pixels_are_sorted(rng, kind):
    pixels = rng.random(NUM_PIXELS).astype(np.float32)
    values = pixels[:60].copy()
    if kind == "negative":
        pixels -= 0.5
        values = pixels[:60]
    elif kind == "minus zero":
        pixels[:100], pixels[100:200], values[0] = -0.0, 0.0, 0.0
    elif kind == "few levels":
        pixels = np.round(pixels * 5)
        values = np.unique(pixels)
    elif kind == "many values":
        values = pixels[: counting.MOST_VALUES + 20]
    elif kind == "few pixels":
        pixels = pixels[:100]
    else:
        values = np.array([-1.0, 0.5, 2.0], dtype=np.float32)
    check(pixels, values)
    if kind not in ("many values", "few pixels"):
        assert not by_table(pixels, values)


def test_constant_broken_and_no_values(rng):
    check(np.full(NUM_PIXELS, 3, np.float32), np.float32([3, 3]))
    pixels = rng.random(NUM_PIXELS).astype(np.float32)
    check(pixels, np.float32([np.inf, np.inf]))
    for bad in (np.nan, np.inf, -np.inf):
        pixels[7] = bad
        assert not by_table(pixels, pixels[20:30])


def test_a_counter_serves_map_after_map(rng):
    counter = Counter(NUM_PIXELS, np.float32)
    for sign in (1, -1, 1, 1):
        pixels = sign * rng.random(NUM_PIXELS).astype(np.float32)
        below, up_to = counter.ranks(pixels, np.sort(pixels[:30]))
        assert (below.tolist(), up_to.tolist()) == compared(pixels, np.sort(pixels[:30]))
