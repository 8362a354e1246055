"""Answers of the VQA data sets: normalised as the official evaluation does, numbered, and shared among ten people."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

NUM_ANSWERS = 10
ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", "zero": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS, start=1)}
PUNCTUATION = ";:/'[]\"()=+\\_><@`,?"
_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd "
    "there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all "
    "you'd you'll you're you've"
)
# what people mean when they leave the apostrophe out
CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
_NUMBER_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # all but a decimal point


def without_punctuation(text: str) -> str:
    """Punctuation becomes a space, or nothing where it touches one; in a text with `1,000` it all goes, spaceless.

    A full stop goes unless a digit follows.
    """
    joined = _NUMBER_COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        # asked of the text as given, whatever has become of other marks
        at_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joined or at_space else " ")
    return _PERIOD.sub("", result)


def normalise(answer: str) -> str:
    """The form in which the official evaluation compares a given answer.

    In order: punctuation; lower case; number words to digits; articles dropped; contractions' apostrophes put back.
    Source: the rules at visualqa.org/evaluation.html.
    """
    words = [DIGITS.get(word, word) for word in without_punctuation(_stripped(answer)).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def as_compared(answers: Sequence[str]) -> list[str]:
    """The ten people's answers as the official evaluation compares them with a normalised one.

    Only their punctuation is taken away, as the released ones have the rest behind them; where all agree, nothing is.
    """
    stripped = [_stripped(answer) for answer in answers]
    return [without_punctuation(answer) for answer in stripped] if len(set(stripped)) > 1 else stripped


def most_frequent(answers: Iterable[str], *, count: int) -> dict[str, int]:
    """Class numbers of the `count` most frequent answers; of equally frequent ones the first in the alphabet."""
    counts = Counter(answers)
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return {answer: number for number, answer in enumerate(ordered[:count])}


class AnswerShares:
    """Targets of VQA: the share of the ten people who gave each answer, float32 `(examples, classes)`.

    Kept as ten class numbers an example and spread when read: dense, those of VQA v2 would take gigabytes.

    Args:
        answers: ten per example; those outside `classes` give no share to any.
    """

    def __init__(self, answers: Sequence[Sequence[str]], classes: Mapping[str, int]) -> None:
        self.num_classes = len(classes)
        outside = self.num_classes
        numbers = [[classes.get(answer, outside) for answer in given] for given in answers]
        self.numbers = torch.from_numpy(np.array(numbers, dtype=np.int64).reshape(-1, NUM_ANSWERS))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Shares of some rows, `(rows, classes)`."""
        numbers = self.numbers[rows]
        counts = torch.zeros(len(numbers), self.num_classes + 1)
        counts.scatter_add_(1, numbers, torch.ones_like(numbers, dtype=torch.float32))
        return counts[:, :-1] / NUM_ANSWERS

    @property
    def answerable(self) -> Tensor:
        """Which examples have at least one answer among the classes, bool `(examples,)`."""
        return (self.numbers < self.num_classes).any(1)


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
