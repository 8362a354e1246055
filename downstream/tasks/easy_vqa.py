"""easy-VQA (Zhou, 2019): questions about one coloured shape, 13 answers; the data are in the package `easy-vqa`."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch

from downstream.config import DownstreamConfig
from downstream.protocol import Targets
from downstream.tasks.questions import AnswerSet, Part, Question, QuestionTask
from engine.errors import InputError
from engine.files import sha256_of

PACKAGE = "easy_vqa"


def open_easy_vqa(config: DownstreamConfig) -> QuestionTask:
    """The task; `data.path` is a folder in the package's layout, or `easy_vqa` for the installed package's own.

    Raises:
        InputError: the package or a file is missing, a question is no [text, answer, image], or its answer is not
            listed in answers.txt.
    """
    root = _root(config.data.path)
    classes = _classes(root / "answers.txt")
    parts = [_part(root, name, classes) for name in ("train", "test")]

    def targets(questions: list[Question], official: bool) -> Targets:
        return torch.tensor([classes[question.answers[0]] for question in questions])

    files = [root / name / "questions.json" for name in ("train", "test")]
    return QuestionTask(
        config,
        train=parts[0],
        test=parts[1],
        answers=lambda learnt: AnswerSet(classes, targets, lambda question: True),
        facts={"sha256": {file.parent.name: sha256_of(file)[:16] for file in files}},
        in_memory=True,
    )


def _root(path: Path) -> Path:
    if path.is_dir():
        return path
    if str(path) != PACKAGE:
        raise InputError(f"data.path {path} is no folder: give easy-VQA's data, or {PACKAGE} for the package's own")
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("easy-VQA needs the package easy-vqa: pip install -e '.[vqa]' (or: pip install easy-vqa)")
    return Path(spec.origin).parent / "data"


def _classes(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise InputError(f"{path} is missing: give data.path the data folder of easy-VQA")
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(set(names)) != len(names) or not names:
        raise InputError(f"{path} must list each answer once, one a line")
    return {name: number for number, name in enumerate(names)}


def _part(root: Path, name: str, classes: dict[str, int]) -> Part:
    path = root / name / "questions.json"
    try:
        rows = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} is missing: give data.path the data folder of easy-VQA") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    questions = []
    for number, row in enumerate(rows):
        if not (isinstance(row, list) and [type(value) for value in row] == [str, str, int]):
            raise InputError(f"{path}, entry {number}: {row!r} is no [question, answer, image number]")
        if row[1] not in classes:
            raise InputError(f"{path}, entry {number}: answer {row[1]!r} is not listed in {root / 'answers.txt'}")
        kind = "yes/no" if row[1] in ("yes", "no") else "other"  # as VQA has it; no answer here is a number
        questions.append(Question(f"{name}/{number:05d}", row[0], row[2], (row[1],), kind))
    return Part(name, questions, lambda image: root / name / "images" / f"{image}.png")
