"""NT-Xent by value: closed forms, lightly's loss, a float64 reference, and the same on 1 to 4 ranks."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightly.loss import NTXentLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.contrast import Exchange, nt_xent
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


def test_an_invalid_image_on_top_of_a_valid_one_spoils_nothing() -> None:
    """Its logit is 100 above all that count, far beyond what fp32's exp can hold."""
    first, second = torch.eye(8)[[0, 1, 0]].requires_grad_(), torch.eye(8)[[2, 3, 4]]
    valid = torch.tensor([True, True, False])
    nt_xent(first, second, temperature=0.01, valid=valid).backward()
    kept = first.detach()[valid].requires_grad_()
    nt_xent(kept, second[valid], temperature=0.01).backward()
    assert first.grad is not None and kept.grad is not None and kept.grad.norm() > 1
    torch.testing.assert_close(3 * first.grad[valid], 2 * kept.grad)


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


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("tile", [1, 24, 100, 10_000])
def test_tiles_change_nothing_and_bound_what_is_held(tile: int) -> None:
    """40 x 40 similarities in tiles; nothing larger than a tile or the embeddings is ever made, backward included."""
    first, second = (z.requires_grad_() for z in views(20, 3))
    valid = torch.arange(20) != 4
    with Largest() as largest:
        found = nt_xent(first, second, temperature=0.2, valid=valid, tile=tile)
        gradients = torch.autograd.grad(found, (first, second))
    assert largest.numel <= max(tile, 40 * 3) or tile > 1600
    kept = [z[valid] for z in (first, second)]
    expected = reference(kept[0], kept[1], 0.2) * 19 / 20
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (first, second)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_single_precision_is_right_to_its_last_digits(temperature: float) -> None:
    """fp32 against fp64, also where exp(1 / T) is far beyond fp32: value and gradient (by norm) within 1e-6."""
    exact = [z.requires_grad_() for z in views(150, 32)]
    single = [z.detach().float().requires_grad_() for z in exact]
    found, expected = (nt_xent(z[0], z[1], temperature=temperature) for z in (single, exact))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = (torch.cat(torch.autograd.grad(loss, z)) for loss, z in ((found, single), (expected, exact)))
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()


CASES = ("even", "uneven", "uneven, some invalid", "one rank without images")


def part_of_rank(case: str, rank: int, world_size: int) -> slice:
    """Which of the 12 images a rank holds."""
    if case == "even":
        sizes = [12 // world_size] * world_size
    elif case == "one rank without images":
        sizes = [0] + [1] * (world_size - 2) + [14 - world_size]
    else:
        sizes = [1 + 2 * r for r in range(world_size - 1)]
        sizes.append(12 - sum(sizes))
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def case_mask(case: str) -> Tensor | None:
    return torch.arange(12) % 5 != 0 if case == "uneven, some invalid" else None


def rank_losses(rank: int, world_size: int) -> dict[str, Any]:
    """Per case and loss: the mean over ranks, and this rank's gradient as DDP would average it."""
    results = {}
    for case in CASES:
        part, mask = part_of_rank(case, rank, world_size), case_mask(case)
        losses: dict[str, Any] = {
            "ours": lambda a, b, m=mask, p=part: nt_xent(a, b, temperature=0.3, valid=None if m is None else m[p]),
            "ours in tiles": lambda a, b, m=mask, p=part: nt_xent(
                a, b, temperature=0.3, valid=None if m is None else m[p], tile=7
            ),
        }
        if case == "even":
            losses["lightly"] = NTXentLoss(temperature=0.3, gather_distributed=True)
            losses["ours, told"] = lambda a, b: nt_xent(a, b, temperature=0.3, exchange=Exchange.equal(2 * len(a)))
        for name, function in losses.items():
            first, second = (z[part].clone().requires_grad_() for z in views(12))
            loss = function(first, second)
            # each rank scales its loss as a gradient scaler would
            gradients = torch.autograd.grad(8 * loss, (first, second))
            total = loss.detach().clone()
            dist.all_reduce(total)
            results[f"{case}/{name}"] = (total.item() / world_size, [g.div(8 * world_size).tolist() for g in gradients])
    return results


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_equal_the_definition(world_size: int) -> None:
    """Value and gradient of the global batch, whoever holds how much of it; and lightly's, where it can."""
    results = run_distributed(rank_losses, world_size, timeout=300)
    for case in CASES:
        first, second = (z.requires_grad_() for z in views(12))
        mask = case_mask(case)
        kept = torch.ones(12, dtype=torch.bool) if mask is None else mask
        expected = reference(first[kept], second[kept], 0.3) * kept.sum() / 12
        expected_gradients = torch.autograd.grad(expected, (first, second))
        names = [name for name in results[0] if name.startswith(case + "/")]
        assert len(names) == (4 if case == "even" else 2)
        for name in names:
            for rank in results:
                assert rank[name][0] == pytest.approx(expected.item(), rel=1e-6)
            for view in range(2):
                rows = [torch.tensor(rank[name][1][view], dtype=torch.float64).view(-1, 8) for rank in results]
                torch.testing.assert_close(torch.cat(rows), expected_gradients[view], rtol=1e-6, atol=1e-12)
