"""Options that change how a student is computed: each really takes effect, and a run with it resumes bit-equal."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from engine.average import Average
from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.errors import InputError, Requeue
from engine.optim import build_optimizer
from engine.program import parse_config
from pretrain.assemble import assemble_student
from pretrain.batch_statistics import kept_statistics
from pretrain.config import Config
from pretrain.encoder import load_encoder
from pretrain.model import Student, input_statistics
from pretrain.objective import Objective
from pretrain.trainer import make_dataset, open_data, train
from tests.pretrain.test_resume import same_end


@pytest.fixture
def read_config(student_config: Callable[..., Path]) -> Callable[..., Config]:
    """A small config; keyword arguments as for `student_config`."""
    return lambda **overrides: parse_config(Config, argv=["--config", str(student_config(**overrides))])[0]


def parts(config: Config, *, stop: int) -> None:
    """The run `whole`, and the run `parts`, stopped after `stop` steps and resumed."""
    train(dataclasses.replace(config, run="whole"))
    with pytest.raises(Requeue):
        train(dataclasses.replace(config, run="parts", loop=dataclasses.replace(config.loop, stop_after=stop)))
    train(dataclasses.replace(config, run="parts"))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").open()]


# Moving average


def test_the_average_follows_its_formula() -> None:
    """m += (1 - d) (w - m), d = min(decay, (1 + t) / (10 + t))."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    average = Average(layer.parameters(), decay=0.5)
    expected = layer.weight.detach().double().clone()
    for step in range(1, 30):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        average.update(layer, step=step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    torch.testing.assert_close(average.weights[0].double(), expected, rtol=1e-5, atol=1e-6)
    state = average.averaged(layer, layer.state_dict())
    assert torch.equal(state["weight"], average.weights[0]) and not torch.equal(state["weight"], layer.weight)
    average.update(layer, step=29)  # taken in already
    assert torch.equal(state["weight"], average.weights[0])
    before = layer.weight.detach().clone()
    with average.applied(layer):
        assert torch.equal(layer.weight, average.weights[0])
    assert torch.equal(layer.weight, before)


def test_the_average_stays_in_fp32_when_its_module_is_cast() -> None:
    """A step of 1e-3 of the way is below the resolution of bf16."""
    layer = nn.Linear(2, 2)
    layer.average = Average(layer.parameters(), decay=0.999)
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and layer.average.weights[0].dtype == torch.float32
    before = layer.average.weights[0].clone()
    with torch.no_grad():
        layer.weight.add_(0.5)
    layer.average.update(layer, step=100000)
    change = (layer.average.weights[0] - before) / (layer.weight.float() - before)
    torch.testing.assert_close(change, torch.full((2, 2), 1e-3), rtol=0.02, atol=0)


def test_the_encoder_file_holds_the_average_and_a_resumed_run_too(
    read_config: Callable[..., Config], tmp_path: Path
) -> None:
    parts(read_config(ema=0.9, max_steps=8), stop=3)
    whole = tmp_path / "runs" / "whole"
    same_end(whole, tmp_path / "runs" / "parts")
    encoder = load_file(whole / "encoder" / "model.safetensors")
    model = load_checkpoint(list_checkpoints(whole / "checkpoints")[-1])[1]["model"]
    student = Student(read_config(ema=0.9), num_classes=4)
    names = [name for name, weight in student.named_parameters() if weight.requires_grad]
    assert int(model["average._extra_state"]) == 7  # the last step is taken in when the next begins, or at the end
    for number, name in enumerate(names):
        if name.startswith("backbone."):
            mean = model[f"average.weights.{number}"].lerp(model[name], 1 - 9 / 18)
            torch.testing.assert_close(encoder[name.removeprefix("backbone.")], mean)
            assert not torch.allclose(mean, model[name], atol=1e-6) or name.endswith("bias")
    again = (whole / "encoder" / "model.safetensors").read_bytes()
    train(dataclasses.replace(read_config(ema=0.9, max_steps=8), run="whole"))
    assert (whole / "encoder" / "model.safetensors").read_bytes() == again


# Gradient checkpointing


def step_of(config: Config, *, seed: int = 0) -> tuple[float, dict[str, Tensor], dict[str, Tensor], int]:
    """Loss, gradients, running statistics, and bytes kept for the backward, of one training step on fixed pixels."""
    torch.manual_seed(seed)
    student = Student(config, num_classes=4).train()
    images, kept = torch.randn(6, 3, 32, 32), [0]

    def count(tensor: Tensor) -> Tensor:
        kept[0] += tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        output = student(images)
        loss = output.embeddings.square().mean() + output.attention[0].square().mean()
    loss.backward()
    gradients = {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}
    return loss.item(), gradients, dict(student.named_buffers()), kept[0]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_gradient_checkpointing_changes_memory_and_nothing_else(
    read_config: Callable[..., Config], backbone: str
) -> None:
    """Loss, gradients and running statistics are equal bit for bit; the statistics move once, not twice."""
    plain = step_of(read_config(model__backbone=backbone))
    spared = step_of(read_config(model__backbone=backbone, model__gradient_checkpointing=True))
    assert plain[0] == spared[0]
    assert plain[1].keys() == spared[1].keys() and all(torch.equal(g, spared[1][name]) for name, g in plain[1].items())
    for name in plain[2]:
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(plain[2][name], spared[2][name]), name
    assert spared[3] < 0.7 * plain[3]


def test_kept_statistics_leaves_them_alone_and_normalises_with_the_batch() -> None:
    norm = nn.BatchNorm1d(3).train()
    rows = torch.randn(8, 3) * 4 + 2
    with kept_statistics(norm):
        out = norm(rows)
    assert torch.equal(norm.running_mean, torch.zeros(3)) and torch.equal(norm.running_var, torch.ones(3))
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    norm(rows)
    assert not torch.equal(norm.running_mean, torch.zeros(3))


# Fused optimiser


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_fused_optimiser_is_taken_and_computes_the_same(name: Any) -> None:
    ends = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(5, 4)
        config = parse_config(Config, argv=["--optim.name", name, "--optim.lr", "0.1", "--optim.fused", str(fused)])[0]
        optimizer = build_optimizer(layer, config.optim, accelerator=Accelerator())
        assert all(bool(group.get("fused")) == fused for group in optimizer.param_groups)
        for _ in range(5):
            layer(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(layer.weight.detach())
    torch.testing.assert_close(ends[0], ends[1])


def test_fused_lars_is_refused() -> None:
    config = parse_config(Config, argv=["--optim.name", "lars", "--optim.fused", "true"])[0]
    with pytest.raises(InputError, match=r"optim\.fused.*LARS"):
        build_optimizer(nn.Linear(2, 2), config.optim, accelerator=Accelerator())


# Compilation, synchronised batch norm, memory order


def test_a_compiled_student_is_compiled_and_all_options_together_resume_bit_equal(
    read_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses as without; with checkpointing, average, fused optimiser and channels-last beside it."""
    calls: list[int] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        calls.append(len(graph.graph.nodes))
        return graph.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=backend))
    options = {"ema": 0.9, "optim__fused": True, "model__gradient_checkpointing": True, "channels_last": True}
    config = read_config(max_steps=4, **options)
    train(dataclasses.replace(config, run="plain"))
    assert not calls
    parts(dataclasses.replace(config, compile=True), stop=2)
    assert calls and max(calls) > 10
    same_end(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts")
    compiled, plain = losses(tmp_path / "runs" / "whole"), losses(tmp_path / "runs" / "plain")
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_synchronised_batch_norm_needs_a_gpu(read_config: Callable[..., Config]) -> None:
    config = read_config(sync_batch_norm=True)
    with pytest.raises(InputError, match="sync_batch_norm needs GPUs, and this runs on cpu"):
        assemble_student(config, num_classes=4, accelerator=Accelerator(cpu=True))


class GraphicsCard:
    """What `assemble_student` asks of an accelerator, on a GPU."""

    device = torch.device("cuda")
    distributed_type = DistributedType.MULTI_GPU


def test_synchronised_batch_norm_replaces_every_norm(read_config: Callable[..., Config]) -> None:
    accelerator: Any = GraphicsCard()
    student = assemble_student(read_config(sync_batch_norm=True, ema=0.5), num_classes=4, accelerator=accelerator)
    norms = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 5 and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert student.average is not None
    student.average.update(student, step=1)


def test_channels_last_reaches_weights_and_images(read_config: Callable[..., Config]) -> None:
    config = read_config(channels_last=True)
    student = assemble_student(config, num_classes=4, accelerator=Accelerator())
    weights = [weight for weight in student.backbone.parameters() if weight.ndim == 4 and weight.shape[2] > 1]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    objective = Objective(student, config, input_statistics(student.backbone), torch.device("cpu"))
    batch = make_dataset(config, open_data(config)).__getitems__([(0, 0, 0), (0, 0, 1)])
    assert objective.prepare(batch).is_contiguous(memory_format=torch.channels_last)


# CIFAR stem


def test_the_cifar_stem_keeps_the_resolution(read_config: Callable[..., Config], tmp_path: Path) -> None:
    """32 px: grids of 32, 32, 16, 8 and 4, as in SimCLR's appendix B.9; and the encoder file loads again."""
    options = {"channels": [8, 16, 32, 64]}
    config = read_config(
        model__backbone="resnet18", model__cifar_stem=True, model__backbone_options=options, max_steps=1
    )
    backbone = Student(config, num_classes=4).backbone
    assert (backbone.conv1.kernel_size, backbone.conv1.stride) == ((3, 3), (1, 1))
    _, stages = backbone.forward_intermediates(torch.zeros(1, 3, 32, 32))
    assert [stage.shape[-1] for stage in stages] == [32, 32, 16, 8, 4]
    assert [32 // info["reduction"] for info in backbone.feature_info] == [32, 32, 16, 8, 4]
    plain = timm.create_model("resnet18", num_classes=0, **options)
    assert plain.state_dict().keys() == backbone.state_dict().keys()
    folder = train(config).path / "encoder"
    loaded = load_encoder(folder)
    assert loaded.conv1.weight.shape == (64, 3, 3, 3) and loaded(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


@pytest.mark.parametrize("backbone", ["test_vit", "resnet10t"])
def test_a_cifar_stem_on_anything_else_is_refused(read_config: Callable[..., Config], backbone: str) -> None:
    with pytest.raises(InputError, match=r"model\.cifar_stem"):
        Student(read_config(model__backbone=backbone, model__cifar_stem=True), num_classes=4)


def test_a_vits_tokens_are_spared_from_weight_decay(read_config: Callable[..., Config]) -> None:
    student = Student(read_config(model__backbone="test_vit"), num_classes=4)
    optimizer = build_optimizer(student, read_config(optim__weight_decay=0.1).optim, accelerator=Accelerator())
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert decay[id(student.backbone.pos_embed)] == 0.0
    assert decay[id(student.backbone.patch_embed.proj.weight)] == 0.1


def test_online_evaluators_see_the_average(
    read_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook gets the averaged weights, up to the step it runs after, and the training goes on with its own."""
    seen: dict[int, Tensor] = {}

    def watch(training: Any, config: Config, student: Student) -> list[tuple[int, Any]]:
        return [(2, lambda step: seen.update({step: student.backbone.state_dict()["conv1.0.weight"].clone()}))]

    monkeypatch.setattr("pretrain.trainer._online", watch)
    config = read_config(ema=0.9, max_steps=4)
    folder = train(config).path / "encoder"
    assert list(seen) == [2, 4]
    assert torch.equal(seen[4], load_file(folder / "model.safetensors")["conv1.0.weight"])
    monkeypatch.undo()
    train(dataclasses.replace(config, run="unwatched"))
    assert losses(tmp_path / "runs" / "student") == losses(tmp_path / "runs" / "unwatched")
