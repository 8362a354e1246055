"""Diagnostics against closed forms and definitions; and that looking changes nothing."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from engine.program import parse_config
from pretrain.config import AttentionConfig, Config
from pretrain.diagnostics import alignment, describe_embeddings, embedding_rank, gradient_norms, uniformity
from pretrain.trainer import train
from tests.pretrain.launched import make_batch, make_config, make_student, one_step
from tests.tools import run_distributed


def rows(count: int, dim: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_alignment_of_equal_opposite_and_orthogonal_views() -> None:
    x = rows(5, 6)
    assert alignment(x, 3 * x).item() == pytest.approx(0, abs=1e-12)
    assert alignment(x, -x).item() == pytest.approx(4)
    eye = torch.eye(4)
    assert alignment(eye, eye.roll(1, 0)).item() == pytest.approx(2)


def test_uniformity_of_one_point_two_poles_and_an_orthogonal_frame() -> None:
    assert uniformity(torch.ones(6, 3)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.tensor([[2.0, 0], [-1.0, 0]])).item() == pytest.approx(-8)
    assert uniformity(torch.eye(5)).item() == pytest.approx(-4)
    x = rows(7, 3)
    unit = [row / row.norm() for row in x]
    pairs = [math.exp(-2 * float((a - b).square().sum())) for i, a in enumerate(unit) for b in unit[:i]]
    assert uniformity(x).item() == pytest.approx(math.log(sum(pairs) / len(pairs)))


def test_rank_of_known_spectra() -> None:
    assert embedding_rank(torch.eye(7)).item() == pytest.approx(7, rel=1e-5)
    assert embedding_rank(rows(20, 1) @ rows(1, 8)).item() == pytest.approx(1, rel=1e-4)
    assert embedding_rank(5 * torch.eye(6)[:, :3]).item() == pytest.approx(3, rel=1e-5)
    for shape in ((30, 8), (8, 30)):
        x = rows(*shape)
        p = torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum()
        assert embedding_rank(x).item() == pytest.approx(math.exp(float(-(p * p.log()).sum())), rel=1e-5)


@pytest.mark.parametrize("x", [torch.zeros(4, 3), torch.zeros(0, 3), torch.full((4, 3), math.nan)])
def test_rank_of_nothing_is_no_number(x: Tensor) -> None:
    assert math.isnan(embedding_rank(x).item())


def rank_description(rank: int, world_size: int) -> dict[str, float]:
    part = slice(rank * 4, rank * 4 + 4)
    found = describe_embeddings(rows(8, 5)[part], rows(8, 5, seed=1)[part], valid=torch.arange(8)[part] != 6)
    return {name: value.item() for name, value in found.items()}


def test_embeddings_of_all_ranks_are_described_together() -> None:
    """Two ranks of four images, one unreadable, on every rank as one process of the other seven."""
    keep = torch.arange(8) != 6
    first, second = rows(8, 5)[keep], rows(8, 5, seed=1)[keep]
    expected = {
        "alignment": alignment(first, second).item(),
        "uniformity": (uniformity(first).item() + uniformity(second).item()) / 2,
        "embedding_rank": embedding_rank(torch.cat([first, second])).item(),
    }
    for found in run_distributed(rank_description, 2):
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("arm", ["contrastive+attention", "supervised+attention"])
def test_the_gradient_ratio_is_that_of_the_losses_gradients_on_the_trunk(arm: Any) -> None:
    """Against two whole steps: without attention, and with it."""
    config = make_config(arm=arm, diagnostics_every=1)
    batch = make_batch(10, num_views=config.num_views)
    scalars, both = one_step(config, batch, Accelerator(cpu=True))
    silent = replace(config, attention=replace(config.attention, weight=0.0))
    without, main = one_step(silent, batch, Accelerator(cpu=True))

    def norm(gradients: dict[str, Tensor]) -> float:
        return torch.cat([g.flatten() for name, g in gradients.items() if name.startswith("backbone.")]).norm().item()

    expected = norm({name: both[name] - main[name] for name in both}) / norm(main)
    assert expected > 1e-3
    assert scalars["gradient_ratio"] == pytest.approx(expected, rel=1e-3)
    assert without["gradient_ratio"] == 0


def test_the_norms_are_taken_without_a_trace() -> None:
    """No gradient, running statistic or random number is touched; dropout and batch norm are at work."""
    config = make_config(norm="batch")
    config.model.backbone_options.update(drop_path_rate=0.5)
    student = make_student(config).train()
    before = {name: value.clone() for name, value in student.state_dict().items() if "num_batches" not in name}
    images = torch.randn(6, 3, 32, 32)
    state = torch.get_rng_state()
    found = gradient_norms(student, images, lambda output: {"square": output.features.square().mean()})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(torch.equal(student.state_dict()[name], value) for name, value in before.items())
    loss = student(images).features.square().mean()
    expected = torch.autograd.grad(loss, list(student.backbone.parameters()))
    assert found["square"].item() == pytest.approx(torch.nn.utils.get_total_norm(expected).item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"optim__micro_batch": 5}, {"model__gradient_checkpointing": True}])
def test_a_run_is_the_same_with_and_without_looking(
    student_config: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    """Every loss bit for bit, and the diagnostics in the metrics of the steps that are due."""
    lines = {}
    for every in (0, 2):
        path = student_config(
            run=f"every{every}", max_steps=5, diagnostics_every=every, attention__stages=[1], **options
        )
        run = train(parse_config(Config, argv=["--config", str(path)])[0])
        lines[every] = list(run.metrics())
    names = ("loss", "nt_xent", "attention")
    for one, other in zip(lines[0], lines[2], strict=True):
        assert [one[f"train/{name}"] for name in names] == [other[f"train/{name}"] for name in names]
        due = other["step"] in (2, 4)
        for name in ("alignment", "uniformity", "embedding_rank", "gradient_ratio"):
            assert (f"train/{name}" in other) == due and f"train/{name}" not in one
    last = lines[2][3]
    assert 0 < last["train/alignment"] < 4 and -8 < last["train/uniformity"] < 0
    assert 1 <= last["train/embedding_rank"] <= 16 and last["train/gradient_ratio"] > 0


def test_a_half_precision_gradient_does_not_vanish() -> None:
    """A loss whose fp16 gradients lie below the least fp16 number has the norm that fp32 gives."""
    student = make_student(make_config(attention=AttentionConfig(channels=8))).half()
    images = torch.randn(4, 3, 32, 32).half()

    def norm(scale: float) -> float:
        found = gradient_norms(student, images, lambda output: {"loss": scale * output.features.float().sum()})
        return found["loss"].item()

    assert norm(1e-8) == pytest.approx(1e-3 * norm(1e-5), rel=0.1)
