"""Miniature question-answering sets in the layouts of VQA v1 and v2, easy-VQA and VQA-HAT."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def colour_image(path: Path, colour: str, *, size: int = 48) -> None:
    """A grey image with a coloured square, its place given by the file's name."""
    image = np.full((size, size, 3), 128, dtype=np.uint8)
    place = sum(path.stem.encode()) % (size // 2)
    image[place : place + size // 3, place : place + size // 3] = COLOURS[colour]
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1])


def write_vqa(root: Path, *, version: str = "v2", train: int = 20, test: int = 8) -> Path:
    """Two questions on each image in the official files; question numbers are the image's times ten, plus 0 or 1."""
    prefix = {"v1": "", "v2": "v2_"}[version]
    for subset, count, first in (("train2014", train, 100), ("val2014", test, 900)):
        questions: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in range(first, first + count):
            colour = sorted(COLOURS)[image % 3]
            colour_image(root / subset / f"COCO_{subset}_{image:012d}.jpg", colour)
            asked = (("What colour is the square?", colour), (f"Is it {sorted(COLOURS)[image // 3 % 3]}?", None))
            for turn, (text, answer) in enumerate(asked):
                truth = answer or ("yes" if text == f"Is it {colour}?" else "no")
                number = 10 * image + turn
                questions.append({"image_id": image, "question": text, "question_id": number})
                annotations.append(annotation(number, image, [truth] * 9 + ["maybe"]))
        common = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
        write(root / f"{prefix}OpenEnded_mscoco_{subset}_questions.json", {**common, "questions": questions})
        write(root / f"{prefix}mscoco_{subset}_annotations.json", {**common, "annotations": annotations})
    return root


def annotation(question: int, image: int, answers: list[str]) -> dict[str, Any]:
    """One official annotation."""
    given = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, start=1)]
    answer_type = "yes/no" if answers[0] in ("yes", "no") else "other"
    kind = {"question_type": "what", "answer_type": answer_type, "multiple_choice_answer": answers[0]}
    return {"question_id": question, "image_id": image, "answers": given, **kind}


def change(path: Path, key: str, entry: int, **values: Any) -> None:
    """Change fields of one entry of an official file."""
    content = json.loads(path.read_text())
    content[key][entry].update(values)
    write(path, content)


def write_easy(root: Path, *, train: int = 24, test: int = 9) -> Path:
    """A small set in the layout of the package easy-vqa: one question on each image."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "answers.txt").write_text("\n".join([*COLOURS, "yes", "no"]) + "\n")
    for part, count in (("train", train), ("test", test)):
        rows = []
        for image in range(count):
            colour = sorted(COLOURS)[image % 3]
            colour_image(root / part / "images" / f"{image}.png", colour, size=32)
            rows.append(["what color is the shape?", colour, image])
        write(root / part / "questions.json", rows)
    return root


def write_human_maps(folder: Path, questions: list[int], *, people: int = 2, size: tuple[int, int] = (30, 40)) -> Path:
    """VQA-HAT's files: a bright spot on black for each of some people."""
    folder.mkdir(parents=True, exist_ok=True)
    for question in questions:
        for person in range(1, people + 1):
            spot = np.zeros(size, dtype=np.uint8)
            cv2.circle(spot, (size[1] // (1 + person), size[0] // 2), 8, 255, -1)
            cv2.imwrite(str(folder / f"{question}_{person}.png"), cv2.GaussianBlur(spot, (0, 0), 3))
    return folder


def write(path: Path, content: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(content))
