"""Which words of a caption name which detected objects (Kim et al., ICA), and their masks on the attention grid."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import yaml
from torch import Tensor

from downstream.captioning.reading import read_text
from downstream.captioning.vocabulary import words_of
from engine.errors import InputError

# Plurals that follow no rule, for the last word of a name.
IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "knife": "knives",
    "sheep": "sheep",
    "foot": "feet",
    "goose": "geese",
    "calf": "calves",
    "loaf": "loaves",
    "shelf": "shelves",
}
HISSING = ("s", "x", "z", "ch", "sh")


@dataclass(frozen=True)
class Mention:
    """A name of an object class in a caption.

    Attributes:
        position: of the name's last word in the caption, from 0: the word whose attention is supervised.
        category: the class.
    """

    position: int
    category: str


class NameMatcher:
    """Finds class names, their plurals and synonyms in captions; the longest name at a place wins.

    So "hot dog" is no dog, and "traffic light" one object. Every mention counts, also the second of a class.

    Args:
        categories: class names; the synonyms' classes are names too, whether or not they were ever detected.
        synonyms: class name to other words for it.

    Raises:
        InputError: a word stands for two classes.
    """

    def __init__(self, categories: Iterable[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> None:
        self.forms: dict[tuple[str, ...], str] = {}
        synonyms = synonyms or {}
        names = {name: (name, *synonyms.get(name, ())) for name in sorted({*categories, *synonyms})}
        for category, spellings in names.items():
            for form in sorted(_forms(spellings)):
                other = self.forms.setdefault(form, category)
                if other != category:
                    raise InputError(
                        f"'{' '.join(form)}' stands for the classes '{other}' and '{category}': take it from one of "
                        "them in caption.synonyms"
                    )
        self.longest = max((len(form) for form in self.forms), default=0)

    def find(self, words: Sequence[str]) -> list[Mention]:
        """Mentions in a caption, from left to right, none overlapping another."""
        found: list[Mention] = []
        start = 0
        while start < len(words):
            length = self._match(words, start)
            if length:
                last = start + length - 1
                found.append(Mention(last, self.forms[tuple(words[start : last + 1])]))
            start += max(length, 1)
        return found

    def _match(self, words: Sequence[str], start: int) -> int:
        for length in range(min(self.longest, len(words) - start), 0, -1):
            if tuple(words[start : start + length]) in self.forms:
                return length
        return 0


def plural_of(word: str) -> str:
    """English plural of a noun, by rule but for `IRREGULAR`."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    for end in ("man", "child"):  # fireman, grandchild
        if word.endswith(end):
            return word.removesuffix(end) + IRREGULAR[end]
    if word.endswith(HISSING):
        return word + "es"
    if word.endswith("y") and len(word) > 1 and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def read_synonyms(path: Path | None) -> dict[str, list[str]]:
    """Class name to other words for it, from a YAML mapping of lists; empty for no file.

    Raises:
        InputError: missing, no YAML, or not such a mapping.
    """
    if path is None:
        return {}
    try:
        content = yaml.safe_load(read_text(path, remedy="give caption.synonyms a YAML file, or null"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must map class names to lists of words")
    for name, words in content.items():
        if not isinstance(name, str) or not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise InputError(f"{path}: '{name}' must have a list of words, such as [man, woman]")
    return content


def grid_coverage(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Share of each grid cell that the mask covers, float32 `grid`, from a bool mask `(height, width)` of any size."""
    height, width = grid
    return cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)


def grid_labels(coverage: Tensor) -> Tensor:
    """Cells that count as the object, bool, from coverage `(..., cells)`: half covered, at least the fullest.

    Nothing where nothing is covered.
    """
    fullest = coverage.amax(-1, keepdim=True)
    return (coverage >= fullest.clamp(max=0.5)) & (coverage > 0)


def _forms(spellings: Iterable[str]) -> set[tuple[str, ...]]:
    forms = set()
    for spelling in spellings:
        words = words_of(spelling)
        if words:
            forms |= {tuple(words), (*words[:-1], plural_of(words[-1]))}
    return forms
