"""Images in tar archives: one archive, or a folder of them (such as ImageNet's, one per class)."""

import os
from pathlib import Path
from typing import Any

from engine.errors import InputError
from shards.keys import check_key
from shards.sources.base import IMAGE_SUFFIXES, Fixations, Item
from shards.tar import Member, TarError, scan

# Every class up to the highest gets a name, so a damaged number must not fill the memory.
MAX_CLASSES = 1_000_000


class Tars:
    """Archives of image files, read by offset and never unpacked.

    Classes come from `.cls` members beside the images (WebDataset), else from the images' first folder, else, for
    several archives, from the archives' names; otherwise the set has none.

    Raises:
        InputError: nothing there, a damaged archive, links or names that lead out in it, a `.cls` member that is no
            class index below `MAX_CLASSES`, or no images.
    """

    gaze: dict[str, Any] | None = None

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path)
        if not str(path) or not self.root.exists():
            raise InputError(f"{path or 'source.path'}: no such archive or folder: give a .tar or a folder of them")
        files = sorted(self.root.glob("*.tar")) if self.root.is_dir() else [self.root]
        if not files:
            raise InputError(f"{self.root}: no .tar in it: give an archive or a folder of archives")
        self._place: dict[str, tuple[Path, Member]] = {}
        given: dict[str, int] = {}
        for file in files:
            self._scan(file, f"{file.stem}/" if len(files) > 1 else "", given)
        if not self._place:
            raise InputError(f"{self.root}: no images in the archive: give one that holds .jpg or .png files")
        self.classes: tuple[str, ...] = ()
        self._items = self._label(given)

    def items(self) -> list[Item]:
        """All images, sorted by name."""
        return self._items

    def read(self, item: Item) -> bytes:
        """The member's bytes."""
        path, member = self._place[item.name]
        return _pread(path, member)

    def fixations(self, item: Item) -> Fixations | None:
        """None: an archive of images has no gaze."""
        return None

    def describe(self) -> dict[str, Any]:
        """Kind and number of images."""
        return {"kind": "tar", "num_images": len(self._items)}

    def _scan(self, file: Path, prefix: str, given: dict[str, int]) -> None:
        try:
            with open(file, "rb") as handle:
                for member in scan(handle, foreign=True):
                    name = prefix + member.name.removeprefix("./")
                    if name.lower().endswith(IMAGE_SUFFIXES):
                        if name in self._place:
                            raise TarError(f"member {name[:80]!r} occurs twice")
                        check_key(Item(name, member.size).key)
                        self._place[name] = (file, member)
                    elif name.endswith(".cls"):
                        given[name.removesuffix(".cls")] = _class_index(file, member)
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read as a tar of images ({error}): make the archive again") from error

    def _label(self, given: dict[str, int]) -> list[Item]:
        names = sorted(self._place)
        sizes = [self._place[name][1].size for name in names]
        stems = [name.rpartition(".")[0] for name in names]
        if given:
            missing = [name for name, stem in zip(names, stems, strict=True) if stem not in given]
            if missing:
                raise InputError(f"{self.root}: images without a .cls member, the first is {missing[:1]}: add them")
            self.classes = tuple(str(index) for index in range(max(given.values()) + 1))
            return [Item(*row) for row in zip(names, sizes, (given[stem] for stem in stems), strict=True)]
        folders = [name.split("/")[0] if "/" in name else "" for name in names]
        if "" in folders:
            return [Item(name, size) for name, size in zip(names, sizes, strict=True)]
        self.classes = tuple(sorted(set(folders)))
        number = {name: index for index, name in enumerate(self.classes)}
        return [Item(*row) for row in zip(names, sizes, (number[folder] for folder in folders), strict=True)]


def _class_index(path: Path, member: Member) -> int:
    text = _pread(path, member).strip() if member.size <= 32 else b""
    if not text.isdigit() or int(text) >= MAX_CLASSES:
        raise TarError(f"member {member.name[:80]!r} is no class index from 0 to {MAX_CLASSES - 1}")
    return int(text)


def _pread(path: Path, member: Member) -> bytes:
    with open(path, "rb") as handle:
        return os.pread(handle.fileno(), member.size, member.offset)
