"""OSIE ("Predicting human gaze beyond pixels"): 700 images, eye tracking of 15 observers, mouse tracking in the lab.

Layout of the public release: `data/stimuli/*.jpg`, `data/eye/fixations.mat`, `data/mouse_lab/*.mat`. Positions count
from 1: the authors' own code rounds them and uses them as MATLAB indices (x is the column in the eye data; the mouse
data hold row, column).
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.errors import InputError
from shards.sources.base import Fixations, Item, existing_folder, from_matlab, walk_images
from shards.sources.matlab import load_mat

NUM_VALIDATION = 200
# 24 pixels is the authors' Gaussian (about one degree of visual angle).
SIGMA = 24.0


class Osie:
    """One split of OSIE with eye or mouse gaze. Fixed split: sorted by file name, the last 200 are validation.

    Raises:
        InputError: folders missing, no such split, images and gaze that do not match.
    """

    classes: tuple[str, ...] = ()

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "all",
        tracking: Literal["eye", "mouse"] = "eye",
    ) -> None:
        root = existing_folder(path, "the OSIE folder (it holds data/stimuli)")
        data = root / "data" if (root / "data").is_dir() else root
        self.stimuli = data / "stimuli"
        if not self.stimuli.is_dir():
            raise InputError(f"{root}: no data/stimuli in it: give the folder of the OSIE release")
        self.tracking, self.split = tracking, split
        self._gaze_path = data / "eye" / "fixations.mat" if tracking == "eye" else data / "mouse_lab"
        if not self._gaze_path.exists():
            raise InputError(f"{self._gaze_path}: not found: OSIE with {tracking} tracking needs it")
        self._items = self._select(split)
        self._eye = _eye_fixations(self._gaze_path) if tracking == "eye" else {}
        self._check_gaze()
        self.gaze: dict[str, Any] | None = {"edition": f"osie-{tracking}", "sigma": SIGMA}

    def items(self) -> list[Item]:
        """The split's images, sorted by name."""
        return self._items

    def read(self, item: Item) -> bytes:
        """The file as it is."""
        return (self.stimuli / item.name).read_bytes()

    def fixations(self, item: Item) -> Fixations | None:
        """Fixations of each observer; with mouse tracking, every raw sample of the cursor."""
        return self._eye[item.name] if self.tracking == "eye" else _mouse_samples(self._mouse_file(item.name))

    def describe(self) -> dict[str, Any]:
        """Kind, split, tracking and number of images."""
        return {"kind": "osie", "split": self.split, "tracking": self.tracking, "num_images": len(self._items)}

    def _select(self, split: str) -> list[Item]:
        images = [Item(name, size) for name, size in walk_images(self.stimuli)]
        if not images:
            raise InputError(f"{self.stimuli}: no images in it: unpack the OSIE stimuli there")
        if split == "all":
            return images
        if split not in ("train", "val"):
            raise InputError(f"source.split: OSIE has no split {split!r}: give train, val or all")
        if len(images) <= NUM_VALIDATION:
            raise InputError(
                f"{self.stimuli}: {len(images)} images, the split needs more than {NUM_VALIDATION}: "
                "unpack the whole release, or take --source.split all"
            )
        return images[:-NUM_VALIDATION] if split == "train" else images[-NUM_VALIDATION:]

    def _mouse_file(self, name: str) -> Path:
        return self._gaze_path / f"{name.rpartition('.')[0]}.mat"

    def _check_gaze(self) -> None:
        if self.tracking == "eye":
            missing = [item.name for item in self._items if item.name not in self._eye]
        else:
            missing = [item.name for item in self._items if not self._mouse_file(item.name).exists()]
        if missing:
            raise InputError(
                f"{self._gaze_path}: no gaze for {len(missing)} images, the first is {missing[0]}: "
                "stimuli and gaze are of different releases"
            )


def _eye_fixations(path: Path) -> dict[str, Fixations]:
    """Image name -> fixations per observer, from `fixations.mat`."""
    content = load_mat(path)
    try:
        result: dict[str, Fixations] = {}
        for entry in np.atleast_1d(content["fixations"]):
            observers = np.atleast_1d(entry.subjects)
            result[str(entry.img)] = [
                from_matlab(np.column_stack([np.atleast_1d(one.fix_x), np.atleast_1d(one.fix_y)])) for one in observers
            ]
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not the OSIE layout ({error}): take fixations.mat of the release") from error
    return result


def _mouse_samples(path: Path) -> Fixations:
    """Cursor samples per observer, from one image's file."""
    content = load_mat(path)
    try:
        record = content["fixations"]
        subjects = np.atleast_1d(record.subj)
        coordinates = np.asarray(record.coord, dtype=np.float64).reshape(len(subjects), 2)
    except (KeyError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not the OSIE layout ({error}): take mouse_lab of the release") from error
    return [from_matlab(coordinates[subjects == subject], swapped=True) for subject in np.unique(subjects)]
