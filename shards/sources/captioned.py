"""Images of the caption sets: Flickr8k and COCO. A sample's key is the stem of its file, by which captions find it."""

import json
from pathlib import Path
from typing import Any

from engine.errors import InputError
from shards.plain import read_plain
from shards.sources.base import existing_folder, walk_images
from shards.sources.listed import ListedImages, read_lines
from shards.sources.splits import TENTHS_RULE, in_tenths

FLICKR_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")
FLICKR_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
COCO_YEARS = ("2017", "2014")
COCO_SPLITS = ("train", "val", "test")


def flickr8k(path: str | Path, *, split: str, split_file: str = "") -> ListedImages:
    """Flickr8k: `Flicker8k_Dataset/` (so spelt in the release) or `Images/`, with the lists of `Flickr8k_text/`.

    Args:
        split: `train`, `val`, `test` or `all`. Without the lists, `TENTHS_RULE` splits.
        split_file: Karpathy's `dataset_flickr8k.json`, which then splits; empty for none.

    Raises:
        InputError: no images, lists that are there in part, or a split file of another layout.
    """
    root = existing_folder(path, "the Flickr8k folder (it holds Flicker8k_Dataset or Images)")
    images = next((root / name for name in FLICKR_FOLDERS if (root / name).is_dir()), root)
    if split_file:
        return _karpathy("flickr8k", images, Path(split_file), split=split)
    lists = [folder for folder in (root, root / "Flickr8k_text") if (folder / FLICKR_LISTS["train"]).exists()]
    if lists and split != "all":
        listed = read_lines(lists[0] / FLICKR_LISTS[split])
        return ListedImages("flickr8k", images, sorted(listed), split=split, rule="official")
    return _flat("flickr8k", images, split=split)


def coco(path: str | Path, *, split: str, split_file: str = "") -> ListedImages:
    """COCO: `train2017/`, `val2017/` and so on, right in the folder or in `images/`; or one folder of images.

    Args:
        split: chooses `train2017` or `train2014` and so on. A single folder of images is split by `TENTHS_RULE`, or
            taken whole with `all`.
        split_file: Karpathy's `dataset_coco.json`, which then splits the images of 2014; `train` is then his train and
            restval. Empty for none.

    Raises:
        InputError: no images, folders of both years, or a split file of another layout.
    """
    root = existing_folder(path, "the COCO folder (it holds train2017 and so on) or a folder of its images")
    base = root / "images" if (root / "images").is_dir() else root
    if split_file:
        return _karpathy("coco", base, Path(split_file), split=split)
    folders = {s: [base / f"{s}{year}" for year in COCO_YEARS if (base / f"{s}{year}").is_dir()] for s in COCO_SPLITS}
    if not any(folders.values()):
        return _flat("coco", base, split=split)
    if split == "all":
        raise InputError(f"{base}: holds the folders of COCO's splits: give one of them with --source.split")
    if len(folders[split]) != 1:
        found = ", ".join(folder.name for folder in folders[split]) or "none"
        raise InputError(
            f"{base}: of split {split!r} there must be one folder, found: {found}: give the folder as source.path"
        )
    names = [name for name, _ in walk_images(folders[split][0])]
    return ListedImages("coco", folders[split][0], names, split=split, rule="official")


def _flat(kind: str, folder: Path, *, split: str) -> ListedImages:
    names = [name for name, _ in walk_images(folder)]
    if any("/" in name for name in names):
        raise InputError(f"{folder}: its images lie in folders, those of {kind} in one: give that as source.path")
    if split == "all":
        return ListedImages(kind, folder, names, split=split, rule="none")
    return ListedImages(kind, folder, in_tenths(names, split), split=split, rule=TENTHS_RULE)


def _karpathy(kind: str, folder: Path, file: Path, *, split: str) -> ListedImages:
    """Karpathy's split: `images` with `filename`, `split` and, for COCO, the folder in `filepath`."""
    try:
        content: Any = json.loads(read_plain(file))
        wanted = {"train": ("train", "restval"), "all": ("train", "restval", "val", "test")}.get(split, (split,))
        places = {}
        for one in content["images"]:
            if one["split"] in wanted:
                places[str(one["filename"])] = "/".join([*filter(None, [one.get("filepath")]), one["filename"]])
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}): correct source.split_file") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: not Karpathy's layout ({type(error).__name__}: {str(error)[:60]}): give dataset_flickr8k.json or "
            "dataset_coco.json"
        ) from error
    return ListedImages(kind, folder, sorted(places), places=places, split=split, rule=f"Karpathy: {file.name}")
