"""Captions in the public layouts of Flickr8k, COCO and Karpathy's splits, and the split where a layout has none."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from downstream.captioning.config import CaptionConfig
from downstream.captioning.reading import entries_of, read_json, read_text
from downstream.captioning.vocabulary import words_of
from engine.errors import InputError
from engine.files import sha256_of
from shards.sources.splits import TENTHS_RULE, in_tenths

PARTS = ("train", "val", "test")
CAPTION_FILES = {
    "flickr8k": ("captions.txt", "Flickr8k.token.txt"),
    "coco": ("captions.json", "annotations/captions_train2017.json", "annotations/captions_train2014.json"),
    "karpathy": ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json"),
}
IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "train2017", "train2014", "val2014", ".")
SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


@dataclass(frozen=True)
class CaptionedImage:
    """One image with its captions as they were written.

    Attributes:
        name: path below the folder of images.
    """

    name: str
    path: Path
    captions: tuple[str, ...]


@dataclass
class CaptionSet:
    """A captioned data set.

    Attributes:
        parts: "train", "val" and "test" to their images, by name.
        skipped_captions, skipped_images: reason to the number that was left out.
        num_captions, num_images: read, those left out among them.
        facts: what the split and the files are.
    """

    parts: dict[str, list[CaptionedImage]]
    skipped_captions: Counter[str] = field(default_factory=Counter)
    skipped_images: Counter[str] = field(default_factory=Counter)
    num_captions: int = 0
    num_images: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def read_captions(caption: CaptionConfig, root: Path) -> CaptionSet:
    """Read captions and split; images without a file, without captions, and captions without a word are counted.

    Args:
        root: data.path, where files and folders are looked for that the options do not name.

    Raises:
        InputError: a file is missing or in another layout, the split names images that have no captions, or a part
            is empty.
    """
    file = caption.captions or _present(root, CAPTION_FILES[caption.layout], "caption.captions")
    folder = caption.images or _present(root, IMAGE_FOLDERS, "caption.images")
    if not folder.is_dir():
        raise InputError(f"caption.images {folder} is no folder: give that of the images")
    own_split: dict[str, str] = {}
    if caption.layout == "flickr8k":
        written = _flickr8k(file)
    elif caption.layout == "coco":
        written = _coco(file)
    else:
        written, own_split = _karpathy(file)
    found = CaptionSet({part: [] for part in PARTS}, num_images=len(written))
    images = _usable(written, folder, found)
    parts, rule = _split(images, caption, own_split, written)
    found.parts = {part: [images[name] for name in parts[part]] for part in PARTS}
    for part in PARTS:
        if not found.parts[part]:
            raise InputError(f"{file}: no usable image to {part}; the split is: {rule}")
    found.facts = {
        "layout": caption.layout,
        "split": rule,
        "images": {part: len(found.parts[part]) for part in PARTS},
        "sha256": {file.name: sha256_of(file)[:16]},
    }
    return found


def _present(root: Path, names: Sequence[str], option: str) -> Path:
    for name in names:
        if (root / name).exists():
            return root / name
    raise InputError(f"{root} has none of {', '.join(names)}: check data.path, or give {option}")


def _usable(written: dict[str, list[str]], folder: Path, found: CaptionSet) -> dict[str, CaptionedImage]:
    images = {}
    for name, captions in sorted(written.items()):
        found.num_captions += len(captions)
        good = tuple(caption for caption in captions if words_of(caption))
        found.skipped_captions["empty"] += len(captions) - len(good)
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            found.skipped_images["without a file"] += 1
            found.skipped_captions["of an image without a file"] += len(good)
        elif not good:
            found.skipped_images["without captions"] += 1
        else:
            images[name] = CaptionedImage(name, path, good)
    found.skipped_captions += Counter()  # drops reasons that never came up
    return images


def _split(
    images: dict[str, CaptionedImage], caption: CaptionConfig, own: dict[str, str], written: dict[str, list[str]]
) -> tuple[dict[str, list[str]], str]:
    if own:
        return {part: [name for name in images if own.get(name) == part] for part in PARTS}, "Karpathy's, in the file"
    if caption.split is None:
        # of all images that are written about: one more missing file moves no other image to another part
        chosen = {part: in_tenths(list(written), part) for part in PARTS}
        return {part: [name for name in chosen[part] if name in images] for part in PARTS}, TENTHS_RULE
    parts: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for part, name in SPLIT_FILES.items():
        file = caption.split / name
        lines = [line.strip() for line in read_text(file, remedy="caption.split needs it").splitlines()]
        listed = [line for line in lines if line]
        unknown = [line for line in listed if line not in written]
        if unknown:
            raise InputError(
                f"{file}: {len(unknown)} of {len(listed)} images have no captions, the first is {unknown[0]}: give "
                "the split of these captions, or leave caption.split out"
            )
        twice = [line for line in listed if line in seen]
        if twice:
            raise InputError(f"{file}: {twice[0]} is also listed to {seen[twice[0]]}: an image may stand in one part")
        seen |= dict.fromkeys(listed, part)
        parts[part] = [line for line in listed if line in images]
    return parts, "lists Flickr_8k.{train,dev,test}Images.txt"


def _flickr8k(path: Path) -> dict[str, list[str]]:
    """`captions.txt` (image,caption with a header) or `Flickr8k.token.txt` (image#number, tab, caption)."""
    text = read_text(path, remedy="give caption.captions Flickr8k's captions.txt or Flickr8k.token.txt")
    found: dict[str, list[str]] = {}
    if "\t" in text.split("\n", 1)[0]:
        rows = [line.split("\t", 1) for line in text.splitlines() if line.strip()]
        pairs = [(row[0].rsplit("#", 1)[0], *row[1:]) for row in rows]
    else:
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
        if not rows or [cell.strip().lower() for cell in rows[0]] != ["image", "caption"]:
            raise InputError(f"{path}, line 1: the header 'image,caption' is missing: is it Flickr8k's captions.txt?")
        # a caption with a comma that nobody quoted is still one caption
        pairs = [(row[0], *([",".join(row[1:])] if len(row) > 1 else [])) for row in rows[1:]]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2 or not pair[0].strip():
            raise InputError(f"{path}, entry {number}: no image and caption: {' '.join(pair)[:60]!r}")
        found.setdefault(pair[0].strip(), []).append(pair[1].strip())
    return found


def _coco(path: Path) -> dict[str, list[str]]:
    """COCO's captions JSON: `images` (id, file_name), `annotations` (image_id, caption)."""
    content = read_json(path, remedy="give caption.captions COCO's captions JSON")
    images = entries_of(content, "images", {"id": int, "file_name": str}, path=path)
    names = {image["id"]: image["file_name"] for image in images}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for entry in entries_of(content, "annotations", {"image_id": int, "caption": str}, path=path):
        # an image that the file does not list has no name: it is counted as one without a file
        found.setdefault(names.get(entry["image_id"], f"image {entry['image_id']}"), []).append(entry["caption"])
    return found


def _karpathy(path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Karpathy's dataset_*.json: `images` (filename, filepath, split, sentences with raw text); restval is train."""
    content = read_json(path, remedy="give caption.captions a dataset_*.json of Karpathy's")
    found: dict[str, list[str]] = {}
    split: dict[str, str] = {}
    fields = {"filename": str, "split": str, "sentences": list}
    for number, image in enumerate(entries_of(content, "images", fields, path=path)):
        given = [sentence.get("raw") for sentence in image["sentences"] if isinstance(sentence, dict)]
        raw = [text for text in given if isinstance(text, str)]
        if len(raw) != len(image["sentences"]):
            raise InputError(f"{path}, entry {number} of 'images': a sentence without its 'raw' text")
        folder = image.get("filepath")  # COCO's alone
        name = f"{folder}/{image['filename']}" if isinstance(folder, str) else image["filename"]
        found[name] = raw
        part = "train" if image["split"] == "restval" else image["split"]
        if part not in PARTS:
            raise InputError(f"{path}, entry {number} of 'images': split {part!r} is none of {', '.join(PARTS)}")
        split[name] = part
    return found, split
