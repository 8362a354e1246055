"""What masks and tokens are worth to a trained model, as curves for the report."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from downstream.masks import keep_only_masks
from downstream.miner import probe
from downstream.models.text import PADDING
from downstream.protocol import AttentionModel, Examples, Inputs

MASK_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LONGEST_TEXT = 12  # a text of 12 tokens has 924 ways to keep six


def score_by_num_masks(
    model: AttentionModel,
    examples: Examples,
    rows: np.ndarray,
    *,
    modality: str,
    masks: Callable[[Inputs], Tensor],
    counts: Sequence[int] = MASK_COUNTS,
) -> dict[int, float]:
    """Mean best true-class score over `rows` when only the first n masks are tried, the unmasked input being one.

    Returns:
        n to score, for the `counts` that the examples' masks reach.
    """
    best: dict[int, list[float]] = {}
    for scores in _scores(model, examples, rows, modality=modality, masks=masks):
        running = scores.cummax(0).values
        for count in counts:
            if count <= len(running):
                best.setdefault(count, []).append(float(running[count - 1]))
    return {count: float(np.mean(values)) for count, values in best.items() if len(values) == len(rows)}


def score_by_num_tokens(
    model: AttentionModel, examples: Examples, rows: np.ndarray, *, kept: Sequence[int] = (1, 2, 3, 4, 5, 6)
) -> dict[int, float]:
    """Mean over texts of the best true-class score with only k tokens kept, every choice of k tried.

    Texts of more than `LONGEST_TEXT` tokens are left out: their choices are too many.

    Returns:
        k to score.
    """
    lengths = (examples.inputs(rows)["tokens"] != PADDING).sum(1).cpu().numpy()
    short = rows[lengths <= LONGEST_TEXT]
    found: dict[int, float] = {}
    for count in kept if len(short) else []:

        def masks(inputs: Inputs, count: int = count) -> Tensor:
            tokens = inputs["tokens"][0]
            return keep_only_masks(int((tokens != PADDING).sum()), num_kept=count, size=len(tokens))

        scores = _scores(model, examples, short, modality="text", masks=masks)
        found[count] = float(np.mean([float(s.max()) for s in scores]))
    return found


def _scores(
    model: AttentionModel,
    examples: Examples,
    rows: np.ndarray,
    *,
    modality: str,
    masks: Callable[[Inputs], Tensor],
) -> list[Tensor]:
    """Scores of every example's masks, in their order."""
    parts: dict[int, list[Tensor]] = {}
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in examples.inputs(rows).items()}
    targets = examples.targets[torch.from_numpy(rows)].to(device)
    for numbers, _, scores, _ in probe(model, inputs, targets, modality=modality, masks=masks):
        for number in numbers.unique().tolist():
            parts.setdefault(number, []).append(scores[numbers == number])
    return [torch.cat(parts[number]) for number in sorted(parts)]
