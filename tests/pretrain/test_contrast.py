"""NT-Xent by value: closed forms, lightly's loss, a float64 reference, and the same on 1, 2 and 3 ranks."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightly.loss import NTXentLoss
from torch import Tensor

from pretrain.contrast import nt_xent
from tests.tools import run_distributed


def views(batch: int, dim: int = 8, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, batch, dim, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


def reference(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The definition, pair by pair."""
    rows = [z / z.norm() for z in torch.cat([first, second])]
    batch, total = len(first), torch.zeros((), dtype=torch.float64)
    for i in range(2 * batch):
        j = (i + batch) % (2 * batch)
        denominator = sum(torch.exp(rows[i] @ rows[k] / temperature) for k in range(2 * batch) if k != i)
        total = total - torch.log(torch.exp(rows[i] @ rows[j] / temperature) / denominator)
    return total / (2 * batch)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_equals_the_definition_and_lightly(temperature: float) -> None:
    first, second = views(7)
    found = nt_xent(first, second, temperature=temperature)
    torch.testing.assert_close(found, reference(first, second, temperature), rtol=1e-9, atol=0)
    theirs = NTXentLoss(temperature=temperature)(first, second)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=0)


def test_closed_forms() -> None:
    """Identical embeddings: log(2N - 1). One image: 0, there is nothing to confuse it with."""
    same = torch.ones(5, 4)
    assert nt_xent(same, same, temperature=0.3).item() == pytest.approx(math.log(9), rel=1e-6)
    assert nt_xent(same[:1], same[:1], temperature=0.3).item() == pytest.approx(0, abs=1e-6)


def test_an_invalid_image_is_neither_anchor_nor_negative() -> None:
    first, second = views(6)
    valid = torch.tensor([True, True, False, True, True, False])
    found = nt_xent(first, second, temperature=0.2, valid=valid)
    kept = nt_xent(first[valid], second[valid], temperature=0.2)
    torch.testing.assert_close(found * 6, kept * 4)
    first.requires_grad_()
    nt_xent(first, second, temperature=0.2, valid=valid).backward()
    assert first.grad is not None and first.grad[2].abs().sum() == 0 and first.grad[0].abs().sum() > 0


def test_gradient_in_float64() -> None:
    first, second = (z.requires_grad_() for z in views(4, 5))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, temperature=0.5), (first, second))


def test_half_precision_is_computed_in_full() -> None:
    first, second = (z.to(torch.bfloat16) for z in views(16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nt_xent(first, second, temperature=0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, nt_xent(first.float(), second.float(), temperature=0.1))


def test_views_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        nt_xent(torch.ones(3, 4), torch.ones(2, 4), temperature=0.1)


def rank_loss(rank: int, world_size: int, masked: bool) -> tuple[float, Any]:
    """Mean loss over ranks and this rank's gradient, as DDP would average it."""
    first, second = views(12)
    valid = torch.arange(12) % 5 != 0 if masked else None
    share = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    a, b = first[share].clone().requires_grad_(), second[share].clone().requires_grad_()
    loss = nt_xent(a, b, temperature=0.3, valid=None if valid is None else valid[share])
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert a.grad is not None
    return total.item() / world_size, (a.grad / world_size).tolist()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_equal_one_process(world_size: int, masked: bool) -> None:
    results = run_distributed(rank_loss, world_size, masked)
    first, second = (z.requires_grad_() for z in views(12))
    valid = torch.arange(12) % 5 != 0 if masked else None
    loss = nt_xent(first, second, temperature=0.3, valid=valid)
    loss.backward()
    assert first.grad is not None
    for value, _ in results:
        assert value == pytest.approx(loss.item(), rel=1e-9)
    gradient = torch.cat([torch.tensor(g, dtype=torch.float64) for _, g in results])
    torch.testing.assert_close(gradient, first.grad, rtol=1e-6, atol=1e-12)
