"""Attention losses that supervise any map: analytic cases, references, gradients, masked positions."""

import math

import pytest
import torch
from torch import Tensor

from attention.adversary import Adversary
from attention.supervision import SUPERVISION, coral, deep_coral, lovasz_hinge, mmd, supervise


def densities(*shape: int, seed: int = 0) -> Tensor:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    return values / values.flatten(1).sum(1).view(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("name", sorted(SUPERVISION))
def test_padding_neither_counts_nor_gets_a_gradient(name: str) -> None:
    pred, target = densities(3, 6, seed=1), densities(3, 6, seed=2)
    mask = torch.ones(3, 6, dtype=torch.bool)
    padded = [torch.cat([x, torch.full((3, 4), 7.0, dtype=x.dtype)], 1).requires_grad_() for x in (pred, target)]
    wide = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
    value = supervise(name, *padded, mask=wide)
    if name != "deep_coral":  # it divides by the number of positions, padding included, as all samples share it
        assert torch.allclose(value, supervise(name, pred, target, mask=mask), rtol=1e-9)
    (gradient,) = torch.autograd.grad(value.sum(), padded[0])
    assert (gradient[:, 6:] == 0).all() and gradient[:, :6].abs().sum() > 0


@pytest.mark.parametrize("name", sorted(set(SUPERVISION) - {"lovasz"}))
def test_gradients_in_float64(name: str) -> None:
    pred, target = densities(4, 5, seed=3).requires_grad_(), densities(4, 5, seed=4)
    assert torch.autograd.gradcheck(lambda p: supervise(name, p, target), (pred,))


@pytest.mark.parametrize("name", sorted(set(SUPERVISION) - {"nss", "lovasz"}))
def test_equal_maps_cost_nothing_and_a_batch_of_one_works(name: str) -> None:
    maps = densities(5, 4, 4)
    assert supervise(name, maps, maps).abs().max() < 1e-9
    alone = supervise(name, maps[:1], maps[1:2])
    assert alone.shape == (1,) and torch.isfinite(alone).all()


def test_mse_does_not_depend_on_the_grid() -> None:
    """A half of the map twice as likely as uniform and the other half empty: squared distance 1 to uniform anywhere."""
    for side in (2, 8):
        pred = torch.zeros(1, side, side, dtype=torch.float64)
        pred[:, : side // 2] = 2 / side**2
        assert supervise("mse", pred, torch.full_like(pred, 1 / side**2)).item() == pytest.approx(1)


def test_coral_is_a_quarter_of_the_covariances_distance() -> None:
    pred, target = densities(6, 3, seed=5), densities(6, 3, seed=6)
    mask = torch.ones(6, 3, dtype=torch.bool)
    distance = (torch.cov((3 * pred).t()) - torch.cov((3 * target).t())).square().sum()
    assert torch.allclose(coral(pred, target, mask), (distance / 4).expand(6))
    assert torch.allclose(deep_coral(pred, target, mask), (distance / (4 * 9)).expand(6))
    assert coral(pred[:1], target[:1], mask[:1]).item() == 0


def test_mmd_of_far_clusters_and_of_shuffled_batches() -> None:
    mask = torch.ones(8, 3, dtype=torch.bool)
    pred, target = densities(8, 3, seed=7), densities(8, 3, seed=8)
    assert mmd(pred, pred.flip(0), mask).max() < 1e-12, "sets are compared, not pairs"
    assert supervise("mmd_pairs", pred, pred.flip(0)).min() > 0.01
    kernel = [math.exp(-1 / w) for w in (0.25, 0.5, 1, 2, 4)]
    one = supervise("mmd", torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert one.item() == pytest.approx(2 - 2 * sum(kernel) / 5), "distance 2 in units of the target's squared norm, 1"
    assert torch.isfinite(supervise("mmd", pred, target)).all()


def test_lovasz_hinge_is_the_jaccard_loss_on_thresholded_errors() -> None:
    """Where scores are -1 or 1 the errors are 0 or 2, and the loss is twice the Jaccard loss."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        labels = torch.rand(1, 9, generator=generator) < 0.5
        guess = torch.rand(1, 9, generator=generator) < 0.5
        labels[0, 0] = True
        loss = lovasz_hinge(torch.where(guess, 1.0, -1.0).double(), labels)
        jaccard = 1 - (labels & guess).sum() / (labels | guess).sum()
        assert loss.item() == pytest.approx(2 * jaccard.item())


def test_nan_targets_wrong_shapes_and_unknown_names_are_refused() -> None:
    maps = densities(2, 4)
    with pytest.raises(ValueError, match="not finite"):
        supervise("mse", maps, maps.index_fill(0, torch.tensor([0]), math.nan))
    with pytest.raises(ValueError, match="share a shape"):
        supervise("mse", maps, densities(2, 5))
    with pytest.raises(ValueError, match="'mze' is not known: take from"):
        supervise("mze", maps, maps)


@pytest.mark.parametrize("positions", [(6,), (8, 8)])
def test_the_adversary_learns_to_tell_maps_apart_and_teaches_the_model(positions: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    adversary = Adversary(positions, rate=1e-2)
    given = torch.full((16, *positions), 1e-3)
    given.flatten(1)[:, 0] = 1
    given = given / given.flatten(1).sum(1).view(-1, *[1] * len(positions))
    logits = torch.zeros(16, *positions, requires_grad=True)

    def predicted() -> Tensor:
        return logits.flatten(1).softmax(1).view_as(logits)

    losses = [adversary.learn(given, predicted()).item() for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0] and adversary(given).min() > adversary(predicted()).max()
    before = adversary.loss(predicted()).mean()
    (gradient,) = torch.autograd.grad(before, logits)
    with torch.no_grad():
        logits -= 20 * gradient / gradient.abs().max()
    assert adversary.loss(predicted()).mean() < before
    assert not list(adversary.parameters()), "the model's optimiser must not touch the discriminator"


def test_an_adversary_goes_on_from_its_state_bit_by_bit() -> None:
    torch.manual_seed(1)
    first, second = Adversary((5,)), Adversary((5,))
    given, predicted = densities(4, 5, seed=1).float(), densities(4, 5, seed=2).float()
    first.learn(given, predicted)
    second.load_state_dict(first.state_dict())
    for adversary in (first, second):
        adversary.learn(given, predicted)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    paper = Adversary((5,), orientation="paper")
    assert (paper.loss(predicted) <= 0).all(), "log(1 - D) is never positive"
