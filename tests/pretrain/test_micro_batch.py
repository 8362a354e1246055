"""A local batch that the encoder sees in parts: exact gradients under every launcher, and what batch norm does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from engine.passes import Backward
from engine.program import parse_config
from engine.settings import OptimConfig
from pretrain.config import Config
from pretrain.micro_batch import RandomState, split_batch
from pretrain.model import StudentOutput, input_statistics
from pretrain.objective import Objective
from pretrain.trainer import train
from tests.pretrain.launched import batch_of, join, make_batch, make_config, make_student, one_step, part_of
from tests.tools import run_distributed

IMAGES = 12
LAUNCHERS = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}


def in_parts(config: Config, size: int, *, clip_norm: float = 0.0) -> Config:
    return replace(config, optim=OptimConfig(micro_batch=size, clip_norm=clip_norm))


def assert_same_step(found: dict[str, Any], expected: dict[str, Tensor], *, tolerance: float = 1e-5) -> None:
    """Each tensor by its norm: single gradients of a ViT are sums that nearly cancel."""
    for name, gradient in expected.items():
        difference = (torch.as_tensor(found[name]) - gradient).norm()
        assert difference <= tolerance * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("arm", ["contrastive", "contrastive+attention", "supervised+attention"])
@pytest.mark.parametrize("size", [1, 5, 6, 12, 99])
def test_parts_make_the_step_of_the_whole(arm: Any, size: int) -> None:
    config = make_config(arm=arm)
    batch = make_batch(IMAGES, num_views=config.num_views)
    scalars, gradient = one_step(config, batch, Accelerator(cpu=True))
    found, moved = one_step(in_parts(config, size), batch, Accelerator(cpu=True))
    assert found == pytest.approx(scalars, rel=1e-5)
    assert_same_step(moved, gradient)


def rank_steps(rank: int, world_size: int) -> dict[str, Any]:
    """Per launcher and size of the parts: scalars and moves of a step; the same twice with diagnostics; clipped."""
    results = {}
    part = part_of(make_batch(IMAGES), rank, world_size)
    config = make_config(arm="contrastive+attention")
    for launcher, zero in LAUNCHERS.items():
        for size in (0, 2, 4):
            results[f"{launcher}/{size}"] = one_step(in_parts(config, size), part, join(rank, world_size, zero=zero))
        looking = replace(in_parts(config, 2), diagnostics_every=1)
        co_training = in_parts(make_config(arm="co-train"), 4)
        both = part_of(batch_of(co_training, IMAGES), rank, world_size)
        results[f"{launcher}/co-train"] = one_step(co_training, both, join(rank, world_size, zero=zero))
        results[f"{launcher}/looking"] = one_step(looking, part, join(rank, world_size, zero=zero))
    clipped = in_parts(config, 2, clip_norm=0.5)
    results["zero2/clipped"] = one_step(clipped, part, join(rank, world_size, zero=2))
    results["passes"] = exchanges(join(rank, world_size, zero=0))
    return {
        key: (scalars, {name: value.numpy() for name, value in moved.items()})
        for key, (scalars, moved) in results.items()
    }


def exchanges(accelerator: Accelerator) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The gradient after each pass, where the gradient of a pass is this rank's number plus one."""
    module = accelerator.prepare(nn.Linear(1, 1, bias=False))
    ones = torch.full((1, 1), dist.get_rank() + 1.0)
    seen: dict[str, Tensor] = {}

    def one_pass(name: str) -> None:
        backward(module(ones).sum())
        seen[name] = module.module.weight.grad.clone()

    backward = Backward(accelerator, module)
    one_pass("plain")
    module.zero_grad()
    for _ in backward.passes(1):
        one_pass("only")
    module.zero_grad()
    for outer in backward.passes(2):
        for inner in backward.passes(2):
            one_pass(f"{outer}{inner}")
    return {}, seen


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_distributed(rank_steps, 2, timeout=300)


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
@pytest.mark.parametrize("size", [0, 2, 4])
def test_two_ranks_in_parts_make_the_step_of_one_process(
    two_ranks: list[dict[str, Any]], launcher: str, size: int
) -> None:
    """Parts of 2, and of 4 with a last one of 2, of 6 images a rank, under DDP and real DeepSpeed."""
    scalars, gradient = one_step(make_config(arm="contrastive+attention"), make_batch(IMAGES), Accelerator(cpu=True))
    for rank in two_ranks:
        assert_same_step(rank[f"{launcher}/{size}"][1], gradient)
    for name, value in scalars.items():
        assert np.mean([rank[f"{launcher}/{size}"][0][name] for rank in two_ranks]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_co_training_in_parts_on_two_ranks_makes_the_step_of_one_process(
    two_ranks: list[dict[str, Any]], launcher: str
) -> None:
    config = make_config(arm="co-train")
    scalars, gradient = one_step(config, batch_of(config, IMAGES), Accelerator(cpu=True))
    for rank in two_ranks:
        assert_same_step(rank[f"{launcher}/co-train"][1], gradient)
    for name, value in scalars.items():
        assert np.mean([rank[f"{launcher}/co-train"][0][name] for rank in two_ranks]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_looking_inside_changes_no_bit(two_ranks: list[dict[str, Any]], launcher: str) -> None:
    for rank in two_ranks:
        scalars, moved = rank[f"{launcher}/looking"]
        assert scalars.items() > rank[f"{launcher}/2"][0].items()
        assert all(np.array_equal(moved[name], value) for name, value in rank[f"{launcher}/2"][1].items())


def test_deepspeed_clips_the_sum_of_the_passes(two_ranks: list[dict[str, Any]]) -> None:
    _, gradient = one_step(make_config(arm="contrastive+attention"), make_batch(IMAGES), Accelerator(cpu=True))
    norm = torch.cat([value.flatten() for value in gradient.values()]).norm()
    assert norm > 1
    expected = {name: value * (0.5 / norm) for name, value in gradient.items()}
    assert_same_step(two_ranks[0]["zero2/clipped"][1], expected, tolerance=1e-3)


def test_ranks_exchange_gradients_in_the_last_pass_only(two_ranks: list[dict[str, Any]]) -> None:
    """Gradients are 1 and 2 on the two ranks, 1.5 once exchanged; passes inside passes count as one row."""
    for number, rank in enumerate(two_ranks, start=1):
        seen = {name: value.item() for name, value in rank["passes"][1].items()}
        assert seen == {"plain": 1.5, "only": 1.5, "00": number, "01": 2 * number, "10": 3 * number, "11": 6.0}


def test_a_step_without_a_pass_is_refused() -> None:
    backward = Backward(Accelerator(cpu=True), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="at least one pass"):
        next(backward.passes(0))


def test_both_views_of_an_image_stay_together() -> None:
    batch = make_batch(7)
    parts = split_batch(batch, 3)
    assert [len(part.valid) for part in parts] == [3, 3, 1]
    for name in ("images", "boxes", "flips", "colours"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(batch, name))
    for name in ("maps", "labels", "valid"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert len(split_batch(batch, 0)) == len(split_batch(batch, 7)) == 1


class Recorder(nn.Module):
    """The student, noting the embeddings of each forward and whether it kept a graph."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.backbone = student.get_submodule("backbone")
        self.seen: list[tuple[bool, Tensor]] = []

    def forward(self, images: Tensor) -> StudentOutput:
        output = self.student(images)
        self.seen.append((output.embeddings.requires_grad, output.embeddings.detach().clone()))
        return output


def recorded_step(config: Config) -> tuple[Recorder, dict[str, float]]:
    module = Recorder(make_student(config).train())
    objective = Objective(module, config, input_statistics(module.backbone), torch.device("cpu"))
    torch.manual_seed(5)
    scalars = objective(make_batch(IMAGES), step=0, backward=Backward(Accelerator(cpu=True), module))
    return module, {name: value.item() for name, value in scalars.items()}


@pytest.mark.parametrize("kind", ["batch norm", "stochastic depth and dropout"])
def test_the_second_pass_computes_the_embeddings_that_were_contrasted(kind: str) -> None:
    config = in_parts(make_config(norm="batch" if kind == "batch norm" else "none", arm="contrastive+attention"), 5)
    if kind != "batch norm":
        config.model.backbone_options.update(drop_path_rate=0.5, proj_drop_rate=0.2)
        config.attention.nss_target = "sampled"  # draws between the parts
    module, _ = recorded_step(config)
    assert [graph for graph, _ in module.seen] == [False] * 3 + [True] * 3
    for (_, first), (_, second) in zip(module.seen[:3], module.seen[3:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(module.seen[0][1], module.seen[1][1])
    _, again = recorded_step(config)
    whole, _ = recorded_step(in_parts(config, 0))
    assert not torch.allclose(whole.seen[0][1][:5], module.seen[0][1][:5]), "the parts share the batch's randomness"
    assert again == recorded_step(config)[1]


def test_batch_norm_takes_in_each_part_once() -> None:
    """Running statistics after a step in parts: those of one forward per part, in order."""
    config = in_parts(make_config(norm="batch", arm="contrastive+attention"), 5)
    module, _ = recorded_step(config)
    student = make_student(config).train()
    objective = Objective(student, config, input_statistics(student.backbone), torch.device("cpu"))
    for part in split_batch(make_batch(IMAGES), 5):
        student(objective.prepare(part))
    found = dict(module.student.named_buffers())
    statistics = {name: value for name, value in student.named_buffers() if "running" in name}
    assert len(statistics) > 4
    for name, value in statistics.items():
        torch.testing.assert_close(found[name], value)


def test_a_replayed_state_draws_the_same_and_leaves_no_trace() -> None:
    state = RandomState.now(torch.device("cpu"))
    first = torch.rand(3)
    expected_next = torch.rand(3)
    torch.manual_seed(9)
    torch.rand(2)
    after = torch.get_rng_state()
    with state.replayed():
        assert torch.equal(torch.rand(3), first)
        assert torch.equal(torch.rand(3), expected_next)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_run_in_parts_learns_as_one_in_one_pass(student_config: Callable[..., Path]) -> None:
    """The whole program, 8 steps of AdamW on 12 images, parts of 5."""
    losses = []
    for size in (0, 5):
        path = student_config(
            run=f"parts{size}",
            max_steps=8,
            optim__micro_batch=size,
            model__backbone="test_vit",
            model__head_norm="none",
        )
        run = train(parse_config(Config, argv=["--config", str(path)])[0])
        losses.append([line["train/loss"] for line in run.metrics()])
    assert len(set(losses[0])) == 8
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-4)
