"""A trained model's attention against that of people: the VQA human-attention set (VQA-HAT, Das et al. 2016)."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from attention.maps import is_constant, to_density
from attention.ranks import spearman
from attention.transport import emd
from downstream.hat_config import HatConfig
from downstream.protocol import AttentionModel, Examples
from downstream.stage import best_weights, read_stage_config
from downstream.tasks.registry import open_task
from engine.errors import InputError
from engine.launch import build_accelerator
from engine.progress import report
from engine.runs import RunFolder
from shards.decode import MAX_MAP_SIDE, image_size

FILE = re.compile(r"(\d+)_(\d+)\.png")


@dataclass(frozen=True)
class Agreement:
    """How a model's attention agrees with people's.

    Attributes:
        correlation: Spearman's, mean over people and then over questions, in [-1, 1].
        distance: earth mover's distance on the unit square, the same means.
        num_questions, num_maps: what the means are over.
        skipped: reason to the number of human maps that were left out for it.
    """

    correlation: float
    distance: float
    num_questions: int
    num_maps: int
    skipped: dict[str, int]


def evaluate_run(config: HatConfig) -> Agreement:
    """Compare a finished run's image attention with human maps, and write the result into its `summary.json`.

    Raises:
        InputError: POT is missing, no finished run of question answering there, or no usable map for any of its test
            questions.
    """
    if find_spec("ot") is None:
        raise InputError("the earth mover's distance needs POT: pip install -e '.[vqa]' (or: pip install POT)")
    run = RunFolder(config.run)
    settings = read_stage_config(run)
    if not run.read_summary():
        raise InputError(f"{run.path} is not finished: train it to its end first")
    accelerator = build_accelerator(precision=settings.precision)
    task = open_task(settings)
    if "image" not in task.modalities or "text" not in task.modalities:
        raise InputError(f"{run.path} learnt '{settings.task}': human maps are for question answering (task vqa)")
    model = task.build_model()
    assert isinstance(model, AttentionModel)
    model.load_state_dict(best_weights(run))
    model.to(accelerator.device).eval()
    files, others = human_files(config.maps, {_question(key) for key in task.test.keys})
    found = compare(model, task.test, files, grid=config.grid, batch_size=config.batch_size, device=accelerator.device)
    found = replace(found, skipped={**others, **found.skipped})
    _write(run, found, config)
    return found


def _write(run: RunFolder, found: Agreement, config: HatConfig) -> None:
    metrics = {
        "hat/rank_correlation": found.correlation,
        "hat/emd": found.distance,
        "hat/questions": found.num_questions,
        "hat/maps": found.num_maps,
    }
    facts = {"grid": config.grid, "skipped": found.skipped, "part": "test"}
    run.write_summary(metrics, step=int(run.read_summary()["step"]), hat=facts)
    left_out = ", ".join(f"{count} {reason}" for reason, count in found.skipped.items()) or "none"
    report(
        f"{run.name}: rank correlation {found.correlation:.4f}, EMD {found.distance:.4f} over {found.num_questions} "
        f"questions ({found.num_maps} human maps; skipped: {left_out})"
    )


def human_files(folder: Path, questions: set[str]) -> tuple[dict[str, list[Path]], dict[str, int]]:
    """Files `<question>_<n>.png` by question, and how many others there are, by reason.

    Raises:
        InputError: no folder, or no file for any of the questions.
    """
    if not folder.is_dir():
        raise InputError(f"maps {folder} is no folder: give that of VQA-HAT's <question>_<n>.png")
    files: dict[str, list[Path]] = {}
    skipped: Counter[str] = Counter()
    for path in sorted(folder.glob("*.png")):
        name = FILE.fullmatch(path.name)
        if name is None:
            skipped["odd file name"] += 1
        elif name[1] not in questions:
            skipped["of no test question"] += 1
        else:
            files.setdefault(name[1], []).append(path)
    if not files:
        raise InputError(f"{folder} has no <question>_<n>.png of the run's test questions ({dict(skipped)})")
    return files, dict(skipped)


def read_human_map(path: Path, *, grid: int) -> Tensor:
    """A human map of any size as a density `(grid, grid)`: resized bilinearly with anti-aliasing, sum 1.

    Raises:
        ValueError: unreadable, or constant; the message is the reason in two words.
    """
    data = path.read_bytes()
    try:
        if max(image_size(data)) > MAX_MAP_SIDE:
            raise ValueError("unreadable map")
    except ValueError as error:
        raise ValueError("unreadable map") from error
    grey = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)
    if grey is None:
        raise ValueError("unreadable map")
    small = to_grid(torch.from_numpy(grey)[None].float(), grid=grid)
    # asked before resizing too: its rounding would make a map of something else than one value
    if grey.min() == grey.max() or bool(is_constant(small)[0]):
        raise ValueError("constant map")
    return to_density(small)[0]


def to_grid(maps: Tensor, *, grid: int) -> Tensor:
    """Maps `(batch, height, width)` at `(batch, grid, grid)`."""
    if maps.shape[1:] == (grid, grid):
        return maps
    resized = functional.interpolate(maps[:, None], size=(grid, grid), mode="bilinear", antialias=True)
    return resized[:, 0].clamp(min=0)


def compare(
    model: AttentionModel,
    examples: Examples,
    files: Mapping[str, list[Path]],
    *,
    grid: int = 14,
    batch_size: int = 64,
    device: Any = "cpu",
) -> Agreement:
    """Agreement over the questions that have at least one usable human map.

    Args:
        examples: with keys `<subset>/<question>`.
        files: human maps by question.

    Raises:
        InputError: no map can be used.
    """
    skipped: Counter[str] = Counter()
    correlations, distances = [], []
    num_maps = 0
    for row, density in _attention(model, examples, files, grid=grid, batch_size=batch_size, device=device):
        human = []
        for path in files[_question(examples.keys[row])]:
            try:
                human.append(read_human_map(path, grid=grid))
            except ValueError as error:
                skipped[str(error)] += 1
        if human:
            theirs = torch.stack(human)
            ours = density.expand_as(theirs)
            correlations.append(float(spearman(ours, theirs).mean()))
            distances.append(float(emd(ours, theirs, grid=(grid, grid)).mean()))
            num_maps += len(human)
    if not correlations:
        raise InputError(f"none of the {sum(map(len, files.values()))} human maps can be used: {dict(skipped)}")
    return Agreement(
        float(np.mean(correlations)), float(np.mean(distances)), len(correlations), num_maps, dict(skipped)
    )


@torch.inference_mode()
def _attention(
    model: AttentionModel, examples: Examples, files: Mapping[str, Any], *, grid: int, batch_size: int, device: Any
) -> Iterator[tuple[int, Tensor]]:
    """Row and image attention `(grid, grid)` of every example in `files`."""
    rows = np.array([row for row, key in enumerate(examples.keys) if _question(key) in files], dtype=np.int64)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        inputs = {name: value.to(device) for name, value in examples.inputs(part).items()}
        maps = to_density(to_grid(model(inputs).maps["image"].float().cpu(), grid=grid))
        yield from zip(part.tolist(), maps, strict=True)


def _question(key: str) -> str:
    return key.rsplit("/", 1)[-1]
