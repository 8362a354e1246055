"""The surrogate miner: which mask lets the trained model see best, and what it attends to then (Patro et al., 2021)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from downstream.protocol import AttentionModel, Inputs

# Bytes of features that are masked at once. A forward takes some ten times as much: on a CPU about its cache, on a GPU
# about 3 GB, so that a dozen processes share one. Fixed, not what is free, so that results do not depend on it.
PROBE_BYTES = {"cpu": 2**22, "cuda": 2**28}


@dataclass
class Surrogates:
    """What was mined for some examples, in their order.

    Attributes:
        maps: attention densities `(examples, *positions)` under each example's best mask.
        best: number of that mask, int64 `(examples,)`; 0 is the unmasked input.
        scores: true-class score with it, `(examples,)` in [0, 1].
        unmasked: true-class score without any mask, `(examples,)`.
        own: attention densities without any mask, `(examples, *positions)`.
    """

    maps: Tensor
    best: Tensor
    scores: Tensor
    unmasked: Tensor
    own: Tensor


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
    max_rows: int = 0,
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
        max_rows: masked copies in memory at once; 0 takes what fits into `PROBE_BYTES` of the device.

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
                own=maps.new_zeros((count, *maps.shape[1:])),
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
    max_rows: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Every probe of a batch, at most `max_rows` at a time; arguments and errors as in `mine`.

    Yields:
        Example numbers, mask numbers, true-class scores, all `(probes,)`, and maps `(probes, *positions)`.
    """
    features, settled = model.settle(model.encode(inputs), inputs, modality=modality)
    most = max_rows or rows_in_budget(features)
    for rows, chosen, keep, only in _probes(inputs, len(targets), masks, max_rows=most, device=targets.device):
        copies, others = (_copies(of, rows, only) for of in (features, settled))
        copies[modality] = copies[modality] * keep.unsqueeze(-1).to(copies[modality].dtype)
        found = model.attend(copies, others)
        scores = true_class_score(found.logits, targets[rows])
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("the probed model gives scores that are not finite: train it again with a lower rate")
        yield rows, chosen, scores, found.maps[modality].float()


def rows_in_budget(features: Mapping[str, Tensor]) -> int:
    """Masked copies of `features` `(batch, ...)` that fit into the budget of the device that they are on."""
    row = sum(value[:1].numel() * value.element_size() for value in features.values())
    budget = PROBE_BYTES.get(next(iter(features.values())).device.type, PROBE_BYTES["cpu"])
    return max(budget // max(row, 1), 1)


def _copies(tensors: Mapping[str, Tensor], rows: Tensor, only: int | None) -> dict[str, Tensor]:
    """Each tensor once for every probe; in no memory of its own where all probes are of the one example `only`."""
    if only is None:
        return {name: value[rows] for name, value in tensors.items()}
    return {name: value[only].expand(len(rows), *value.shape[1:]) for name, value in tensors.items()}


def _probes(
    inputs: Inputs, count: int, masks: Callable[[Inputs], Tensor], *, max_rows: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor, int | None]]:
    """Rows, mask numbers and masks of at most `max_rows` probes at a time, in order, and the row if they share one."""
    waiting: list[tuple[int, Tensor, Tensor]] = []
    num_waiting = 0
    last: Tensor | None = None
    for row in range(count):
        given = masks({name: value[row : row + 1] for name, value in inputs.items()})
        if given is not last:  # most tasks give the same masks for all their examples
            last, own = given, given.to(device)
        numbers = torch.arange(len(own), device=device)
        for part, keep in zip(numbers.split(max_rows), own.split(max_rows), strict=True):
            if num_waiting + len(part) > max_rows:
                yield _joined(waiting)
                waiting, num_waiting = [], 0
            waiting.append((row, part, keep))
            num_waiting += len(part)
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, int | None]:
    rows = torch.cat([torch.full_like(numbers, row) for row, numbers, _ in parts])
    numbers, keep = (torch.cat([part[i] for part in parts]) for i in (1, 2))  # type: ignore[misc]
    return rows, numbers, keep, parts[0][0] if len(parts) == 1 else None


def _keep_best(state: Surrogates, rows: Tensor, chosen: Tensor, scores: Tensor, maps: Tensor) -> None:
    """Update each example with the best of its probes among these; the first of equal ones."""
    first = chosen == 0
    state.unmasked[rows[first]] = scores[first]
    state.own[rows[first]] = maps[first]
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
