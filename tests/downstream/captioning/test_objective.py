"""The ICA loss against the Jaccard loss, its gradient, void maps; and the other terms by hand."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from attention.supervision import lovasz_hinge
from downstream.captioning.config import CaptionConfig
from downstream.captioning.correctness import THRESHOLDS, Correctness
from downstream.captioning.models.base import Told
from downstream.captioning.objective import (
    BorderName,
    CaptionObjective,
    doubly_stochastic,
    ica_loss,
    object_losses,
    word_losses,
)
from downstream.captioning.vocabulary import END, START
from downstream.data import Batch
from engine.ranks import Ranks

TOKENS = torch.tensor([[START, 5, 6, END], [START, 7, END, 0]])


def test_on_thresholded_errors_it_is_the_jaccard_loss() -> None:
    """Every pattern of +1 and -1 on six places against every mask: errors are 0 or 2, so half the hinge is 1 - IoU."""
    patterns = torch.tensor(list(itertools.product([0, 1], repeat=6)), dtype=torch.bool)
    truth = patterns[1:]
    for pattern in patterns:
        pred = pattern.expand_as(truth)
        jaccard = 1 - (pred & truth).sum(1) / (pred | truth).sum(1)
        loss = lovasz_hinge(2.0 * pred - 1, truth) / 2
        assert torch.allclose(loss, jaccard.float(), atol=1e-6)
        if int(pattern.sum()) == 3:  # as many above the mean as below: centring leaves it as it is
            assert torch.allclose(ica_loss(2.0 * pred + 4, truth.float()) / 2, jaccard.float(), atol=1e-6)


def test_a_map_that_is_right_by_a_margin_has_no_loss_and_a_shift_changes_none() -> None:
    coverage = torch.tensor([[0.9, 0.6, 0.2, 0.0]])
    energies = torch.tensor([[3.0, 3.0, -3.0, -3.0]])
    assert float(ica_loss(energies, coverage)) == 0
    some = torch.tensor([[0.3, -0.2, 0.5, 0.1]])
    assert float(ica_loss(some, coverage)) == pytest.approx(float(ica_loss(some + 7, coverage)), abs=1e-5)
    assert float(ica_loss(-energies, coverage)) == pytest.approx(4.0), "all wrong by 1 + 3"


def test_half_covered_cells_count_and_the_fullest_always() -> None:
    energies = torch.tensor([[0.4, -0.1, 0.2, -0.5]])
    whole = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert ica_loss(energies, torch.tensor([[0.5, 0.7, 0.49, 0.0]])).equal(ica_loss(energies, whole))
    assert ica_loss(energies, torch.tensor([[0.3, 0.1, 0.0, 0.0]])).equal(
        ica_loss(energies, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    )


def test_a_border_in_the_middle_asks_the_same_of_small_masks_as_of_large_ones() -> None:
    for cells in (1, 5, 9):
        coverage = torch.zeros(1, 10)
        coverage[:, :cells] = 1
        right = 2 * coverage + 5  # a gap of 2, anywhere
        assert float(ica_loss(right, coverage, border="middle")) == pytest.approx(0, abs=1e-6)
        assert float(ica_loss(-right, coverage, border="middle")) == pytest.approx(2)
        assert float(ica_loss(2 * coverage - 1, coverage, border="zero")) == 0
    whole = torch.ones(1, 10)
    some = torch.randn(1, 10)
    assert torch.equal(ica_loss(some, whole, border="middle"), ica_loss(some, whole)), "no outside: the mean"


@pytest.mark.parametrize("border", ["mean", "middle", "zero"])
def test_its_gradient_is_right(border: BorderName) -> None:
    torch.manual_seed(0)
    energies = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    coverage = torch.rand(4, 9, dtype=torch.float64)
    coverage[3] = 0
    assert torch.autograd.gradcheck(lambda e: ica_loss(e, coverage, border=border), energies)


def told_of(energies: Tensor) -> Told:
    maps = energies.flatten(2).softmax(2).view_as(energies)
    return Told(torch.zeros(*energies.shape[:2], 9), energies, maps)


@pytest.mark.parametrize("arm", ["ica", "ica_middle", "ica_zero", "kld", "mse", "nss", "lovasz"])
def test_void_masks_and_captions_without_objects_give_0_and_finite_gradients(arm: str) -> None:
    energies = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    coverage = torch.zeros(3, 2, 2, 2)
    coverage[0, 0, 0, 0] = coverage[2] = 1
    positions = torch.tensor([[0, 1], [1, -1], [-1, -1]])  # one object and a void one; a void one; none
    losses = object_losses(arm, told_of(energies), positions, coverage)
    assert losses[1:].tolist() == [0, 0]
    alone = object_losses(arm, told_of(energies[:1]), positions[:1, :1], coverage[:1, :1])
    assert torch.allclose(losses[:1], alone), "the void mask of the first caption does not enter its mean"
    losses.sum().backward()
    assert energies.grad is not None and torch.isfinite(energies.grad).all()
    assert (energies.grad[1:] == 0).all() and (energies.grad[0, 0] != 0).any()


def test_objects_are_averaged_in_a_caption_each_at_its_word() -> None:
    energies = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    coverage = torch.rand(1, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[2, 0]])
    expected = [ica_loss(energies[0, p].flatten()[None], coverage[0, j].flatten()[None]) for j, p in ((0, 2), (1, 0))]
    assert torch.allclose(object_losses("ica", told_of(energies), positions, coverage), sum(expected) / 2)
    middle = ica_loss(energies[0, 2].flatten()[None], coverage[0, 0].flatten()[None], border="middle")
    assert torch.allclose(object_losses("ica_middle", told_of(energies), positions[:, :1], coverage[:, :1]), middle)
    density, q = energies[0, 2].flatten().softmax(0), coverage[0, 0].flatten() / coverage[0, 0].sum()
    kld = (q * (q / density).log()).sum()
    found = object_losses("kld", told_of(energies), positions[:, :1], coverage[:, :1])
    assert torch.allclose(found, kld, atol=1e-5)


def test_words_and_the_doubly_stochastic_term_by_hand() -> None:
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    total, count = word_losses(logits, TOKENS)
    chosen = logits.log_softmax(2)
    by_hand = -(chosen[0, 0, 5] + chosen[0, 1, 6] + chosen[0, 2, END] + chosen[1, 0, 7] + chosen[1, 1, END])
    assert float(total) == pytest.approx(float(by_hand), abs=1e-4) and int(count) == 5
    maps = torch.rand(2, 3, 1, 2, generator=torch.Generator().manual_seed(1))
    sums = torch.stack([maps[0].sum(0), maps[1, :2].sum(0)])
    assert torch.allclose(doubly_stochastic(maps, TOKENS), (1 - sums).square().mean())


@dataclass
class HalfRanks(Ranks):
    """Two ranks, of which the other one has `other` words."""

    other: float

    def __post_init__(self) -> None:
        self.rank, self.world_size = 0, 2

    def mean(self, values: object) -> dict[str, float]:
        assert isinstance(values, dict)
        return {name: (float(value) + self.other) / 2 for name, value in values.items()}


class Fixed(torch.nn.Module):
    """Says the same of a caption whatever else is in its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: dict[str, Tensor]) -> Told:
        tokens = inputs["tokens"]
        base = torch.arange(9.0).sin() + tokens[:, :-1, None].cos() + inputs["features"][:, None]
        energies = (base[..., :4] * self.scale).unflatten(2, (2, 2))
        return Told(base * self.scale, energies, energies.flatten(2).softmax(2).view_as(energies))


def test_two_ranks_have_the_gradient_of_one() -> None:
    torch.manual_seed(0)
    rows = torch.tensor([[0], [1]])
    inputs = {"tokens": TOKENS, "features": torch.rand(2, 9), "positions": rows, "coverage": torch.rand(2, 1, 2, 2)}

    def gradient(part: slice, ranks: Ranks) -> float:
        module = Fixed()
        objective = CaptionObjective(module, "ica", CaptionConfig(), ranks, torch.device("cpu"))
        batch = Batch({name: value[part] for name, value in inputs.items()}, TOKENS[part])
        scalars = objective(batch, step=0, backward=lambda loss: loss.backward())  # type: ignore[arg-type, return-value]
        assert set(scalars) == {"loss", "words", "stochastic", "attention"} and module.scale.grad is not None
        return float(module.scale.grad)

    whole = gradient(slice(0, 2), Ranks())
    halves = [gradient(slice(0, 1), HalfRanks(other=2)), gradient(slice(1, 2), HalfRanks(other=3))]
    assert np.mean(halves) == pytest.approx(whole, rel=1e-5)


def test_correctness_of_attention_by_hand() -> None:
    found = Correctness()
    coverage = np.array([[1.0, 0.5], [0.0, 0.0]])
    found.add(np.array([[0.7, 0.1], [0.1, 0.1]]), coverage)  # hit; above 0.5: one of two cells
    found.add(np.array([[0.1, 0.1], [0.1, 0.7]]), coverage)  # miss
    found.add(np.full((2, 2), 0.25), np.zeros((2, 2)))  # void: no word
    metrics = found.metrics()
    assert metrics["attention/mass"] == pytest.approx((0.75 + 0.15) / 2)
    assert metrics["attention/mass_of_uniform"] == pytest.approx(0.375)
    assert metrics["attention/pointing"] == 0.5 and metrics["attention/words"] == 2
    # up to a threshold of 0.1 / 0.7 all cells are above: IoU 1/2 for both; beyond, 1/2 and 0
    assert metrics["attention/iou"] == 0.5 and metrics["attention/iou_threshold"] == pytest.approx(THRESHOLDS[0])
    assert Correctness().metrics() == {}
    merged = Correctness()
    merged.extend([found, found])
    assert merged.metrics() == pytest.approx({**metrics, "attention/words": 4})
