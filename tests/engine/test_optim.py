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


def test_what_a_module_spares_gets_no_weight_decay() -> None:
    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = torch.nn.Parameter(torch.zeros(1, 1, 4))
            self.layer = torch.nn.Linear(4, 4, bias=False)

        def no_weight_decay(self) -> set[str]:
            return {"token"}

    optimizer = build_optimizer(Tokens(), OptimConfig(name="sgd", weight_decay=0.1), accelerator=Accelerator())
    decay = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {3: 0.0, 2: 0.1}


def gradients_of(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A quadratic's, so that they follow the weights."""
    return 0.3 * weight + 0.1, 0.2 * bias - 0.3


@pytest.mark.parametrize("decay", [1e-4, 0.0])
def test_lars_follows_its_formula_for_ten_steps(decay: float) -> None:
    """v = m v + r (g + wd w), w -= lr v, r = 1e-3 |w| / (|g| + wd |w|) for weights and 1 for biases (You et al. 2017).

    In float64 by hand, under SimCLR's warm-up; a decay of 0 does not switch the scaling off.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    config = OptimConfig(name="lars", lr=0.3, weight_decay=decay, warmup_epochs=1)
    schedule = build_schedule(config, batch_size=4096, steps_per_epoch=5, total_steps=10)
    optimizer = build_optimizer(layer, config, accelerator=Accelerator())
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    official, velocity = weight.clone(), torch.zeros(2, 3, dtype=torch.float64)
    momentum, bias_momentum = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for step in range(10):
        rate = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        layer.weight.grad, layer.bias.grad = gradients_of(layer.weight.detach(), layer.bias.detach())
        optimizer.step()
        gradient, bias_gradient = gradients_of(weight, bias)
        ratio = 1e-3 * weight.norm() / (gradient.norm() + decay * weight.norm())
        momentum = 0.9 * momentum + ratio * (gradient + decay * weight)
        bias_momentum = 0.9 * bias_momentum + bias_gradient
        weight, bias = weight - rate * momentum, bias - rate * bias_momentum
        torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(layer.bias.detach().double(), bias, rtol=1e-5, atol=1e-6)
        # google-research/simclr: |g + wd w| below, and the rate inside the momentum
        decayed = gradients_of(official, bias)[0] + decay * official
        velocity = 0.9 * velocity + rate * 1e-3 * official.norm() / decayed.norm() * decayed
        official = official - velocity
    assert (official - weight).norm() < 1e-2 * weight.norm()  # under a warm-up of five steps, steeper than any real one


def test_lars_leaves_a_layer_without_gradient_or_weight_alone() -> None:
    """The ratio is 1 where a norm is 0: no division by zero."""
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(layer.weight)
    optimizer = build_optimizer(layer, OptimConfig(name="lars", lr=0.5, weight_decay=0.1), accelerator=Accelerator())
    layer.weight.grad = torch.ones(2, 3)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.full((2, 3), -0.5))
