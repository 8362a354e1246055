"""CIFAR-10 and CIFAR-100 from the python or binary release, or unpacked to one folder per class.

The python release is pickled; it is read by an unpickler that knows numpy arrays and nothing else, so a file that asks
for anything more is refused before it can run.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from engine.errors import InputError
from shards.sources.base import Fixations, Item, existing_folder
from shards.sources.image_folder import ImageFolder

SIDE = 32
PIXELS = 3 * SIDE * SIDE
SPLITS = ("train", "test")

_TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
# File names of a split by release, and the key of its labels / number of label bytes per record.
_BATCHES: dict[str, dict[str, tuple[str, ...]]] = {
    "10": {"train": _TRAIN_BATCHES, "test": ("test_batch",)},
    "100": {"train": ("train",), "test": ("test",)},
}
_LABEL_KEY = {"10": b"labels", "100": b"fine_labels"}
_NAMES_KEY = {"10": b"label_names", "100": b"fine_label_names"}
_META = {"10": ("batches.meta", "batches.meta.txt"), "100": ("meta", "fine_label_names.txt")}


class Cifar:
    """One split, or both (`all`), as lossless PNG images.

    Raises:
        InputError: no known layout, no such split, damaged or hostile files.
    """

    gaze: dict[str, Any] | None = None

    def __init__(self, path: str | Path, *, split: str = "all") -> None:
        if split not in ("all", *SPLITS):
            raise InputError(f"source.split: CIFAR has no split {split!r}: give train, test or all")
        root = existing_folder(path, "the CIFAR folder")
        self.split = split
        self._folders: dict[str, ImageFolder] = {}
        self._pixels: dict[str, np.ndarray] = {}
        self._labels: dict[str, np.ndarray] = {}
        wanted = SPLITS if split == "all" else (split,)
        self.release, self.format = _detect(root)
        if self.format == "folder":
            self._folders = {name: ImageFolder(root / name) for name in wanted}
            self.classes = next(iter(self._folders.values())).classes
            if any(folder.classes != self.classes for folder in self._folders.values()):
                raise InputError(f"{root}: train and test hold different classes: unpack the data set again")
            return
        self.classes = _class_names(root, release=self.release, layout=self.format)
        for name in wanted:
            read = _read_python if self.format == "python" else _read_binary
            batches = [read(root / file, self.release) for file in _files(self.release, self.format, name)]
            self._pixels[name] = np.concatenate([pixels for pixels, _ in batches])
            self._labels[name] = np.concatenate([labels for _, labels in batches])
            if ((self._labels[name] < 0) | (self._labels[name] >= len(self.classes))).any():
                raise InputError(f"{root}: labels outside the {len(self.classes)} classes: the files are damaged")

    def items(self) -> list[Item]:
        """All images: train before test, each in the release's order."""
        result = [
            Item(f"{split}/{item.name}", item.size, item.label)
            for split, folder in self._folders.items()
            for item in folder.items()
        ]
        for split, labels in self._labels.items():
            # A lossless 32x32 image takes about 2.3 kB.
            result += [Item(f"{split}/{number:05d}.png", 2300, label) for number, label in enumerate(labels.tolist())]
        return result

    def read(self, item: Item) -> bytes:
        """The file as it is, or the pixels as PNG."""
        split, _, rest = item.name.partition("/")
        if self._folders:
            return self._folders[split].read(Item(rest, item.size, item.label))
        pixels = self._pixels[split][int(rest.removesuffix(".png"))].reshape(3, SIDE, SIDE)
        written, data = cv2.imencode(".png", np.ascontiguousarray(pixels[::-1].transpose(1, 2, 0)))
        assert written  # 32x32 uint8 always can be
        return data.tobytes()

    def fixations(self, item: Item) -> Fixations | None:
        """None: CIFAR has no gaze."""
        return None

    def describe(self) -> dict[str, Any]:
        """Kind, release, format, split and number of images."""
        return {
            "kind": "cifar",
            "release": self.release,
            "format": self.format,
            "split": self.split,
            "num_images": len(self.items()),
        }


def _detect(root: Path) -> tuple[str, str]:
    """Release (`10`, `100`) and format (`python`, `binary`, `folder`) by the files that are there."""
    for marker, found in (
        ("data_batch_1.bin", ("10", "binary")),
        ("data_batch_1", ("10", "python")),
        ("train.bin", ("100", "binary")),
    ):
        if (root / marker).is_file():
            return found
    if (root / "train").is_file():
        return "100", "python"
    if (root / "train").is_dir() or (root / "test").is_dir():
        return "10", "folder"
    raise InputError(
        f"{root}: no CIFAR in it (data_batch_1, data_batch_1.bin, train, train.bin, or folders train/ and test/): "
        "give the unpacked folder, e.g. cifar-10-batches-py"
    )


def _files(release: str, layout: str, split: str) -> list[str]:
    suffix = ".bin" if layout == "binary" else ""
    return [name + suffix for name in _BATCHES[release][split]]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numbers, texts, lists, dictionaries and numpy arrays; refuses every other class or function."""

    _ALLOWED = frozenset(
        (module, name)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("ndarray", "dtype", "_reconstruct")
    )

    def find_class(self, module: str, name: str) -> Any:
        """The class or function a pickle asks for, from a fixed list."""
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        # The old module path is only a name in the file: the new one is the same function.
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: unpack the whole CIFAR release") from error
    except Exception as error:  # a hostile pickle can raise anything; it cannot run anything
        raise InputError(f"{path}: not a CIFAR file ({str(error)[:100]}): take the original release") from error
    return content


def _read_python(path: Path, release: str) -> tuple[np.ndarray, np.ndarray]:
    content = _unpickle(path)
    try:
        pixels = np.asarray(content[b"data"])
        labels = np.asarray(content[_LABEL_KEY[release]], dtype=np.int64)
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
            raise ValueError(f"data of shape {pixels.shape}")
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a CIFAR-{release} batch ({error}): take the original release") from error
    return pixels, labels


def _read_binary(path: Path, release: str) -> tuple[np.ndarray, np.ndarray]:
    label_bytes = 1 if release == "10" else 2
    try:
        data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        records = data.reshape(-1, label_bytes + PIXELS)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: unpack the whole CIFAR release") from error
    except ValueError as error:
        raise InputError(
            f"{path}: {len(data)} bytes are not whole records of {label_bytes + PIXELS}: the file is cut short"
        ) from error
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def _class_names(root: Path, *, release: str, layout: str) -> tuple[str, ...]:
    path = root / _META[release][0 if layout == "python" else 1]
    if layout == "python":
        names = _unpickle(path).get(_NAMES_KEY[release])
        if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
            raise InputError(f"{path}: holds no class names: take the original release")
        return tuple(name.decode() for name in names)
    if not path.is_file():
        raise InputError(f"{path}: no such file: unpack the whole CIFAR release")
    return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
