"""What every source offers to packing, and the options that choose one."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from engine.errors import Fault, InputError
from shards.keys import make_key

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

Fixations = list[list[list[int]]]

# What the system says of one file for good; None is a decoder's word on its bytes. Any other error (a share that does
# not answer, no memory, too many open files) may be over at the next try.
_LASTING = frozenset((
    None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EINVAL,
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Item:
    """One image to pack: `name` within the source, `size` in bytes (an estimate will do), class index or -1."""

    name: str
    size: int
    label: int = -1

    @property
    def key(self) -> str:
        """Key of the sample in the shards."""
        return make_key(self.name)


@dataclass
class SourceConfig:
    """Where the images come from."""

    kind: Literal["image_folder", "tar", "cifar", "salicon", "osie", "flickr8k", "coco", "cub", "stanford_dogs"] = (
        "image_folder"
    )
    """Layout of the source: image_folder (one folder per class, or images alone), tar (one archive or a folder of
    them), cifar (the python or binary release), salicon (2017 .mat or 2015 JSON), osie, flickr8k, coco (2014 or 2017),
    cub (CUB-200 of 2010 or 2011), stanford_dogs."""
    path: str = ""
    """Folder or archive with the images."""
    split: Literal["all", "train", "val", "test"] = "all"
    """Part of the source to take, for the layouts that have parts: cifar (train, test), salicon (train, val, test),
    osie (train, val: sorted by file name, the last 200 are val), flickr8k and coco (train, val, test), cub and
    stanford_dogs (train, test). The last four are split by a fixed rule where their lists are not there: it orders the
    files by the SHA-256 of their names; docs/shards.md has it."""
    split_file: str = ""
    """flickr8k and coco only: Karpathy's dataset_flickr8k.json or dataset_coco.json, to split as it says."""
    edition: Literal["auto", "2015", "2017", "simulated"] = "auto"
    """SALICON only: edition of the gaze files; auto reads it off their format. simulated: the generated sample, which
    has the 2017 layout but no human gaze, and is recorded as such."""
    tracking: Literal["eye", "mouse"] = "eye"
    """OSIE only: eye tracking, or mouse tracking in the lab."""
    compare_maps: bool = True
    """SALICON only: refuse fixations that do not agree with the shipped maps (x and y swapped, counted from 0)."""


class Source(Protocol):
    """Images, and where there is gaze, fixations. Sent to packing processes, so it must pickle.

    `gaze`: None, or a dictionary with `edition` and `sigma` (pixels) that goes into the manifest.
    """

    classes: tuple[str, ...]
    gaze: dict[str, Any] | None

    def items(self) -> list[Item]:
        """All images, in a fixed order."""
        ...

    def read(self, item: Item) -> bytes:
        """Encoded bytes of an image. Raises OSError or ValueError when that one cannot be read.

        It is then left out for good, unless the OSError is one that may pass: that ends the pack.
        """
        ...

    def fixations(self, item: Item) -> Fixations | None:
        """Per observer, a list of [x, y] pixel indices counted from 0; None for an image without gaze."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest says about the source. Never a path or a time: packs must be byte-identical."""
        ...


def existing_folder(path: str | Path, what: str) -> Path:
    """`path` as a folder that is there.

    Raises:
        InputError: no path given, nothing there, or not a folder.
    """
    if not str(path):
        raise InputError(f"source.path: no folder given: set --source.path to {what}")
    folder = Path(path)
    if not folder.exists():
        raise InputError(f"{folder}: no such folder: give the path of {what}")
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder: give the path of {what}")
    return folder


def refuse_passing(error: Exception, where: Path | str) -> None:
    """Let an error stand for the file that it came from only where it says something about that file.

    Raises:
        Fault: the system failed for now: nothing may be left out for that.
    """
    if isinstance(error, OSError) and error.errno not in _LASTING:
        raise Fault(
            f"{where}: cannot be read ({error.strerror}), which may pass: the same command goes on where it stopped; "
            "if it stays so, restore that file"
        ) from error


def walk_images(root: Path) -> Iterator[tuple[str, int]]:
    """(relative name, bytes) of every image file below `root`, sorted; hidden files are passed over.

    Links are followed, as data folders made of links are common, but no folder is entered twice on one way down.
    """
    yield from _walk(root, "", frozenset())


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}): check its permissions") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {identity})
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            try:
                status = entry.stat()
            except OSError as error:
                raise InputError(f"{entry.path}: {error.strerror}: a dangling link? remove or repair it") from error
            if stat.S_ISREG(status.st_mode):
                yield prefix + entry.name, status.st_size


def from_matlab(points: np.ndarray, *, swapped: bool = False) -> list[list[int]]:
    """MATLAB pixel positions to [x, y] pixel indices counted from 0: `round(p) - 1`, as the data sets' own code rounds.

    Args:
        points: `(num_points, 2)`, counted from 1; non-finite rows are dropped.
        swapped: the columns are (y, x).
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    indices = np.floor(points + 0.5).astype(np.int64) - 1
    result: list[list[int]] = (indices[:, ::-1] if swapped else indices).tolist()
    return result


def make_source(config: SourceConfig) -> Source:
    """The source that the options describe.

    Raises:
        InputError: nothing there, an unknown layout, or options that this source does not have.
    """
    from shards.sources.captioned import coco, flickr8k
    from shards.sources.cifar import Cifar
    from shards.sources.fine_grained import cub, stanford_dogs
    from shards.sources.image_folder import ImageFolder
    from shards.sources.osie import Osie
    from shards.sources.salicon import Salicon
    from shards.sources.tars import Tars

    _refuse_foreign_options(config)
    makers: dict[str, Callable[[], Source]] = {
        "image_folder": lambda: ImageFolder(config.path),
        "tar": lambda: Tars(config.path),
        "cifar": lambda: Cifar(config.path, split=config.split),
        "salicon": lambda: Salicon(
            config.path, split=config.split, edition=config.edition, compare_maps=config.compare_maps
        ),
        "osie": lambda: Osie(config.path, split=config.split, tracking=config.tracking),
        "flickr8k": lambda: flickr8k(config.path, split=config.split, split_file=config.split_file),
        "coco": lambda: coco(config.path, split=config.split, split_file=config.split_file),
        "cub": lambda: cub(config.path, split=config.split),
        "stanford_dogs": lambda: stanford_dogs(config.path, split=config.split),
    }
    return makers[config.kind]()


def _refuse_foreign_options(config: SourceConfig) -> None:
    """An option that the source would ignore is a mistake: say so instead of packing something else."""
    defaults = SourceConfig()
    owners = {
        "split": ("cifar", "salicon", "osie", "flickr8k", "coco", "cub", "stanford_dogs"),
        "split_file": ("flickr8k", "coco"),
        "edition": ("salicon",),
        "tracking": ("osie",),
        "compare_maps": ("salicon",),
    }
    for name, kinds in owners.items():
        if getattr(config, name) != getattr(defaults, name) and config.kind not in kinds:
            raise InputError(
                f"source.{name}: {config.kind} has no such option (only {', '.join(kinds)}): leave it out"
                + (", and give the split's folder as source.path" if name == "split" else "")
            )
