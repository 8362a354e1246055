"""Questions about images with their answers: words, vocabulary, a held-out tenth of the images, and the model."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downstream.config import DownstreamConfig
from downstream.data import limited
from downstream.masks import grid_masks, pair_masks
from downstream.models.text import PADDING, UNKNOWN
from downstream.models.vqa import QuestionAnswering, SmallTrunk
from downstream.protocol import AttentionModel, Examples, Inputs, Targets
from downstream.tasks.features import encoder_features
from downstream.tasks.pictures import ImagesInMemory, ImagesOnDisk, Pictures, map_shape, ready_features, shown
from engine.errors import InputError
from engine.progress import report, silent
from engine.ranks import Ranks

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        key: unique in its data set.
        image: the image's number.
        answers: what was answered, one or ten times.
        kind: the official answer type ("yes/no", "number", "other"), or "" where there is none.
    """

    key: str
    text: str
    image: int
    answers: tuple[str, ...]
    kind: str = ""

    @property
    def words(self) -> list[str]:
        """The words in lower case, without punctuation."""
        return _WORD.findall(self.text.lower())


@dataclass(frozen=True)
class Part:
    """Questions of one part of a data set, and where their images are: number to file, and the part's official name."""

    name: str
    questions: list[Question]
    files: Callable[[int], Path]


@dataclass
class QuestionExamples:
    """Questions as token numbers `(examples, tokens)`, padded with 0, the rows of their images, their answer types."""

    keys: Sequence[str]
    words: list[list[str]]
    tokens: Tensor
    pictures: Pictures
    rows: np.ndarray
    targets: Targets
    kinds: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def inputs(self, rows: np.ndarray) -> Inputs:
        """Tokens and images, or their features, of some rows."""
        return {"tokens": self.tokens[torch.from_numpy(rows)], **self.pictures.inputs(self.rows[rows])}

    @property
    def device(self) -> torch.device:
        """Where the questions are; images too large for memory come from disk all the same."""
        return self.tokens.device

    def to(self, device: torch.device) -> "QuestionExamples":
        """The same examples on `device`."""
        pictures = self.pictures.to(device) if isinstance(self.pictures, ImagesInMemory) else self.pictures
        targets = self.targets.to(device) if isinstance(self.targets, Tensor) else self.targets
        return replace(self, tokens=self.tokens.to(device), pictures=pictures, targets=targets)

    @property
    def images(self) -> "_Images":
        """uint8 image of each example, for the report.

        Raises:
            AttributeError: only features are at hand.
        """
        if map_shape(self.pictures) is not None:
            raise AttributeError("only features of the images are at hand")
        return _Images(self)


@dataclass
class _Images:
    examples: QuestionExamples

    def __getitem__(self, row: int) -> Tensor:
        images = shown(self.examples.pictures, self.examples.rows[row : row + 1])
        assert images is not None
        return images[0]


class QuestionTask:
    """Questions about images, with a tenth of the training images (and all questions on them) held out.

    Vocabulary of the questions and answers that are classes come from the training questions alone.

    Args:
        train, test: `data.limit` takes a random part of the training questions.
        answers: from the training questions that are left, gives the classes and what makes targets of questions;
            the flag says whether the official evaluation's rules hold (held-out and test).
        facts: of the source: hashes.
        in_memory: whether all images fit into memory.

    Raises:
        InputError: no questions, or more than `vqa.max_skipped` of them have to be skipped.
    """

    def __init__(
        self,
        config: DownstreamConfig,
        *,
        train: Part,
        test: Part,
        answers: Callable[[list[Question]], "AnswerSet"],
        facts: dict[str, Any],
        in_memory: bool,
    ) -> None:
        self.config = config
        self.in_memory = in_memory
        chosen = limited(train.questions, config)
        train_pictures, kept, skipped = self._open(train, chosen)
        test_pictures, tested, test_skipped = self._open(test, test.questions)
        learnt, held = _split_by_image(kept, seed=config.data.held_out_seed)
        answer_set = answers(learnt)
        answerable = [question for question in learnt if answer_set.answerable(question)]
        if not answerable:
            raise InputError(f"{config.data.path}: no training question has an answer among the classes")
        self.vocabulary = _vocabulary(answerable, min_count=config.vqa.min_count)
        self.size = max(len(question.words) for question in answerable)
        self.classes = answer_set.classes
        self.train: Examples = self._examples(answerable, train_pictures, answer_set.targets(answerable, False))
        self.held_out: Examples = self._examples(held, train_pictures, answer_set.targets(held, True))
        self.test: Examples = self._examples(tested, test_pictures, answer_set.targets(tested, True))
        self.channels, grid = self._grid(train_pictures, test_pictures)
        self.modalities: dict[str, tuple[int, ...]] = {"image": grid, "text": (self.size,)}
        image = config.image
        self.grid_masks = grid_masks(grid, count=image.num_masks, scale=image.mask_scale, seed=image.mask_seed)
        self.facts: dict[str, Any] = {
            "sizes": {"train": len(answerable), "held_out": len(held), "test": len(tested)},
            "held_out_seed": config.data.held_out_seed,
            "limit": config.data.limit,
            "vocabulary": len(self.vocabulary),
            "classes": len(self.classes),
            "skipped": {"train": skipped, "test": test_skipped},
            "train_without_class": len(learnt) - len(answerable),
            "test_without_class": sum(not answer_set.answerable(question) for question in tested),
            "test_texts_cut": sum(len(question.words) > self.size for question in tested),
            **facts,
        }

    def build_model(self) -> AttentionModel:
        """The question-answering network from random weights."""
        vqa = self.config.vqa
        small = map_shape(self.train.pictures) is None  # type: ignore[attr-defined]
        return QuestionAnswering(
            len(self.vocabulary) + UNKNOWN + 1,
            num_classes=len(self.classes),
            channels=self.channels,
            trunk=SmallTrunk(self.channels) if small else None,
            look=vqa.look,
            embedding=vqa.embedding,
            lstm=vqa.lstm,
            width=vqa.width,
            glimpses=vqa.glimpses,
            hidden=vqa.hidden,
            dropout=vqa.dropout,
        )

    def masks(self, modality: str, inputs: Inputs) -> Tensor:
        """The same grids for every image; for a question of one row, every masking of two words."""
        if modality == "image":
            return self.grid_masks
        tokens = inputs["tokens"][0]
        return pair_masks(int((tokens != PADDING).sum()), size=len(tokens))

    def _open(self, part: Part, questions: list[Question]) -> tuple[Pictures, list[Question], dict[str, int]]:
        """Images of a part, its questions that can be asked, and how many of the others there are, by reason."""
        spoken = [question for question in questions if question.words]
        pictures = self._pictures(part, {question.image for question in spoken})
        kept = [question for question in spoken if question.image in pictures.places]
        skipped = {"empty_text": len(questions) - len(spoken), "no_image": len(spoken) - len(kept)}
        check_skipped(skipped, of=len(questions), part=part.name, config=self.config)
        if not kept:
            raise InputError(f"{self.config.data.path}: no question of {part.name} can be asked")
        return pictures, kept, skipped

    def _pictures(self, part: Part, numbers: set[int]) -> Pictures:
        config = self.config
        if config.vqa.features is not None:
            return ready_features(config.vqa.features, part.name)
        files = {number: part.files(number) for number in numbers}
        if config.image.encoder is not None:
            return encoder_features(files, subset=part.name, config=config)
        if config.image.size % 8:
            raise InputError(f"image.size {config.image.size}: the small network needs a multiple of 8")
        return (ImagesInMemory if self.in_memory else ImagesOnDisk)(files, size=config.image.size)

    def _grid(self, train: Pictures, test: Pictures) -> tuple[int, tuple[int, int]]:
        """Channels and size of the feature map."""
        shape, other = map_shape(train), map_shape(test)
        if shape != other:
            raise InputError(f"feature maps of the training images are {shape}, of the test images {other}: make both")
        if shape is not None:
            return shape[0], (shape[1], shape[2])
        side = self.config.image.size // 8
        return self.config.image.channels, (side, side)

    def _examples(self, questions: list[Question], pictures: Pictures, targets: Targets) -> QuestionExamples:
        # a question longer than any in training is cut: the model has never seen its end
        words = [question.words[: self.size] for question in questions]
        tokens = torch.full((len(questions), self.size), PADDING, dtype=torch.int64)
        for row, text in enumerate(words):
            tokens[row, : len(text)] = torch.tensor([self.vocabulary.get(word, UNKNOWN) for word in text])
        rows = np.array([pictures.places[question.image] for question in questions], dtype=np.int64)
        keys, kinds = [question.key for question in questions], [question.kind for question in questions]
        return QuestionExamples(keys, words, tokens, pictures, rows, targets, kinds)


@dataclass(frozen=True)
class AnswerSet:
    """Answers that are classes.

    Attributes:
        classes: answer to class number.
        targets: targets of questions; the flag asks for those of the official evaluation.
        answerable: whether a question has an answer among the classes, to learn from.
    """

    classes: Mapping[str, int]
    targets: Callable[[list[Question], bool], Targets]
    answerable: Callable[[Question], bool]


def check_skipped(skipped: Mapping[str, int], *, of: int, part: str, config: DownstreamConfig) -> None:
    """Report questions that had to be skipped, and stop where they are too many.

    Raises:
        InputError: more than `vqa.max_skipped` of all.
    """
    total = sum(skipped.values())
    if not total:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count)
    if total > config.vqa.max_skipped * of:
        raise InputError(
            f"{config.data.path}: {total} of {of} questions of {part} cannot be used ({reasons}); complete the data, "
            f"or raise vqa.max_skipped {config.vqa.max_skipped:g}"
        )
    (report if Ranks().is_main else silent)(f"{part}: {total} of {of} questions skipped ({reasons})")


def _vocabulary(questions: list[Question], *, min_count: int) -> dict[str, int]:
    """Word to token number, in the alphabet's order behind padding and the unknown word."""
    counts = Counter(word for question in questions for word in question.words)
    known = sorted(word for word, count in counts.items() if count >= min_count)
    return {word: number for number, word in enumerate(known, start=UNKNOWN + 1)}


def _split_by_image(questions: list[Question], *, seed: int) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions: those on a tenth of the images, so that no image is in both."""
    numbers = sorted({question.image for question in questions})
    order = np.random.default_rng(seed).permutation(len(numbers))
    held = {numbers[i] for i in order[: max(len(numbers) // 10, 1)]}
    learnt = [question for question in questions if question.image not in held]
    return learnt, [question for question in questions if question.image in held]
