"""Schedules by value, and the optimisers' rules."""

import math

import pytest
import torch
from accelerate import Accelerator

from engine.optim import build_optimizer, build_schedule
from engine.settings import OptimConfig


def test_simclr_scalings_and_cosine_by_value() -> None:
    config = OptimConfig(lr=0.3, lr_scaling="linear", warmup_epochs=2)
    schedule = build_schedule(config, batch_size=1024, steps_per_epoch=5, total_steps=50)
    assert schedule(0) == pytest.approx(1.2 / 10)
    assert schedule(9) == pytest.approx(1.2) and schedule(10) == pytest.approx(1.2)
    assert schedule(30) == pytest.approx(0.6)
    assert schedule(49) == pytest.approx(1.2 * 0.5 * (1 + math.cos(math.pi * 39 / 40)))
    root = build_schedule(OptimConfig(lr=0.075, lr_scaling="sqrt"), batch_size=4096, steps_per_epoch=1, total_steps=9)
    assert root.peak == pytest.approx(4.8)


def test_half_schedule_drops_tenfold_in_the_middle() -> None:
    config = OptimConfig(lr=0.01, lr_scaling="none", warmup_epochs=0, schedule="half")
    schedule = build_schedule(config, batch_size=8, steps_per_epoch=10, total_steps=100)
    assert [schedule(s) for s in (0, 49, 50, 99)] == pytest.approx([0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_norms_and_biases_get_no_weight_decay(name: str) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = build_optimizer(module, OptimConfig(name=name, weight_decay=0.1), accelerator=Accelerator())  # type: ignore[arg-type]
    decay = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {4: 0.1, 1: 0.0}


def test_lars_follows_its_formula() -> None:
    """w -= lr r (g + wd w), r = 1e-3 |w| / (|g| + wd |w|) for weights and 1 for biases (You et al. 2017)."""
    layer = torch.nn.Linear(3, 2)
    config = OptimConfig(name="lars", lr=0.5, lr_scaling="none", weight_decay=0.01)
    optimizer = build_optimizer(layer, config, accelerator=Accelerator())
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), 0.2), torch.full((2,), 0.3)
    optimizer.step()
    ratio = 1e-3 * weight.norm() / (layer.weight.grad.norm() + 0.01 * weight.norm())
    torch.testing.assert_close(layer.weight.detach(), weight - 0.5 * ratio * (0.2 + 0.01 * weight))
    torch.testing.assert_close(layer.bias.detach(), bias - 0.5 * 0.3)
