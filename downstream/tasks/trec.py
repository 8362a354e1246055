"""TREC question classification: six coarse classes, official split."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downstream.config import TextConfig
from downstream.masks import pair_masks
from downstream.models.text import PADDING, UNKNOWN, SelfAttentiveText, TransformerText
from downstream.protocol import AttentionModel, Examples, Inputs
from engine.errors import InputError
from engine.files import sha256_of

CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
LINE = re.compile(r"(\w+):\S+\s*(.*)")


@dataclass
class TextExamples:
    """Texts as token numbers `(examples, tokens)`, padded with 0."""

    keys: Sequence[str]
    words: list[list[str]]
    tokens: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def inputs(self, rows: np.ndarray) -> Inputs:
        """Tokens of some rows, all padded to the longest text of the data set."""
        return {"tokens": self.tokens[torch.from_numpy(rows)]}

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.tokens.device

    def to(self, device: torch.device) -> "TextExamples":
        """The same examples on `device`."""
        return replace(self, tokens=self.tokens.to(device), targets=self.targets.to(device))


class Trec:
    """TREC-6 with 10 % of the training set held out to choose the epoch.

    The vocabulary is that of the training texts alone; words seen once in them are read as unknown, so that the
    unknown word is trained too.

    Args:
        path: folder with `TREC.train` and `TREC.test`, lines `COARSE:fine question` in Latin-1.
        seed: of the held-out split, fixed for all runs of a table.

    Raises:
        InputError: a file is missing, a line has no known class, or a text is empty.
    """

    def __init__(self, path: Path, model: TextConfig, *, seed: int = 0) -> None:
        train, test = (_read(path / name) for name in ("TREC.train", "TREC.test"))
        order = np.random.default_rng(seed).permutation(len(train))
        held = len(train) // 10
        parts = {"held_out": sorted(order[:held].tolist()), "train": sorted(order[held:].tolist())}
        texts = {name: [train[i] for i in rows] for name, rows in parts.items()} | {"test": test}
        counts = Counter(word for words, _ in texts["train"] for word in words)
        known = sorted(word for word, count in counts.items() if count >= model.min_count)
        self.vocabulary = {word: number for number, word in enumerate(known, start=UNKNOWN + 1)}
        self.size = max(len(words) for part in texts.values() for words, _ in part)
        self.model = model
        self.train: Examples = self._examples("train", texts["train"])
        self.held_out: Examples = self._examples("held_out", texts["held_out"])
        self.test: Examples = self._examples("test", texts["test"])
        self.modalities: dict[str, tuple[int, ...]] = {"text": (self.size,)}
        self.facts: dict[str, Any] = {
            "sizes": {name: len(part) for name, part in texts.items()},
            "held_out_seed": seed,
            "vocabulary": len(self.vocabulary),
            "test_texts_in_train": len({tuple(w) for w, _ in test} & {tuple(w) for w, _ in train}),
            "sha256": {name: sha256_of(path / name)[:16] for name in ("TREC.train", "TREC.test")},
        }

    def build_model(self) -> AttentionModel:
        """The config's text model from random weights, or with word vectors from a GloVe file."""
        model, size = self.model, len(self.vocabulary) + UNKNOWN + 1
        if model.kind == "transformer":
            return TransformerText(
                size,
                num_classes=len(CLASSES),
                tokens=self.size,
                width=model.width,
                depth=model.depth,
                heads=model.heads,
                dropout=model.dropout,
            )
        network = SelfAttentiveText(
            size, num_classes=len(CLASSES), embedding=model.embedding, hidden=model.hidden, dropout=model.dropout
        )
        if model.vectors is not None:
            _load_vectors(network.embed.weight, model.vectors, self.vocabulary)
        return network

    def masks(self, modality: str, inputs: Inputs) -> Tensor:
        """Every masking of two words of a text of one row, behind the unmasked one."""
        tokens = inputs["tokens"][0]
        return pair_masks(int((tokens != PADDING).sum()), size=len(tokens))

    def _examples(self, name: str, texts: list[tuple[list[str], int]]) -> TextExamples:
        tokens = torch.full((len(texts), self.size), PADDING, dtype=torch.int64)
        for row, (words, _) in enumerate(texts):
            tokens[row, : len(words)] = torch.tensor([self.vocabulary.get(word, UNKNOWN) for word in words])
        targets = torch.tensor([label for _, label in texts])
        return TextExamples([f"{name}/{i:05d}" for i in range(len(texts))], [w for w, _ in texts], tokens, targets)


def _read(path: Path) -> list[tuple[list[str], int]]:
    if not path.is_file():
        raise InputError(f"{path} is missing: give data.path the folder of TREC.train and TREC.test")
    texts = []
    for number, line in enumerate(path.read_text("latin-1").splitlines(), start=1):
        if not line.strip():
            continue
        found = LINE.fullmatch(line.strip())
        if found is None or found[1] not in CLASSES:
            raise InputError(f"{path}, line {number}: no 'COARSE:fine question' of a class {', '.join(CLASSES)}")
        words = found[2].lower().split()
        if not words:
            raise InputError(f"{path}, line {number}: an empty question; remove the line")
        texts.append((words, CLASSES.index(found[1])))
    return texts


def _load_vectors(weight: Tensor, path: Path, vocabulary: dict[str, int]) -> None:
    """Put word vectors of a GloVe text file (`word v1 v2 ...` a line) into the rows of an embedding."""
    if not path.is_file():
        raise InputError(f"model.vectors {path} is missing: give a GloVe text file, or null")
    found = 0
    with open(path, encoding="utf-8") as file, torch.no_grad():
        for number, line in enumerate(file, start=1):
            word, *values = line.rstrip().split(" ")
            if word in vocabulary:
                if len(values) != weight.shape[1]:
                    raise InputError(
                        f"{path}, line {number}: {len(values)} numbers, model.embedding is {weight.shape[1]}"
                    )
                weight[vocabulary[word]] = torch.tensor([float(v) for v in values])
                found += 1
    if not found:
        raise InputError(f"{path} knows none of the {len(vocabulary)} words: is it a GloVe text file?")
