"""The loss scale of fp16 under DeepSpeed: torch's rule, real ZeRO optimisers, and what counts as a fault."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import engine.loss_scale
from engine.faults import StepGuard
from engine.launch import configure_deepspeed
from engine.loss_scale import LossScale, load_scale, scale_state
from engine.ranks import Ranks
from engine.runs import RunFolder
from engine.settings import LoopConfig
from engine.state import model_state
from tests.pretrain.launched import join
from tests.tools import run_distributed

CLIP = 0.05


class Told:
    """Stands for DeepSpeed's optimiser: remembers the scale that it was told."""

    scale = 0.0

    def override_loss_scale(self, scale: float) -> None:
        self.scale = scale


def test_it_grows_and_shrinks_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.loss_scale, "GROWTH_STEPS", 20)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=20)
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    ours, zero = LossScale(), Told()
    overflows = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.04
    for overflow in overflows.tolist():
        scaler.scale(weight * (torch.inf if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ours.update(zero, overflow=overflow)
        assert ours.value == zero.scale == scaler.get_scale()
    assert len({ours.value, 2.0**16}) == 2 and overflows.sum() > 5


def test_a_checkpoint_of_one_launcher_gives_the_other_its_scale() -> None:
    plain: Any = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    zero, ours, told = SimpleNamespace(scaler=None), LossScale(), Told()
    load_scale(plain, None, None, {"scale": 512.0, "good_steps": 7})
    state = scale_state(plain, None)
    assert state == {"scale": 512.0, "good_steps": 7} and plain.scaler.get_scale() == 512.0
    load_scale(zero, ours, told, state)  # type: ignore[arg-type]
    assert scale_state(zero, ours) == state and told.scale == 512.0  # type: ignore[arg-type]
    nothing: Any = SimpleNamespace(scaler=None)
    load_scale(nothing, None, None, state)
    assert scale_state(nothing, None) == {}


def fp16_steps(rank: int, world_size: int, folder: str) -> dict[int, dict[str, Any]]:
    """Per stage: four steps of the whole guard under real DeepSpeed, with CPU autocast in fp16 inside the module."""
    found = {}
    for stage in (1, 2, 3):
        accelerator = join(rank, world_size, zero=stage)
        accelerator.state.deepspeed_plugin.deepspeed_config["fp16"] = {"enabled": True}  # there is no GPU to ask for it
        found[stage] = _steps_of_stage(accelerator, f"{folder}/{stage}")
    return found


def _steps_of_stage(accelerator: Accelerator, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    start = layer.weight.detach().clone()
    scale = configure_deepspeed(accelerator, layer, local_batch=2, clip_norm=CLIP)
    assert scale is not None
    module, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    scale.attach(optimizer.optimizer)
    run = RunFolder(Path(folder))
    run.path.mkdir()
    training: Any = SimpleNamespace(
        accelerator=accelerator, module=module, optimizer=optimizer, loss_scale=scale, ranks=Ranks(), extra={},
        config=LoopConfig(), clip_norm=CLIP, run=run, report=lambda line: None,
    )  # fmt: skip
    guard = StepGuard(training)
    steps = []
    for factor in (1.0, 1e3, torch.inf, 1.0):
        backward = guard.backward()
        output = module(torch.ones(2, 8))
        loss = factor * output.float().square().mean()
        backward(loss)
        counts = guard.finish(backward, loss, step=len(steps), note=None)
        weight = model_state(accelerator, module)["weight"]
        steps.append((output.dtype, bool(counts), scale.value, training.extra["num_skipped"], weight.numpy()))
    return {"start": start.numpy(), "steps": steps, "notes": run.bad_batches_file.read_text()}


def clipped_gradient(weight: Tensor, bias: Tensor) -> Tensor:
    """Of the same loss in fp32, the norm of both gradients brought down to `CLIP`."""
    layer = nn.Linear(8, 4)
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer(torch.ones(2, 8)).square().mean().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), CLIP)
    assert layer.weight.grad is not None
    return layer.weight.grad


def test_zero_scales_clips_skips_and_tells_a_fault_from_an_overflow(tmp_path: Any) -> None:
    (found,) = run_distributed(fp16_steps, 1, str(tmp_path), timeout=300)
    torch.manual_seed(0)
    fresh = nn.Linear(8, 4)
    for stage in (1, 2, 3):
        start = torch.from_numpy(found[stage]["start"])
        assert torch.equal(start, fresh.weight)
        first, overflow, fault, last = found[stage]["steps"]
        assert {step[0] for step in found[stage]["steps"]} == {torch.float16}
        moved = start - torch.from_numpy(first[4])
        torch.testing.assert_close(
            moved, clipped_gradient(fresh.weight.detach(), fresh.bias.detach()), rtol=2e-3, atol=1e-5
        )
        assert first[1:4] == (True, 2.0**16, 0)
        # finite loss, infinite scaled gradient: skipped by DeepSpeed, the scale halved, no fault
        assert overflow[1:4] == (True, 2.0**15, 0) and (overflow[4] == first[4]).all()
        # infinite loss: a fault, counted and noted
        assert fault[1:4] == (False, 2.0**14, 1) and (fault[4] == first[4]).all()
        assert last[1:4] == (True, 2.0**14, 1) and (last[4] != first[4]).any()
        assert found[stage]["notes"].count("\n") == 1 and '"step": 3' in found[stage]["notes"]
