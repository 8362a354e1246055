"""Feature maps of a frozen encoder, computed once and kept on disk for every run that needs the same."""

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from downstream.config import DownstreamConfig, ImageConfig
from downstream.tasks.pictures import FeatureMaps, read_square
from engine.errors import InputError
from engine.files import write_json
from engine.loading import make_loader
from engine.progress import ProgressBar
from engine.ranks import Ranks
from pretrain.augment import normalize
from pretrain.evaluators.base import Subject
from pretrain.evaluators.subjects import open_subject
from pretrain.probe_config import LoadConfig, ProbeConfig

PART = 1024  # images; also how much a kill can cost
BATCH = 32
SCHEMA = 1


class _Squares(Dataset[tuple[Tensor, Tensor]]):
    """Images by row, uint8 `(batch, size, size, 3)`, and whether each could be read."""

    def __init__(self, files: list[Path], *, size: int) -> None:
        self.files, self.size = files, size

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([row])

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Read one batch."""
        images = np.zeros((len(rows), self.size, self.size, 3), dtype=np.uint8)
        good = torch.ones(len(rows), dtype=torch.bool)
        for i, row in enumerate(rows):
            try:
                images[i] = read_square(self.files[row], size=self.size)
            except ValueError:
                good[i] = False
        return torch.from_numpy(images), good


def open_encoder(image: ImageConfig, *, weights: str | None, ranks: Ranks) -> Subject:
    """The encoder that `image.encoder` names, on this rank's device.

    Args:
        weights: for timm:NAME, its file of weights or a package's name.

    Raises:
        InputError: none is named, or see `open_subject`.
    """
    if image.encoder is None:
        raise InputError("no encoder: set image.encoder to an encoder/ folder or to timm:NAME")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    load = LoadConfig(weights=weights, image_size=image.size)
    return open_subject(ProbeConfig(encoder=str(image.encoder), load=load), ranks=ranks, device=device)


def encoder_features(files: Mapping[int, Path], *, subset: str, config: DownstreamConfig) -> FeatureMaps:
    """Feature maps of `image.encoder` for question answering, see `cached_features`. Every rank must call this.

    Raises:
        InputError: no such encoder, weights that do not fit, or `image.frozen` is false.
    """
    if not config.image.frozen:
        raise InputError("image.frozen is false, but question answering reads an encoder's features from disk: set it")
    ranks, vqa = Ranks(), config.vqa
    subject = open_encoder(config.image, weights=vqa.weights, ranks=ranks)
    options = {"size": config.image.size, "num_workers": config.loop.num_workers}
    return cached_features(files, subset=subset, subject=subject, cache=vqa.cache, ranks=ranks, **options)


def cached_features(
    files: Mapping[int, Path], *, subset: str, subject: Subject, size: int, cache: Path, num_workers: int, ranks: Ranks
) -> FeatureMaps:
    """Last feature maps of an encoder for some images; what is on disk already is not computed again.

    The folder in `cache` is named for all that decides its content: the encoder's weights and input statistics, the
    image size and the images' numbers. It is filled part by part, shared out among the ranks, so a killed run goes on
    where it was. Every rank must call this.

    Raises:
        InputError: a damaged part.
    """
    numbers = sorted(files)
    facts = {
        "schema": SCHEMA,
        "subset": subset,
        "encoder": subject.hash,
        "statistics": [list(values) for values in subject.statistics],
        "image_size": size,
        "images": numbers,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"{subset}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [range(start, min(start + PART, len(numbers))) for start in range(0, len(numbers), PART)]
    missing = [rows for rows in parts[ranks.rank :: ranks.world_size] if not _part_file(folder, rows).is_file()]
    paths = [files[number] for number in numbers]
    if missing:
        _compute(paths, missing, folder=folder, subject=subject, size=size, num_workers=num_workers)
    ranks.barrier()
    if ranks.is_main and not (folder / "manifest.json").is_file():
        write_json(folder / "manifest.json", facts)
    return _opened(folder, parts, numbers)


def _compute(
    paths: list[Path], parts: list[range], *, folder: Path, subject: Subject, size: int, num_workers: int
) -> None:
    batches = [list(rows[i : i + BATCH]) for rows in parts for i in range(0, len(rows), BATCH)]
    read = iter(make_loader(_Squares(paths, size=size), batches, num_workers=num_workers))
    with ProgressBar(sum(len(rows) for rows in parts), f"features of {subject.name}") as bar:
        for rows in parts:
            maps, good = [], []
            for images, readable in _take(read, -(-len(rows) // BATCH)):
                maps.append(feature_maps(subject, images).half().cpu())
                good.append(readable)
                bar.update(len(images))
            unreadable = [rows[i] for i in (~torch.cat(good)).nonzero().flatten().tolist()]
            write_json(_part_file(folder, rows).with_suffix(".json"), {"unreadable": unreadable})
            _save(_part_file(folder, rows), torch.cat(maps).numpy())


def _take(batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        yield next(batches)


@torch.inference_mode()
def feature_maps(subject: Subject, images: Tensor) -> Tensor:
    """Last feature maps `(batch, channels, height, width)` of uint8 images `(batch, size, size, 3)`."""
    pixels = images.to(subject.device).permute(0, 3, 1, 2).float() / 255
    mean, std = subject.statistics
    options = {"indices": [-1], "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
    (last,) = subject.backbone.forward_intermediates(normalize(pixels, mean=mean, std=std), **options)
    return last


def _save(path: Path, maps: np.ndarray) -> None:
    """Under a name of its own first: a part that is there is whole, whoever else computes it at the same time."""
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, maps)
    temporary.rename(path)


def _opened(folder: Path, parts: list[range], numbers: list[int]) -> FeatureMaps:
    unreadable: set[int] = set()
    arrays = []
    for rows in parts:
        file = _part_file(folder, rows)
        unreadable |= set(json.loads(file.with_suffix(".json").read_text())["unreadable"])
        arrays.append(np.load(file, mmap_mode="r"))
        if len(arrays[-1]) != len(rows):
            raise InputError(f"{file} is damaged: remove the folder, and its features are computed again")
    places = {number: row for row, number in enumerate(numbers) if row not in unreadable}
    return FeatureMaps(arrays, places)


def _part_file(folder: Path, rows: range) -> Path:
    return folder / f"part-{rows.start // PART:05d}.npy"
