"""From gaze shards to batches: images with the human maps of what is left of them after augmentation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attention.maps import inside_image
from engine.loading import TensorBatch, make_loader
from shards.decode import decode_rgb, decoded_scale, image_size
from shards.gaze import GazeTarget, parse_target
from shards.order import StepBatches
from shards.reader import BadSample
from teacher.config import AugmentConfig
from teacher.sources import GazeSets

Position = tuple[int, int, int]  # epoch, shard, row
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


@dataclass
class GazeBatch(TensorBatch):
    """One rank's samples of one step.

    Attributes:
        images: uint8 `(batch, height, width, 3)`.
        maps: human maps, float32 `(batch, rows, columns)`, sum 1.
        counts: fixations per cell, float32 `(batch, rows, columns)`.
        valid: bool `(batch,)`; false where there is no image or no fixation in it.
        bad: file, key and reason of each sample that could not be read.
    """

    images: Tensor
    maps: Tensor
    counts: Tensor
    valid: Tensor
    bad: list[str]


@dataclass(frozen=True)
class Change:
    """What augmentation does to one image: crop to `box`, mirror, then scale pixel values.

    `contrast` is about the image's mean, `brightness` multiplies; 1 leaves them alone.
    """

    box: Box
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0


def change_generator(seed: int, *, epoch: int, sample: int) -> np.random.Generator:
    """Counter-based generator of one sample's change: its key names the sample, so no state is carried along."""
    return np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, (epoch << 44) | sample]))


def draw_change(rng: np.random.Generator, config: AugmentConfig, *, size: tuple[int, int]) -> Change:
    """Draw the change of an image of `size` (height, width) pixels: the crop keeps the image's shape."""
    area, top, left, flip, brightness, contrast = rng.random(6).tolist()
    side = float(np.sqrt(config.min_area + (1 - config.min_area) * area))
    height, width = max(1, round(side * size[0])), max(1, round(side * size[1]))
    box = int(top * (size[0] - height + 1)), int(left * (size[1] - width + 1)), height, width
    factors = (1 + config.jitter * (2 * draw - 1) for draw in (brightness, contrast))
    return Change(box, flip < config.flip, *factors)


def move_target(target: GazeTarget, change: Change) -> GazeTarget:
    """The gaze of what the change leaves of the image: pixels are counted in the crop, fixations outside it dropped."""
    top, left, height, width = change.box
    points = target.points - np.array([left, top], dtype=np.float64)
    kept = inside_image(points, (height, width))
    points = points[kept]
    if change.flip:
        # the pixel that a fixation lies in is mirrored, so the fraction of a pixel is given up
        points = np.column_stack([width - 1 - np.floor(points[:, 0]), points[:, 1]])
    return replace(target, size=(height, width), points=points, observers=target.observers[kept])


def change_image(image: np.ndarray, change: Change, *, stored: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Crop, mirror, resize and recolour.

    Args:
        image: uint8 `(rows, columns, 3)`, as `decode_rgb` gives it, at whatever scale.
        stored: height and width that `change.box` counts pixels of.
        size: height and width of the result.
    """
    rows, columns = image.shape[:2]
    top, left, height, width = change.box
    scale = decoded_scale(stored, image.shape)
    first, last = round(top * scale), round((top + height) * scale)
    start, stop = round(left * scale), round((left + width) * scale)
    crop = image[min(first, rows - 1) : max(last, first + 1), min(start, columns - 1) : max(stop, start + 1)]
    shrinking = crop.shape[0] >= size[0] and crop.shape[1] >= size[1]
    resized = cv2.resize(crop, size[::-1], interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    resized = resized[:, ::-1] if change.flip else resized
    if change.brightness == 1.0 and change.contrast == 1.0:
        return resized
    pixels = resized.astype(np.float32) * change.brightness
    mean = pixels.mean()
    return np.clip((pixels - mean) * change.contrast + mean, 0, 255).astype(np.uint8)


def load_image(data: bytes, change: Change | None, *, stored: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Decode no larger than needed and apply the change: uint8 `(*size, 3)`, RGB.

    Raises:
        ValueError: the bytes are no readable image.
    """
    change = change or Change((0, 0, *stored))
    need = [min(n, -(-want * n // part)) for n, want, part in zip(stored, size, change.box[2:], strict=True)]
    return change_image(decode_rgb(data, min_size=(need[0], need[1])), change, stored=stored, size=size)


class GazeDataset(Dataset[GazeBatch]):
    """Reads samples by position, a whole batch per call; unreadable ones are marked, not replaced.

    Args:
        size: height and width of the images given out.
        grid: rows and columns of the maps given out.
        augment: None leaves the images whole and as they are.
    """

    def __init__(
        self,
        sources: GazeSets,
        *,
        size: tuple[int, int],
        grid: tuple[int, int],
        augment: AugmentConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.sources, self.size, self.grid = sources, size, grid
        self.augment, self.seed = augment, seed

    def __getitem__(self, position: Position) -> GazeBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[Position]) -> GazeBatch:
        """Read one batch."""
        count = len(positions)
        images = np.zeros((count, *self.size, 3), dtype=np.uint8)
        maps = np.full((count, *self.grid), 1 / (self.grid[0] * self.grid[1]), dtype=np.float32)
        counts = np.zeros((count, *self.grid), dtype=np.float32)
        valid, bad = np.zeros(count, dtype=bool), []
        for i, position in enumerate(positions):
            try:
                images[i], target = self._read(position)
            except BadSample as error:
                bad.append(f"{self.sources.locate(position[1])[0].shards.root}/{error}")
                continue
            valid[i] = target.num_inside > 0
            maps[i], counts[i] = target.density(self.grid), count_fixations(target, self.grid)
        tensors = [torch.from_numpy(array) for array in (images, maps, counts, valid)]
        return GazeBatch(tensors[0], tensors[1], tensors[2], tensors[3], bad)

    def key_of(self, position: Position) -> str:
        """Key of the sample at a position, with its set's folder where there are several.

        Raises:
            BadSample: the shard's index is unreadable.
        """
        source, shard, _ = self.sources.locate(position[1])
        key = source.shards.key(shard, position[2])
        return key if len(self.sources.sets) == 1 else f"{source.shards.root}/{key}"

    def _read(self, position: Position) -> tuple[np.ndarray, GazeTarget]:
        epoch, number, row = position
        source, shard, first = self.sources.locate(number)
        sample = source.shards.read(shard, row)
        try:
            target = parse_target(sample.info(), key=sample.key, sigma=source.sigma, shard=shard, row=row)
            found = image_size(sample.image)
            if found != target.size:
                raise ValueError(f"its gaze is of a {target.size} image, but the image is {found} (height, width)")
            change = None
            if self.augment is not None:
                rng = change_generator(self.seed, epoch=epoch, sample=first + row)
                change = draw_change(rng, self.augment, size=target.size)
            image = load_image(sample.image, change, stored=target.size, size=self.size)
        except BadSample:
            raise
        except ValueError as error:
            raise BadSample(sample.key, source.shards.manifest.files[shard], str(error)) from error
        return image, target if change is None else move_target(target, change)


def count_fixations(target: GazeTarget, grid: tuple[int, int]) -> np.ndarray:
    """Fixations in each cell of `grid`, float32."""
    points = target.points[inside_image(target.points, target.size)]
    scale = np.array([grid[1] / target.size[1], grid[0] / target.size[0]])
    columns, rows = ((np.floor(points) + 0.5) * scale).astype(np.int64).T
    counts = np.zeros(grid, dtype=np.float32)
    np.add.at(counts, (rows, columns), 1)
    return counts


def training_batches(
    dataset: GazeDataset,
    *,
    batch_size: int,
    window: int,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
    num_workers: int,
) -> Iterator[GazeBatch]:
    """This rank's batches of steps `start_step` to `stop_step`; `batch_size` is over all ranks."""
    steps = StepBatches(
        dataset.sources.order(seed=dataset.seed, window=window),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        stop_step=stop_step,
    )
    return iter(make_loader(dataset, steps, num_workers=num_workers))
