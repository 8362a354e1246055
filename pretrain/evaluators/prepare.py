"""From an image to the encoder's input pixels: centre crop, random crop with flip, whole image, corrupted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from pretrain.config import ViewsConfig
from pretrain.evaluators.corruptions import corrupt, image_seed
from pretrain.views import draw_views


class Prepare(Protocol):
    """Makes the input of one image; sent to loader processes, so it must pickle.

    `key`: all that decides its pixels, for caches.
    """

    @property
    def key(self) -> str: ...

    def __call__(self, image: np.ndarray, number: int) -> np.ndarray:
        """Uint8 `(height, width, 3)` and the image's number to uint8 `(size, size, 3)`."""
        ...


@dataclass(frozen=True)
class CentreCrop:
    """The centre square of `crop` of the shorter side; with `crop` 0 the whole image, squeezed to a square."""

    size: int
    crop: float

    @property
    def key(self) -> str:
        """See `Prepare`."""
        return f"centre-{self.size}-{self.crop:g}"

    def __call__(self, image: np.ndarray, number: int) -> np.ndarray:
        return fit_square(image, size=self.size, crop=self.crop)


@dataclass(frozen=True)
class ReleasedCrop:
    """The centre `size` pixels without resizing, as ImageNet-C's JPEGs are read; smaller images are resized."""

    size: int

    @property
    def key(self) -> str:
        """See `Prepare`."""
        return f"released-{self.size}"

    def __call__(self, image: np.ndarray, number: int) -> np.ndarray:
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            return fit_square(image, size=self.size, crop=1.0)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return image[top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class RandomView:
    """SimCLR's crop for probes: area 0.08 to 1, ratio 3/4 to 4/3, bicubic, flip; a function of seed, image, epoch."""

    size: int
    seed: int
    epoch: int

    @property
    def key(self) -> str:
        """See `Prepare`."""
        return f"view-{self.size}-{self.seed}-{self.epoch}"

    def __call__(self, image: np.ndarray, number: int) -> np.ndarray:
        return next(self.each([image], [number]))

    def each(self, images: Sequence[np.ndarray], numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """As calling it on one image after another; drawing all at once takes a tenth of the time."""
        drawn = draw_views(
            ViewsConfig(),
            seed=self.seed,
            epochs=[self.epoch] * len(images),
            samples=numbers,
            sizes=[image.shape[:2] for image in images],
            num_views=1,
        )
        for image, (top, left, height, width), flip in zip(
            images, drawn.crops[0].tolist(), drawn.flips[0], strict=True
        ):
            pixels = fit_square(image[top : top + height, left : left + width], size=self.size, crop=0.0)
            yield cv2.flip(pixels, 1) if flip else pixels


@dataclass(frozen=True)
class Corrupted:
    """Another preparation's pixels, corrupted; a function of seed, image, corruption and severity."""

    clean: Prepare
    corruption: str
    severity: int
    seed: int

    @property
    def key(self) -> str:
        """See `Prepare`."""
        return f"{self.clean.key}-{self.corruption}-{self.severity}-{self.seed}"

    def __call__(self, image: np.ndarray, number: int) -> np.ndarray:
        seed = image_seed(self.seed, number=number, corruption=self.corruption, severity=self.severity)
        return corrupt(self.clean(image, number), self.corruption, severity=self.severity, seed=seed)


def fit_square(image: np.ndarray, *, size: int, crop: float) -> np.ndarray:
    """Resize uint8 `(height, width, 3)` to a square; with `crop` > 0, the centre of that share of the shorter side."""
    height, width = image.shape[:2]
    if crop > 0:
        side = max(1, round(crop * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    shrinking = min(image.shape[:2]) > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
