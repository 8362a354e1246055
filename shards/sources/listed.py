"""Images of which lists say what belongs to what: the ground that the sources with split files stand on."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from engine.errors import InputError
from shards.plain import read_plain
from shards.sources.base import Fixations, Item, refuse_passing


class ListedImages:
    """Images named by a list, with a class each or none.

    Args:
        kind: the source's kind, for the manifest.
        root: folder that the names are relative to.
        names: the images in the order of packing. One that is not there is left out and counted by packing, up to its
            max_bad_fraction.
        places: name -> where it lies below `root`; None where the names say it.
        labels: name -> class index; empty for a set without classes.
        split, rule: what was asked for, and what made the split.

    Raises:
        InputError: no images, a name twice, or one that leads out of the folder.
        Fault: the size of a file cannot be read for now.
    """

    gaze: dict[str, Any] | None = None

    def __init__(
        self,
        kind: str,
        root: Path,
        names: Sequence[str],
        *,
        places: Mapping[str, str] | None = None,
        classes: Sequence[str] = (),
        labels: Mapping[str, int] | None = None,
        split: str,
        rule: str,
    ) -> None:
        self.root, self.classes, self._places = root, tuple(classes), dict(places or {})
        if not names:
            raise InputError(f"{root}: no images of split {split!r}: unpack the whole release there")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{root}: {twice!r} stands twice in the lists of {split!r}: take the release's lists")
        self._items = [Item(name, self._size(name), labels[name] if labels else -1) for name in names]
        self._about = {"kind": kind, "split": split, "split_rule": rule, "num_images": len(names)}

    def items(self) -> list[Item]:
        """The split's images."""
        return self._items

    def read(self, item: Item) -> bytes:
        """The file as it is."""
        return read_plain(self.root / self._places.get(item.name, item.name))

    def fixations(self, item: Item) -> Fixations | None:
        """None: these sets have no gaze."""
        return None

    def describe(self) -> dict[str, Any]:
        """Kind, split, what made it, and number of images."""
        return self._about

    def _size(self, name: str) -> int:
        place = self._places.get(name, name)
        if place.startswith("/") or ".." in PurePosixPath(place).parts or "\0" in place:
            raise InputError(f"{self.root}: the lists name {place[:80]!r}, outside it: take the release's lists")
        try:
            return (self.root / place).stat().st_size
        except OSError as error:
            refuse_passing(error, self.root / place)
            return 0


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without the empty ones.

    Raises:
        InputError: missing, or no text.
    """
    try:
        text = read_plain(path).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): unpack the whole release") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: no UTF-8 text: take the file of the release") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_pairs(path: Path) -> dict[str, str]:
    """Lines `key value` of a text file, such as `17 002.Laysan_Albatross/x.jpg`.

    Raises:
        InputError: missing, no text, a line without value, or a key that comes twice.
    """
    pairs: dict[str, str] = {}
    for line in read_lines(path):
        key, _, value = line.partition(" ")
        if not value or key in pairs:
            fault = "comes twice" if value else "has no value"
            raise InputError(f"{path}: {key[:40]!r} {fault}: take the file of the release")
        pairs[key] = value.strip()
    return pairs
