"""What tests of the objective share: a launcher inside the ranks of `run_distributed`, and batches of noise."""

import os
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from engine.launch import build_accelerator, configure_deepspeed
from engine.passes import Backward
from engine.state import model_state
from pretrain.config import AttentionConfig, Config, ModelConfig
from pretrain.cotrain import CoTrainBatch, CoTraining
from pretrain.data import Batch
from pretrain.micro_batch import split_batch
from pretrain.model import Student, input_statistics
from pretrain.objective import Objective
from pretrain.views import NUM_COLOURS

SIZE = 32


def join(rank: int, world_size: int, *, zero: int) -> Accelerator:
    """An accelerator in the running process group as `accelerate launch` would set it up, ZeRO 0 meaning DDP."""
    AcceleratorState._reset_state(True)
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    launcher = {"ACCELERATE_USE_DEEPSPEED": str(zero > 0).lower(), "ACCELERATE_DEEPSPEED_ZERO_STAGE": zero}
    os.environ.update({name: str(value) for name, value in (address | launcher).items()})
    return build_accelerator()


def make_config(*, norm: str = "none", **changes: Any) -> Config:
    """A tiny student: a ViT without batch statistics, or ("batch") a ResNet with them; two attention stages."""
    model = ModelConfig(
        backbone="test_vit" if norm == "none" else "test_resnet",
        backbone_options={"img_size": SIZE} if norm == "none" else {},
        projector_hidden=16,
        projector_out=8,
        head_norm="none" if norm == "none" else "batch",
    )
    attention = AttentionConfig(channels=8, stages=[0, -1], min_mass=0.2)
    return replace(Config(model=model, attention=attention, diagnostics_every=0), **changes)


def make_batch(count: int, *, num_views: int = 2, seed: int = 0) -> Batch:
    """Noise with attention in the left half, so that some crops miss it; its second and last image are unreadable."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    corner = 0.7 * uniform(num_views, count, 2)
    maps = torch.zeros(count, 14, 14)
    maps[:, :, :7] = uniform(count, 14, 7)
    colours = torch.zeros(num_views, count, NUM_COLOURS)
    colours[..., :3], colours[..., 4] = 1.0, -1.0
    valid = torch.ones(count, dtype=torch.bool)
    valid[[1, -1]] = False
    return Batch(
        images=(256 * uniform(num_views, count, SIZE, SIZE, 3)).byte(),
        boxes=torch.cat([corner, (1 - corner) * (0.5 + 0.5 * uniform(num_views, count, 2))], dim=2),
        flips=uniform(num_views, count) < 0.5,
        colours=colours,
        maps=maps,
        labels=(4 * uniform(count)).long() - 1,
        valid=valid,
        bad=[],
    )


def batch_of(config: Config, count: int) -> Batch | CoTrainBatch:
    """Noise for an arm: in co-train as many gaze images as images."""
    images = make_batch(count, num_views=config.num_views)
    return CoTrainBatch(images, make_batch(count, num_views=1, seed=1)) if config.co_trains else images


def part_of(batch: Any, rank: int, world_size: int) -> Any:
    """The images, and gaze images, of one rank."""
    if isinstance(batch, CoTrainBatch):
        return CoTrainBatch(*(part_of(each, rank, world_size) for each in (batch.images, batch.gaze)))
    return split_batch(batch, len(batch.valid) // world_size)[rank]


def make_student(config: Config) -> Student:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Student(config, num_classes=3)


def one_step(
    config: Config, batch: Any, accelerator: Accelerator, *, times: int = 1
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Scalars of the last step, and by how much `times` steps of SGD with rate 1 moved each weight and statistic."""
    student = make_student(config)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    statistics = input_statistics(student.backbone)
    images = batch.images if isinstance(batch, CoTrainBatch) else batch
    configure_deepspeed(accelerator, student, local_batch=len(images.valid), clip_norm=config.optim.clip_norm)
    module, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=1.0))
    objective = Objective(module, config, statistics, accelerator.device)
    step_function = CoTraining(objective) if config.co_trains else objective
    for step in range(times):
        scalars = step_function(batch, step=step, backward=Backward(accelerator, module))
        optimizer.step()
        optimizer.zero_grad()
    after = model_state(accelerator, module)
    return {name: value.item() for name, value in scalars.items()}, {n: before[n] - after[n] for n in before}
