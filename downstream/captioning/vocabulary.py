"""Words of captions and their numbers."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from downstream.captioning.reading import read_json
from engine.errors import InputError
from engine.files import write_json

PADDING, UNKNOWN, START, END = 0, 1, 2, 3
NUM_SPECIAL = 4
WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def words_of(text: str) -> list[str]:
    """Lower-case words: letters and digits, with apostrophes inside; punctuation and hyphens part them."""
    return [word.replace("\u2019", "'") for word in WORD.findall(text.lower())]


@dataclass(frozen=True)
class Vocabulary:
    """Words by number; the first `NUM_SPECIAL` numbers are padding, unknown, start and end.

    Attributes:
        words: the known words, in the alphabet's order.
    """

    words: tuple[str, ...]
    numbers: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", {word: i for i, word in enumerate(self.words, start=NUM_SPECIAL)})

    def __len__(self) -> int:
        return NUM_SPECIAL + len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self.numbers

    def encode(self, words: Sequence[str], *, max_words: int) -> list[int]:
        """Start, the words' numbers, end; a caption of more than `max_words` is cut and has no end."""
        known = [self.numbers.get(word, UNKNOWN) for word in words[:max_words]]
        return [START, *known, *([END] if len(words) <= max_words else [])]

    def decode(self, tokens: Iterable[int]) -> list[str]:
        """Words up to the end; padding, start and unknown words are left out."""
        found = []
        for token in tokens:
            if token == END:
                break
            if token >= NUM_SPECIAL:
                found.append(self.words[token - NUM_SPECIAL])
        return found

    def write(self, path: Path) -> None:
        """Write the words as a JSON list."""
        write_json(path, list(self.words))

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Read what `write` wrote.

        Raises:
            InputError: missing or damaged.
        """
        words = read_json(path, remedy="give the folder of a captioning run that has begun")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise InputError(f"{path} is no list of words: it is damaged, so train the run again")
        return cls(tuple(words))


def learn_vocabulary(captions: Iterable[Sequence[str]], *, min_count: int) -> Vocabulary:
    """Words that stand at least `min_count` times in the captions.

    Raises:
        InputError: there is none.
    """
    counts = Counter(word for words in captions for word in words)
    known = sorted(word for word, count in counts.items() if count >= min_count)
    if not known:
        raise InputError(f"no word stands {min_count} times in the training captions: lower caption.min_count")
    return Vocabulary(tuple(known))
