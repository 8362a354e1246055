"""NT-Xent, attention losses, metrics and the objective's gradient on the device, by value; NT-Xent's memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightly.loss import NTXentLoss
from torch import Tensor
from torch.nn import functional

from attention import losses, metrics
from attention.ranks import spearman
from engine.settings import OptimConfig
from pretrain.contrast import Exchange, nt_xent
from pretrain.diagnostics import describe_embeddings
from tests.cuda.conftest import DEVICE, only_cpu
from tests.pretrain.launched import make_batch, make_config, one_step

TEMPERATURES = (0.01, 0.1, 1.0)
ROWS, COLUMNS, DIM = 512, 131_072, 128


def views(batch: int, dim: int, *, dtype: Any = torch.float64) -> list[Tensor]:
    drawn = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [view.to(dtype).requires_grad_() for view in drawn]


def there(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    return [tensor.detach().to(device).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("lost", [False, True])
def test_nt_xent_is_right_to_its_last_digits(device: torch.device, temperature: float, lost: bool) -> None:
    """float64 to 1e-10 of the CPU's; fp32 to 2e-6 in value and, by norm, in gradient; also with unreadable images."""
    exact = views(150, 32)
    valid = torch.arange(150) % 7 != 3 if lost else None
    expected = nt_xent(*exact, temperature=temperature, valid=valid)
    gradient = torch.cat(torch.autograd.grad(expected, exact))
    for dtype, value, slope in ((torch.float64, 1e-10, 1e-10), (torch.float32, 2e-6, max(2e-6, 4e-8 / temperature))):
        ours = there(views(150, 32, dtype=dtype), device)
        mask = valid.to(device) if valid is not None else None
        found = nt_xent(*ours, temperature=temperature, valid=mask)
        assert found.item() == pytest.approx(expected.item(), rel=value)
        moved = torch.cat(torch.autograd.grad(found, ours)).cpu()
        assert (moved - gradient).norm() < slope * gradient.norm()


@pytest.mark.parametrize("tile", [1000, None])
def test_nt_xent_is_lightlys(device: torch.device, tile: int | None) -> None:
    ours, theirs = (there(views(300, 128, dtype=torch.float32), device) for _ in range(2))
    found, expected = nt_xent(*ours, temperature=0.1, tile=tile), NTXentLoss(temperature=0.1)(*theirs)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    for one, other in zip(torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs), strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nt_xent_under_autocast_is_computed_in_full(device: torch.device, dtype: torch.dtype) -> None:
    ours = there(views(64, 16, dtype=dtype), device)
    with torch.autocast(device.type, dtype=dtype):
        found = nt_xent(*ours, temperature=0.05)
    assert found.dtype == torch.float32
    full = nt_xent(*(view.float() for view in ours), temperature=0.05)
    torch.testing.assert_close(found, full, rtol=1e-6, atol=0)


class Others(Exchange):
    """Embeddings of other ranks that have arrived already, and stand behind the place of this rank's."""

    everyone: Tensor

    def gather(self, rows: Tensor) -> Tensor:
        if rows.shape[1] != DIM:  # log-sum-exps and weights: as if the others' were this rank's
            return torch.cat([rows, rows[:1].expand(COLUMNS - ROWS, *rows.shape[1:])])
        self.everyone[: len(rows)] = rows
        return self.everyone


@pytest.mark.skipif(DEVICE != "cuda", reason="counts the bytes of the GPU's allocator")
def test_nt_xents_memory_is_a_tenth_of_the_full_matrix(device: torch.device) -> None:
    """512 x 131,072 x 128, forward and backward: what is held beside the gathered columns, which are inputs."""
    first, second = (torch.randn(ROWS // 2, DIM, device=device).requires_grad_() for _ in range(2))
    exchange = Others((ROWS,) * (COLUMNS // ROWS))
    others = functional.normalize(torch.randn(COLUMNS, DIM, device=device), dim=1)
    object.__setattr__(exchange, "everyone", others)
    full = 4 * ROWS * COLUMNS

    def peak() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        nt_xent(first, second, temperature=0.1, exchange=exchange).backward()
        return torch.cuda.max_memory_allocated() - before

    peak()  # the libraries' workspaces
    assert full / 1000 < peak() < full / 10


def test_attention_losses(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(12, 14, 14, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.rand(12, 14, 14, generator=generator, dtype=torch.float64) ** 4
    mask = torch.arange(12) % 5 != 0
    weights = {"kld": 1.0, "nss": 0.3, "cc": 0.5, "mse": 0.2, "bce": 0.1}
    for kind in ("soft", "top"):
        options: dict[str, Any] = {"weights": weights, "nss_target": kind}
        expected, parts = losses.weighted_loss(logits, target, mask=mask, **options)
        (gradient,) = torch.autograd.grad(expected, logits)
        ours = logits.detach().to(device).requires_grad_()
        found, terms = losses.weighted_loss(ours, target.to(device), mask=mask.to(device), **options)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-12)
        for name, value in terms.items():
            torch.testing.assert_close(value.cpu(), parts[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(found, ours)[0].cpu(), gradient, rtol=1e-7, atol=1e-12)
    sampled = losses.nss_weights(target.to(device), kind="sampled")
    torch.testing.assert_close(sampled.sum((1, 2)).cpu(), torch.ones(12, dtype=torch.float64))
    assert (sampled.cpu()[target == 0] == 0).all()


def test_metrics(device: torch.device) -> None:
    """Every metric at once; among the maps a constant one, a broken one, and one without fixations."""
    generator = torch.Generator().manual_seed(3)
    prediction, target = torch.rand(2, 8, 30, 40, generator=generator, dtype=torch.float64) ** 3
    prediction[1], prediction[2, 0, 0] = 1.0, torch.nan
    points = torch.rand(8, 20, 2, generator=generator, dtype=torch.float64) * torch.tensor([40.0, 30.0])
    valid = torch.rand(8, 20, generator=generator) < 0.8
    valid[3] = False
    negatives = torch.rand(50, 2, generator=generator, dtype=torch.float64) * torch.tensor([40.0, 30.0])
    material = {"target": target, "fixations": points, "valid": valid, "negatives": negatives, "baseline": target[0]}
    expected = metrics.evaluate_maps(prediction, **material)
    found = metrics.evaluate_maps(prediction.to(device), **{name: value.to(device) for name, value in material.items()})
    assert found.keys() == expected.keys() and len(found) >= 8
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-8, atol=1e-10, equal_nan=True, msg=name)
    ranks = spearman(prediction.to(device), target.to(device)).cpu()
    torch.testing.assert_close(ranks, spearman(prediction, target), equal_nan=True)


def test_embeddings_are_described_alike(device: torch.device) -> None:
    first, second = (view.detach() for view in views(40, 16))
    valid = torch.arange(40) != 7
    expected = describe_embeddings(first, second, valid=valid)
    found = describe_embeddings(first.to(device), second.to(device), valid=valid.to(device))
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("arm", ["contrastive", "contrastive+attention", "supervised+attention"])
def test_the_objectives_gradient_whole_and_in_parts(device: torch.device, arm: Any) -> None:
    """Of an encoder without batch statistics: parts of 5 of 12 images, and the CPU, by norm of each tensor.

    The pixels take the float path on a GPU and the uint8 path on a CPU; the colours here leave both as they are.
    """
    config = make_config(arm=arm, diagnostics_every=1)
    batch = make_batch(12, num_views=config.num_views)
    scalars, whole = one_step(config, batch, Accelerator(cpu=device.type == "cpu"))
    found, moved = one_step(replace(config, optim=OptimConfig(micro_batch=5)), batch, Accelerator())
    with only_cpu():
        expected, gradient = one_step(config, batch, Accelerator(cpu=True))
    looked = {"alignment", "uniformity", "embedding_rank", "gradient_ratio"}  # at the first part alone
    assert {k: v for k, v in found.items() if k not in looked} == pytest.approx(
        {k: v for k, v in scalars.items() if k not in looked}, rel=1e-4
    )
    assert scalars == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for name, value in gradient.items():
        assert (moved[name] - whole[name]).norm() <= 1e-4 * whole[name].norm() + 1e-6, name
        assert (whole[name] - value).norm() <= 2e-3 * value.norm() + 1e-6, name
