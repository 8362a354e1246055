"""Images in folders: one folder per class as torchvision's ImageFolder has it, or images without classes."""

from pathlib import Path
from typing import Any

from engine.errors import InputError
from shards.sources.base import Fixations, Item, existing_folder, walk_images

_SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


class ImageFolder:
    """`path/<class>/**/image`: classes are the first folders, sorted. Images right in `path`: an unlabelled set.

    Raises:
        InputError: no folder, no images, classes without images, images beside class folders, or a folder of splits.
    """

    gaze: dict[str, Any] | None = None

    def __init__(self, path: str | Path) -> None:
        self.root = existing_folder(path, "a folder of images")
        found = list(walk_images(self.root))
        if not found:
            raise InputError(f"{self.root}: no images in it (.jpg, .png, ...): give a folder that holds images")
        loose = [name for name, _ in found if "/" not in name]
        if loose and len(loose) < len(found):
            raise InputError(
                f"{self.root}: images such as {loose[0]!r} lie beside folders of images: "
                "put every image in a class folder, or all of them in one folder"
            )
        self.classes: tuple[str, ...] = () if loose else self._class_folders({name.split("/")[0] for name, _ in found})
        number = {name: index for index, name in enumerate(self.classes)}
        self._items = [Item(name, size, number.get(name.split("/")[0], -1)) for name, size in found]

    def items(self) -> list[Item]:
        """All images, sorted by name."""
        return self._items

    def read(self, item: Item) -> bytes:
        """The file as it is."""
        return (self.root / item.name).read_bytes()

    def fixations(self, item: Item) -> Fixations | None:
        """None: a plain folder has no gaze."""
        return None

    def describe(self) -> dict[str, Any]:
        """Kind and number of images."""
        return {"kind": "image_folder", "num_images": len(self._items)}

    def _class_folders(self, used: set[str]) -> tuple[str, ...]:
        folders = {entry.name for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        if {folder.lower() for folder in folders} <= _SPLIT_NAMES:
            raise InputError(
                f"{self.root}: its folders are splits ({', '.join(sorted(folders))}), not classes: "
                f"pack each on its own, e.g. --source.path {self.root / min(folders)}"
            )
        empty = sorted(folders - used)
        if empty:
            raise InputError(
                f"{self.root / empty[0]}: a class folder without images ({len(empty)} such): remove or fill it"
            )
        return tuple(sorted(folders))
