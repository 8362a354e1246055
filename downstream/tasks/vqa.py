"""The VQA data sets on COCO images (Antol et al. 2015, v1; Goyal et al. 2017, v2) in their official files.

Trained on train2014, tested on val2014: answers of the test images are not public.
"""

import json
from pathlib import Path
from typing import Any

from downstream.config import DownstreamConfig
from downstream.protocol import Targets
from downstream.tasks.answers import NUM_ANSWERS, AnswerShares, as_compared, most_frequent, normalise
from downstream.tasks.questions import AnswerSet, Part, Question, QuestionTask, check_skipped
from engine.errors import InputError
from engine.files import sha256_of

TRAIN, TEST = "train2014", "val2014"
PREFIX = {"v1": "", "v2": "v2_"}


def open_vqa(config: DownstreamConfig) -> QuestionTask:
    """The task. `data.path` holds the question and annotation files under their official names.

    Raises:
        InputError: a file is missing or not in the official format, or too many questions have to be skipped.
    """
    images = config.vqa.images or config.data.path
    if config.vqa.features is None and not images.is_dir():
        raise InputError(f"vqa.images {images} is no folder: it must hold {TRAIN}/ and {TEST}/ with COCO's images")
    files = {name: official_files(config, name) for name in (TRAIN, TEST)}
    unanswered: dict[str, int] = {}
    parts = {}
    for name, (questions_file, annotations_file) in files.items():
        questions, unanswered[name] = read_questions(questions_file, annotations_file, name=name)
        counts = {f"fewer than {NUM_ANSWERS} answers": unanswered[name]}
        check_skipped(counts, of=len(questions) + unanswered[name], part=name, config=config)
        parts[name] = Part(name, questions, lambda image, name=name: images / name / image_name(name, image))  # type: ignore[misc]
    return QuestionTask(
        config,
        train=parts[TRAIN],
        test=parts[TEST],
        answers=lambda learnt: answer_set(learnt, count=config.vqa.num_answers),
        facts={
            "version": config.vqa.version,
            "without_ten_answers": unanswered,
            "sha256": {file.name: sha256_of(file)[:16] for pair in files.values() for file in pair},
        },
        in_memory=False,
    )


def official_files(config: DownstreamConfig, name: str) -> tuple[Path, Path]:
    """Question and annotation file of one subset."""
    prefix, root = PREFIX[config.vqa.version], config.data.path
    return (
        root / f"{prefix}OpenEnded_mscoco_{name}_questions.json",
        root / f"{prefix}mscoco_{name}_annotations.json",
    )


def image_name(subset: str, number: int) -> str:
    """COCO's file name of an image."""
    return f"COCO_{subset}_{number:012d}.jpg"


def read_questions(questions_file: Path, annotations_file: Path, *, name: str) -> tuple[list[Question], int]:
    """Questions with ten answers, in the file's order, and how many have fewer.

    Args:
        name: of the subset, in front of each question's number in its key.

    Raises:
        InputError: missing, no JSON, not in the official format, or a question number given twice.
    """
    annotated = {
        entry["question_id"]: entry
        for entry in _entries(annotations_file, "annotations", {"question_id": int, "answers": list})
    }
    kept: dict[int, Question] = {}
    few = 0
    wanted = {"question_id": int, "image_id": int, "question": str}
    for entry in _entries(questions_file, "questions", wanted):
        number = entry["question_id"]
        annotation = annotated.get(number, {})
        given = [answer.get("answer") for answer in annotation.get("answers", []) if isinstance(answer, dict)]
        answers = [answer for answer in given if isinstance(answer, str)]
        if number in kept:
            raise InputError(f"{questions_file}: question {number} stands there twice")
        if len(answers) != NUM_ANSWERS:
            few += 1
            continue
        kind = str(annotation.get("answer_type") or "unknown")
        kept[number] = Question(f"{name}/{number}", entry["question"], entry["image_id"], tuple(answers), kind)
    return list(kept.values()), few


def answer_set(learnt: list[Question], *, count: int) -> AnswerSet:
    """The most frequent normalised answers of the training questions, all ten of each counted."""
    normalised = {question.key: [normalise(answer) for answer in question.answers] for question in learnt}
    classes = most_frequent((a for answers in normalised.values() for a in answers if a), count=count)

    def targets(questions: list[Question], official: bool) -> Targets:
        if official:
            return AnswerShares([as_compared(question.answers) for question in questions], classes)
        return AnswerShares([normalised[question.key] for question in questions], classes)

    def answerable(question: Question) -> bool:
        answers = normalised.get(question.key) or as_compared(question.answers)
        return any(answer in classes for answer in answers)

    return AnswerSet(classes, targets, answerable)


def _entries(path: Path, key: str, fields: dict[str, type]) -> list[dict[str, Any]]:
    """The list under `key` of an official file, each entry with `fields`."""
    if not path.is_file():
        raise InputError(f"{path} is missing: give data.path the folder of VQA's files, and vqa.version their release")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} has no list '{key}': is it an official VQA file?")
    for number, entry in enumerate(entries):
        wrong = [f for f, kind in fields.items() if not isinstance(entry, dict) or type(entry.get(f)) is not kind]
        if wrong:
            raise InputError(f"{path}, entry {number} of '{key}': '{wrong[0]}' is missing or of the wrong type")
    return entries
