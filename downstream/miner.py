"""The surrogate miner: which mask lets the trained model see best, and what it attends to then (Patro et al., 2021)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from downstream.protocol import AttentionModel, Inputs


@dataclass
class Surrogates:
    """What was mined for some examples, in their order.

    Attributes:
        maps: attention densities `(examples, *positions)` under each example's best mask.
        best: number of that mask, int64 `(examples,)`; 0 is the unmasked input.
        scores: true-class score with it, `(examples,)` in [0, 1].
        unmasked: true-class score without any mask, `(examples,)`.
    """

    maps: Tensor
    best: Tensor
    scores: Tensor
    unmasked: Tensor


def true_class_score(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax probability of the true class, `(batch,)`; with answer shares as targets, their weighted mean."""
    probabilities = logits.float().softmax(1)
    if targets.dim() == 1:
        return probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
    return (probabilities * targets).sum(1) / targets.sum(1).clamp(min=1e-8)


@torch.inference_mode()
def mine(
    model: AttentionModel,
    inputs: Inputs,
    targets: Tensor,
    *,
    modality: str,
    masks: Callable[[Inputs], Tensor],
    max_rows: int = 2048,
) -> Surrogates:
    """Probe every example of a batch with its masks, and keep the attention under the best.

    The encoder runs once per example; masked copies of its output run through the rest of the model, `max_rows` at a
    time, filled from as many examples as fit. Deterministic: of equal scores the first mask wins.

    Args:
        model: in evaluation mode.
        inputs: of a batch, on the model's device.
        targets: `(batch,)` classes or `(batch, classes)` answer shares.
        modality: whose features are masked, and whose map is kept.
        masks: gives the masks `(masks, *positions)` of one example from its inputs of one row.
        max_rows: masked copies in memory at once.

    Raises:
        ValueError: the model gives scores that are not finite.
    """
    count = len(targets)
    state: Surrogates | None = None
    for rows, chosen, scores, maps in probe(model, inputs, targets, modality=modality, masks=masks, max_rows=max_rows):
        if state is None:
            state = Surrogates(
                maps=maps.new_zeros((count, *maps.shape[1:])),
                best=chosen.new_zeros(count),
                scores=scores.new_full((count,), -1.0),
                unmasked=scores.new_zeros(count),
            )
        _keep_best(state, rows, chosen, scores, maps)
    assert state is not None, "a batch has at least one example, and an example at least one mask"
    return state


@torch.inference_mode()
def probe(
    model: AttentionModel,
    inputs: Inputs,
    targets: Tensor,
    *,
    modality: str,
    masks: Callable[[Inputs], Tensor],
    max_rows: int = 2048,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Every probe of a batch, at most `max_rows` at a time; arguments and errors as in `mine`.

    Yields:
        Example numbers, mask numbers, true-class scores, all `(probes,)`, and maps `(probes, *positions)`.
    """
    features, settled = model.settle(model.encode(inputs), inputs, modality=modality)
    for rows, chosen, keep in _probes(inputs, len(targets), masks, max_rows=max_rows, device=targets.device):
        copies = {name: value[rows] for name, value in features.items()}
        copies[modality] = copies[modality] * keep.unsqueeze(-1).to(copies[modality].dtype)
        found = model.attend(copies, {name: value[rows] for name, value in settled.items()})
        scores = true_class_score(found.logits, targets[rows])
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("the probed model gives scores that are not finite: train it again with a lower rate")
        yield rows, chosen, scores, found.maps[modality].float()


def _probes(
    inputs: Inputs, count: int, masks: Callable[[Inputs], Tensor], *, max_rows: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows, mask numbers and masks of at most `max_rows` probes at a time, in order."""
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []
    num_waiting = 0
    for row in range(count):
        own = masks({name: value[row : row + 1] for name, value in inputs.items()}).to(device)
        numbers = torch.arange(len(own), device=device)
        for part, keep in zip(numbers.split(max_rows), own.split(max_rows), strict=True):
            if num_waiting + len(part) > max_rows:
                yield _joined(waiting)
                waiting, num_waiting = [], 0
            waiting.append((torch.full_like(part, row), part, keep))
            num_waiting += len(part)
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    rows, numbers, keep = (torch.cat(column) for column in zip(*parts, strict=True))
    return rows, numbers, keep


def _keep_best(state: Surrogates, rows: Tensor, chosen: Tensor, scores: Tensor, maps: Tensor) -> None:
    """Update each example with the best of its probes among these; the first of equal ones."""
    first = chosen == 0
    state.unmasked[rows[first]] = scores[first]
    # by row, then by falling score, then by mask number: the first line of each row is its best
    order = torch.argsort(chosen, stable=True)
    order = order[torch.argsort(-scores[order], stable=True)]
    order = order[torch.argsort(rows[order], stable=True)]
    sorted_rows = rows[order]
    is_head = torch.ones_like(sorted_rows, dtype=torch.bool)
    is_head[1:] = sorted_rows[1:] != sorted_rows[:-1]
    heads = order[is_head]
    better = scores[heads] > state.scores[rows[heads]]
    heads = heads[better]
    state.maps[rows[heads]] = maps[heads]
    state.best[rows[heads]] = chosen[heads]
    state.scores[rows[heads]] = scores[heads]
