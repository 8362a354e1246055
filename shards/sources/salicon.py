"""SALICON: COCO images with mouse-contingent gaze, in its 2017 layout (.mat files) and its 2015 one (COCO-style JSON).

Both count pixels from 1; the 2015 JSON lists fixations as [y, x]. The editions differ in how fixations were found, so
the edition is written in the manifest and two editions in one folder are refused. Images, fixations and maps may lie in
folders per split (`images/train/...`) or flat, where the COCO file names tell the split.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from engine.errors import InputError
from shards.decode import image_size
from shards.sources.agreement import check_agreement
from shards.sources.base import Fixations, Item, existing_folder, from_matlab, walk_images
from shards.sources.matlab import load_mat

# The release blurs fixations with a Gaussian of 19 pixels on images 640 pixels wide.
SIGMA_PER_WIDTH = 19 / 640
SPLITS = ("train", "val", "test")
GAZE_SPLITS = ("train", "val")
NUM_COMPARED = 16


class Salicon:
    """One split of SALICON, or train and val together (`all`). The test split has no gaze.

    Raises:
        InputError: folders or gaze missing, both editions present, gaze that contradicts the shipped maps.
    """

    classes: tuple[str, ...] = ()

    def __init__(
        self, path: str | Path, *, split: str = "all", edition: str = "auto", compare_maps: bool = True
    ) -> None:
        self.root = existing_folder(path, "the SALICON folder (it holds images/ and fixations/)")
        self.images = self.root / "images"
        if not self.images.is_dir():
            raise InputError(f"{self.root}: no images/ in it: unpack SALICON's images.zip there")
        self.split = split
        self._items = self._select(split)
        wanted = [item for item in self._items if split != "test"]
        json_files = [found for name in GAZE_SPLITS for found in self._json_of(name)]
        self.edition = self._edition(edition, json_files) if wanted else edition
        self._records = _read_2015(json_files) if json_files and self.edition == "2015" else None
        self.gaze: dict[str, Any] | None = None
        if wanted:
            self._check_complete(wanted)
            name = self.edition if self.edition == "simulated" else f"salicon-{self.edition}"
            self.gaze = {"edition": name, "sigma": self._sigma(wanted[0])}
        self.maps_compared = self._compare(wanted) if compare_maps else False

    def items(self) -> list[Item]:
        """The split's images, sorted by name."""
        return self._items

    def read(self, item: Item) -> bytes:
        """The file as it is."""
        return (self.images / item.name).read_bytes()

    def fixations(self, item: Item) -> Fixations | None:
        """Fixations of each observer, None in the test split."""
        if self.gaze is None:
            return None
        if self._records is not None:
            return self._records[_base(item.name)]
        path = self._mat_of(item.name)
        content = load_mat(path) if path is not None else {}
        try:
            observers = np.atleast_1d(content["gaze"])
            return [from_matlab(np.asarray(one.fixations, dtype=np.float64)) for one in observers]
        except (KeyError, AttributeError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not the SALICON layout ({error}): take the release's fixations") from error

    def describe(self) -> dict[str, Any]:
        """Kind, split, number of images, and whether the gaze was compared with the shipped maps."""
        return {
            "kind": "salicon",
            "split": self.split,
            "num_images": len(self._items),
            "maps_compared": self.maps_compared,
        }

    def _select(self, split: str) -> list[Item]:
        everything = [Item(name, size) for name, size in walk_images(self.images)]
        if not everything:
            raise InputError(f"{self.images}: no images in it: unpack SALICON's images.zip there")
        if split == "all":
            chosen = [item for item in everything if _split_of(item.name) != "test"]
        else:
            chosen = [item for item in everything if _split_of(item.name) == split]
        if not chosen:
            raise InputError(
                f"{self.images}: no images of split {split!r} (in a folder {split}/, or named COCO_{split}2014_...): "
                "unpack that split, or choose another with --source.split"
            )
        return chosen

    def _sigma(self, item: Item) -> float:
        return round(SIGMA_PER_WIDTH * self._size(item)[1], 4)

    def _size(self, item: Item) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        try:
            return image_size(self.read(item))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.images / item.name}: unusable image ({error}): unpack the images again") from error

    def _json_of(self, split: str) -> list[Path]:
        folders = (self.root, self.root / "fixations", self.root / "annotations")
        found = [folder / f"fixations_{split}2014.json" for folder in folders]
        return [path for path in found if path.is_file()][:1]

    def _edition(self, wanted: str, json_files: list[Path]) -> str:
        has_mat = (self.root / "fixations").is_dir() and any((self.root / "fixations").rglob("*.mat"))
        if not json_files and not has_mat:
            raise InputError(
                f"{self.root}: no gaze in it (fixations/**/*.mat or fixations_train2014.json): unpack SALICON's "
                "fixations there, or pack it as --source.kind image_folder"
            )
        if json_files and has_mat and wanted == "auto":
            raise InputError(
                f"{self.root}: holds gaze of two editions (.mat and {json_files[0].name}), which must not be mixed: "
                "choose with --source.edition 2015 or 2017"
            )
        if wanted in ("2017", "simulated") and not has_mat:
            raise InputError(f"{self.root}: edition {wanted} is .mat files, none found: unpack them or give 2015")
        if wanted == "2015" and not json_files:
            raise InputError(
                f"{self.root}: edition 2015 is JSON (fixations_train2014.json), none found: unpack it or give 2017"
            )
        return wanted if wanted != "auto" else ("2017" if has_mat else "2015")

    def _mat_of(self, name: str) -> Path | None:
        return self._beside("fixations", name, ".mat")

    def _beside(self, folder: str, name: str, suffix: str) -> Path | None:
        """A file for image `name` in a folder that may have splits where images have none, or the reverse."""
        base, split = _base(name), _split_of(name)
        candidates = [Path(name).with_suffix(suffix), Path(base + suffix), Path(split or ".") / (base + suffix)]
        return next((self.root / folder / c for c in candidates if (self.root / folder / c).is_file()), None)

    def _check_complete(self, items: list[Item]) -> None:
        if self._records is not None:
            missing = [item.name for item in items if _base(item.name) not in self._records]
        else:
            missing = [item.name for item in items if self._mat_of(item.name) is None]
        if missing:
            raise InputError(
                f"{self.root}: no gaze for {len(missing)} of {len(items)} images, the first is {missing[0]}: unpack "
                "the fixations of the same split and edition"
            )

    def _compare(self, items: list[Item]) -> bool:
        """Check a few evenly spaced images against their shipped maps; False when there are no maps to compare with."""
        spaced = sorted({round(i) for i in np.linspace(0, len(items) - 1, NUM_COMPARED)}) if items else []
        pairs = []
        for item in (items[i] for i in spaced):
            path = self._beside("maps", item.name, ".png")
            shipped = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) if path is not None else None
            points = [point for observer in self.fixations(item) or [] for point in observer]
            if shipped is None or not points:
                continue
            size = self._size(item)
            if shipped.shape != size:
                raise InputError(
                    f"{path}: is a map of {shipped.shape[1]}x{shipped.shape[0]} pixels, its image {item.name} has "
                    f"{size[1]}x{size[0]}: take images, fixations and maps of one release"
                )
            pairs.append((np.array(points, dtype=np.int64), shipped.astype(np.float64)))
        check_agreement(pairs, sigma=self.gaze["sigma"] if self.gaze else 0.0, where=str(self.root))
        return bool(pairs)


def _base(name: str) -> str:
    """File name without folders and extension."""
    return name.rpartition("/")[2].rpartition(".")[0]


def _split_of(name: str) -> str:
    """Split of an image by its folder or its COCO name; empty when neither tells."""
    first = name.split("/")[0] if "/" in name else ""
    if first in SPLITS:
        return first
    return next((split for split in SPLITS if f"_{split}2014_" in name), "")


def _read_2015(paths: list[Path]) -> dict[str, Fixations]:
    """Image base name -> fixations per worker, from the COCO-style files."""
    result: dict[str, Fixations] = {}
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
            names = {image["id"]: _base(str(image["file_name"])) for image in content["images"]}
            for annotation in content["annotations"]:
                points = np.asarray(annotation["fixations"], dtype=np.float64)
                result.setdefault(names[annotation["image_id"]], []).append(from_matlab(points, swapped=True))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}: not the SALICON 2015 layout ({type(error).__name__}: {str(error)[:80]}): "
                "take the file of the release"
            ) from error
    return result
