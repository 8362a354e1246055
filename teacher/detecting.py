"""The work of `teacher/detect.py`: objects from a detector, or from a file of results, into label shards."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.errors import InputError
from engine.files import sha256_of
from engine.loading import make_loader
from engine.progress import ProgressBar, report
from shards.coco import CocoObjects, from_coco_results
from shards.decode import decode_rgb
from shards.labels import claim_directory, label_directory, labels_complete, write_label_shard
from shards.manifest import OBJECT_ENCODING
from shards.objects import OBJECTS, coco_masks
from shards.reader import BadSample, ShardSet
from teacher.detect_config import DetectConfig
from teacher.detector import Detector, find_weights, load_detector
from teacher.label_tasks import LabelWriter, ShardBatches, parse_controls, shards_of_task, write_set


def detect(config: DetectConfig) -> Path:
    """Write the objects of this task's shards, and seal the set when all are there.

    Returns:
        The folder of the label set.

    Raises:
        InputError: no detector or no results, results of other images, no images, a range outside the set, or a folder
            with other labels.
    """
    _check_options(config)
    images = ShardSet(config.shards, remote=config.remote)
    task = shards_of_task(config, images)
    teacher = load_detector(config) if config.results is None else load_results(config, images)
    directory = label_directory(config.output, teacher.hash)
    settings = _settings(config)
    claim_directory(directory, {"images": images.manifest.digest} | settings)
    write: Callable[[Sequence[int]], list[str]]
    if isinstance(teacher, Detector):
        write = partial(write_found, config, teacher, images, directory)
    else:
        write = partial(write_results, config, teacher, images, directory)
    write_set(
        config,
        images,
        directory,
        task=task,
        write=write,
        teacher=teacher.describe(),
        settings={"encoding": OBJECT_ENCODING} | settings,
    )
    return directory


def check(config: DetectConfig) -> list[str]:
    """Detector or results, images and this task's range, without writing anything."""
    _check_options(config)
    images = ShardSet(config.shards, remote=config.remote)
    task = shards_of_task(config, images)
    if config.results is None:
        path = find_weights(config)
        teacher, digest = f"detector: {config.model}, {path}", sha256_of(path)
    else:
        results = load_results(config, images)
        teacher, digest = f"results: {config.results}, {results.objects.num_objects} objects", results.hash
    directory = label_directory(config.output, digest)
    done = sum(labels_complete(directory, images, shard) for shard in task)
    return [
        f"{teacher}, hash {digest[:16]}",
        f"images: {config.shards}, {images.num_samples} in {images.manifest.num_shards} shards",
        f"task: {len(task)} shards, {done} of them labelled already, into {directory}",
    ]


def _check_options(config: DetectConfig) -> None:
    if set(parse_controls(config.controls)) - {"shuffled"}:
        raise InputError(f"controls: {config.controls}: objects have no mean: give shuffled, or leave it out")
    if config.results is not None and config.weights is not None:
        raise InputError("results and weights: the one is written, or the other finds objects: leave one out")
    if config.results is None and config.annotations is not None:
        raise InputError("annotations: names the images of --results, which are not given: give both, or neither")
    coco_masks()


def _settings(config: DetectConfig) -> dict[str, Any]:
    """Options that decide what is written."""
    if config.results is not None:
        named = {} if config.annotations is None else {"annotations": sha256_of(config.annotations)}
        return {"threshold": config.threshold} | named
    return {name: getattr(config, name) for name in ("threshold", "min_size", "max_size", "max_objects")}


@dataclass
class PictureBatch:
    """Images of one shard in their own sizes.

    Attributes:
        images: uint8 `(height, width, 3)` each; those that cannot be read are not among them.
        keys: their keys.
        shard: the shard's number.
        last: whether the shard ends here.
        failed: key and reason of each unreadable image.
    """

    images: list[Tensor]
    keys: list[str | None]
    shard: int
    last: bool
    failed: list[str]

    def pin_memory(self) -> "PictureBatch":
        """The batch in page-locked memory; the loader calls it where there is a GPU."""
        images = [image.pin_memory() for image in self.images]
        return PictureBatch(images, self.keys, self.shard, self.last, self.failed)


class PictureDataset(Dataset[PictureBatch]):
    """Reads and decodes a batch of one shard per call: a list of (shard, row)."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards

    def __getitem__(self, position: tuple[int, int]) -> PictureBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> PictureBatch:
        """Read one batch; unreadable images are named, not replaced."""
        shard, row = positions[-1]
        batch = PictureBatch([], [], shard, row + 1 == int(self.shards.shard_sizes[shard]), [])
        for shard, row in positions:
            try:
                sample = self.shards.read(shard, row)
            except BadSample as error:
                batch.failed.append(str(error))
                continue
            try:
                batch.images.append(torch.from_numpy(decode_rgb(sample.image).copy()))
                batch.keys.append(sample.key)
            except ValueError as error:
                batch.failed.append(f"{self.shards.manifest.files[shard]}: sample {sample.key[:80]!r}: {error}")
        return batch


def write_found(
    config: DetectConfig, detector: Detector, images: ShardSet, directory: Path, shards: Sequence[int]
) -> list[str]:
    """Write what the detector finds in these shards. Returns key and reason of every image left without a label."""
    batches = ShardBatches(shards, images, directory, batch_size=config.batch_size)
    loader = make_loader(PictureDataset(images), batches, num_workers=config.num_workers)
    writer = LabelWriter(images, directory, encode=_pairs, member=OBJECTS)
    return writer.write(shards, loader, lambda pictures: detector(pictures) if pictures else [])


def _pairs(keys: list[str | None], stored: list[bytes]) -> Iterator[tuple[str, bytes]]:
    for key, data in zip(keys, stored, strict=True):
        assert key is not None  # unreadable images never came this far
        yield key, data


@dataclass(frozen=True)
class Results:
    """A detector's results that fit a set of images.

    Attributes:
        hash: SHA-256 of their file.
        names: sample key -> file name in the results, for the samples that they have.
    """

    objects: CocoObjects
    hash: str
    names: dict[str, str]

    def describe(self) -> dict[str, Any]:
        """What the label manifest says about them."""
        return {"hash": self.hash, "results": Path(self.objects.where).name, "num_objects": self.objects.num_objects}


def load_results(config: DetectConfig, images: ShardSet) -> Results:
    """The file of results, its images found among the samples; what does not fit is counted and said.

    Raises:
        InputError: no COCO file, or none of its images is in the set.
    """
    assert config.results is not None
    objects = from_coco_results(config.results, config.annotations, threshold=config.threshold)
    try:
        keys = [key for shard in range(images.manifest.num_shards) for key in images.keys(shard)]
    except BadSample as error:
        raise InputError(f"{config.shards}: {error}: run python shards/verify.py {config.shards}") from error
    names = objects.names_of(keys)
    if not names:
        raise InputError(
            f"{config.results}: none of its {len(objects.sizes)} images is in {config.shards}: it names "
            f"{next(iter(objects.sizes), 'none')[:60]!r}, the set {keys[0][:60]!r}: give the results of these images"
        )
    report(
        f"{config.results}: {objects.num_objects} objects in {len(objects.sizes)} images, "
        f"{len(objects.sizes) - len(set(names.values()))} of them not in this set; left out: {objects.num_below} "
        f"objects below {config.threshold:g}, {objects.num_unknown} of images that it does not list"
    )
    return Results(objects, sha256_of(config.results), names)


def write_results(
    config: DetectConfig, results: Results, images: ShardSet, directory: Path, shards: Sequence[int]
) -> list[str]:
    """Write what the results say about these shards. Returns key and reason of every image left without a label.

    Raises:
        InputError: too many such images; the shard at hand is not written.
    """
    total = int(sum(images.shard_sizes[shard] for shard in shards))
    failed: list[str] = []
    with ProgressBar(total, "labelling") as bar:
        for shard in shards:
            stored = []
            for row in range(int(images.shard_sizes[shard])):
                try:
                    stored.append(_stored(results, images, shard, row))
                except ValueError as error:
                    failed.append(str(error))
            if len(failed) > config.max_bad_fraction * total:
                raise InputError(
                    f"{config.results}: {len(failed)} of {total} images cannot be labelled, the first: {failed[0]}; "
                    "give the results of these images, or raise --max_bad_fraction"
                )
            write_label_shard(directory, images, shard, stored, member=OBJECTS)
            bar.update(int(images.shard_sizes[shard]), failed=len(failed))
    return failed


def _stored(results: Results, images: ShardSet, shard: int, row: int) -> tuple[str, bytes]:
    key, info = images.key(shard, row), images.read_info(shard, row)
    try:
        if key not in results.names:
            raise ValueError("the results have no such image")
        height, width = info.get("height"), info.get("width")
        if not (isinstance(height, int) and isinstance(width, int)):
            raise ValueError("its JSON member does not say its size")
        return key, results.objects.stored(results.names[key], size=(height, width))
    except ValueError as error:
        raise BadSample(key, images.manifest.files[shard], str(error)) from error
