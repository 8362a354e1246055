"""The colour operations for a batch that is on the CPU: OpenCV's uint8 kernels, view by view.

The same operations as `pretrain.augment` up to rounding to 8 bits between them, about eight times faster than float
tensors, whose every operation goes through memory.
"""

import math

import cv2
import numpy as np

from pretrain.reuse import ArrayPool
from pretrain.views import BLUR, BRIGHTNESS, CONTRAST, GREY, HUE, ORDER, ORDERS, SATURATION, SOLARIZE

LEVELS = np.arange(256, dtype=np.float32)
SOLARIZED = np.where(np.arange(256) >= 128, 255 - np.arange(256), np.arange(256)).astype(np.uint8)
POOL = ArrayPool()  # of results: a batch of floats is large, and fresh memory for it would cost as much as some colours
GREY_ROW = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def recolour_views(
    images: np.ndarray, colours: np.ndarray, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
    """Recolour and normalise views.

    Args:
        images: uint8 `(batch, height, width, 3)`.
        colours: float32 `(batch, NUM_COLOURS)`, columns as in `pretrain.views`.

    Returns:
        float32 `(batch, height, width, 3)`, normalised with `mean` and `std`.
    """
    offsets, scales = np.asarray(mean, dtype=np.float32), np.asarray(std, dtype=np.float32)
    normalized = ((LEVELS[:, None] / 255 - offsets) / scales)[None]
    out = POOL.take(images.shape, np.float32)
    for image, parameters, result in zip(images, colours, out, strict=True):
        cv2.LUT(recolour(image, parameters), normalized, dst=result)
    return out


def recolour(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """One view, uint8 `(height, width, 3)`, with its jitter in its order, grey, blur and solarisation."""
    order = int(colours[ORDER])
    for operation in ORDERS[order] if order >= 0 else ():
        image = OPERATIONS[operation](image, float(colours[operation]))
    if colours[GREY] > 0:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if colours[BLUR] > 0:
        image = gaussian_blur(image, float(colours[BLUR]))
    return cv2.LUT(image, SOLARIZED) if colours[SOLARIZE] > 0 else image


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply by `factor`."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean luma."""
    mean = float(GREY_ROW @ np.asarray(cv2.mean(image)[:3], dtype=np.float32))
    if factor <= 1:  # no value falls below 0, and the absolute value that comes with scaling is the value
        return cv2.convertScaleAbs(image, alpha=factor, beta=(1 - factor) * mean)
    return cv2.LUT(image, _to_uint8(factor * LEVELS + (1 - factor) * mean))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey view."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, 0)


def adjust_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Turn the hue by `turns` in [-0.5, 0.5]."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turns * 256) % 256)  # wraps around, as hue does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of `sigma` pixels, kernel a tenth of the view; all its weight beyond three sigma is below one level."""
    kernel = min(max(image.shape[0] // 10, 1) | 1, 2 * math.ceil(3 * sigma) + 1)
    return cv2.GaussianBlur(image, (kernel, kernel), sigma, borderType=cv2.BORDER_REFLECT_101)


OPERATIONS = {
    BRIGHTNESS: adjust_brightness,
    CONTRAST: adjust_contrast,
    SATURATION: adjust_saturation,
    HUE: adjust_hue,
}


def _to_uint8(levels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)
