"""The student's loss by value, and its gradient on several ranks against one process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from attention.losses import weighted_loss
from attention.maps import crop_mass, warp
from engine.settings import OptimConfig
from pretrain.config import AttentionConfig
from pretrain.contrast import nt_xent
from pretrain.model import input_statistics
from pretrain.objective import Objective, attention_objective
from tests.pretrain.launched import batch_of, join, make_batch, make_config, make_student, one_step, part_of
from tests.tools import run_distributed

ARMS = ("contrastive+attention", "supervised+attention")
STEPS: list[tuple[Any, int]] = [*((arm, 0) for arm in ARMS), ("co-train", 0), ("co-train", 2)]  # arm, micro_batch
IMAGES = 12


def rank_step(rank: int, world_size: int) -> dict[tuple[Any, int], Any]:
    results = {}
    for arm, size in STEPS:
        config = make_config(arm=arm, optim=OptimConfig(micro_batch=size))
        part = part_of(batch_of(config, IMAGES), rank, world_size)
        scalars, moved = one_step(config, part, join(rank, world_size, zero=0))
        results[arm, size] = scalars, {name: value.numpy() for name, value in moved.items()}
    return results


@pytest.mark.parametrize("world_size", [3, 4])
def test_ranks_together_make_the_step_of_one_process(world_size: int) -> None:
    """Contrast (or cross entropy) and attention on two stages, crops left out and unreadable images included.

    In arm co-train the attention is of other images, and both batches also come in parts. Two ranks make theirs in
    test_micro_batch.py, under every launcher.
    """
    results = run_distributed(rank_step, world_size, timeout=300)
    for case in STEPS:
        config = make_config(arm=case[0])
        scalars, moved = one_step(config, batch_of(config, IMAGES), Accelerator(cpu=True))
        assert 0.1 < scalars["attention_views"] < 0.8
        for name, value in scalars.items():
            assert sum(rank[case][0][name] for rank in results) / world_size == pytest.approx(value, rel=1e-5)
        for rank in results:
            for name, gradient in moved.items():
                difference = (torch.from_numpy(rank[case][1][name]) - gradient).norm()
                assert difference <= 1e-5 * gradient.norm() + 1e-7, (case, name)


def logits_of(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, side, side, generator=generator, requires_grad=True) for side in (4, 7)]


@pytest.mark.parametrize("target", ["soft", "sampled", "top"])
@pytest.mark.parametrize(("kld", "nss"), [(1.0, 0.1), (2.0, 0.0), (0.0, 1.0)])
def test_attention_is_the_sum_over_heads_of_the_mean_over_views(target: Any, kld: float, nss: float) -> None:
    """Each head on its own grid; a view that is unreadable or holds too little attention adds 0 to the mean."""
    batch = make_batch(6)
    config = AttentionConfig(kld=kld, nss=nss, nss_target=target, min_mass=0.3)
    heads = logits_of(12)
    torch.manual_seed(1)
    total, parts = attention_objective(heads, batch, config)
    assert batch.maps is not None
    boxes, flips, maps = batch.boxes.flatten(0, 1), batch.flips.flatten(), torch.cat([batch.maps, batch.maps])
    used = [i for i in range(12) if batch.valid[i % 6] and float(crop_mass(maps[i : i + 1], boxes[i : i + 1])) >= 0.3]
    assert 0 < len(used) < 10
    assert parts["attention_views"].item() == pytest.approx(len(used) / 12)
    torch.manual_seed(1)
    expected = torch.zeros(())
    for head in heads:
        side = head.shape[1]
        # all views at once, as "sampled" draws in their order
        masked = torch.tensor([i in used for i in range(12)])
        loss, _ = weighted_loss(
            head,
            warp(maps, boxes, flips, (side, side)),
            weights={"kld": kld, "nss": nss},
            nss_target=target,
            mask=masked,
        )
        expected = expected + loss * len(used) / 12
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(parts) == {"attention_views"} | ({"kld"} if kld else set()) | ({"nss"} if nss else set())
    gradient = torch.autograd.grad(total, heads[0])[0].abs().sum((1, 2))
    assert [i for i in range(12) if gradient[i] > 0] == used


def test_losses_are_those_of_their_formulas() -> None:
    config = make_config(arm="contrastive+attention", attention=AttentionConfig(weight=0.7, channels=8, min_mass=0.3))
    batch = make_batch(6)
    scalars, _ = one_step(config, batch, Accelerator(cpu=True))
    student = make_student(config).train()
    objective = Objective(student, config, input_statistics(student.backbone), torch.device("cpu"))
    output = student(objective.prepare(batch))
    first, second = output.embeddings.chunk(2)
    contrast = nt_xent(first, second, temperature=config.temperature, valid=batch.valid)
    attention, _ = attention_objective(output.attention, batch, config.attention)
    assert scalars["nt_xent"] == pytest.approx(contrast.item(), rel=1e-6)
    assert scalars["loss"] == pytest.approx((contrast + 0.7 * attention).item(), rel=1e-6)


def test_what_is_unreadable_teaches_nothing() -> None:
    """Other pixels, crops, maps and labels in the places of unreadable images change neither scalars nor gradients."""
    for arm in ARMS:
        config = make_config(arm=arm)
        batch, other = (make_batch(8, num_views=config.num_views, seed=seed) for seed in (0, 1))
        assert batch.maps is not None and other.maps is not None
        lost = ~batch.valid
        mixed = replace(
            batch,
            images=torch.where(lost[:, None, None, None], other.images, batch.images),
            boxes=torch.where(lost[:, None], other.boxes, batch.boxes),
            maps=torch.where(lost[:, None, None], other.maps, batch.maps),
            labels=torch.where(lost, 2, batch.labels),
        )
        (scalars, moved), (changed, moved_too) = (
            one_step(config, each, Accelerator(cpu=True)) for each in (batch, mixed)
        )
        assert changed == pytest.approx(scalars, rel=1e-6)
        for name, gradient in moved.items():
            torch.testing.assert_close(moved_too[name], gradient, rtol=1e-4, atol=1e-6)


def test_cross_entropy_and_accuracy_are_means_over_all_images() -> None:
    """Six images, two of them unreadable, the others labelled or not: the sums over labelled ones divided by six."""
    config = make_config(arm="supervised")
    batch = make_batch(6, num_views=1)
    batch.labels[:] = torch.tensor([0, 1, 2, -1, 1, 2])
    scalars, _ = one_step(config, batch, Accelerator(cpu=True))
    student = make_student(config).train()
    objective = Objective(student, config, input_statistics(student.backbone), torch.device("cpu"))
    logits = student(objective.prepare(batch)).class_logits
    counted = [0, 2, 4]
    expected = sum(-torch.log_softmax(logits[i], 0)[batch.labels[i]].item() for i in counted) / 6
    assert scalars["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    hits = sum(int(logits[i].argmax()) == int(batch.labels[i]) for i in counted)
    assert scalars["accuracy"] == pytest.approx(hits / 6)
