"""What an encoder attends to: its own heads or a read-out trained on it, the norm of its features, Grad-CAM."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.maps import log_density, to_density
from engine.errors import InputError
from pretrain.augment import recolour
from pretrain.config import Arm, Config
from pretrain.data import view_batches
from pretrain.evaluators.base import Subject
from pretrain.evaluators.cache import kept_tensors, key_digest, tensor_digest
from pretrain.evaluators.linear_probe import LinearHead
from pretrain.model import AttentionHead, resolve_stages
from pretrain.objective import attention_objective
from pretrain.probe_config import ProbeConfig
from pretrain.trainer import make_dataset, open_data

DEFAULT_STEPS = 300  # of a read-out on an encoder that comes without a run
Densities = Callable[[Tensor], Tensor]
"""Normalised images `(batch, 3, size, size)` to densities `(batch, rows, columns)`."""


class Readout(nn.Module):
    """Attention heads on a frozen backbone.

    Raises:
        InputError: the backbone does not have the stages that the config names.
    """

    def __init__(self, config: Config, backbone: nn.Module) -> None:
        super().__init__()
        self.stages = resolve_stages(backbone, config.attention.stages)
        channels = [info["num_chs"] for info in backbone.feature_info]  # type: ignore[union-attr]
        self.heads = nn.ModuleList(
            AttentionHead(channels[stage], channels=config.attention.channels, norm=config.model.head_norm)
            for stage in self.stages
        )

    def forward(self, backbone: nn.Module, images: Tensor) -> list[Tensor]:
        """Logits `(batch, height, width)` of each head."""
        with torch.no_grad():
            maps = backbone.forward_intermediates(  # type: ignore[operator]
                images, indices=self.stages, norm=False, output_fmt="NCHW", intermediates_only=True
            )
        return [head(x) for head, x in zip(self.heads, maps, strict=True)]

    def densities(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """With heads on several stages, the mean of their densities on the finest stage's grid."""
        logits = self(backbone, images)
        grid = max(((one.shape[1], one.shape[2]) for one in logits), default=(1, 1))
        return torch.stack([_upsample(log_density(one).exp(), grid) for one in logits]).mean(0)


def open_readout(subject: Subject, probe: ProbeConfig) -> tuple[Readout, dict[str, object]]:
    """The student's own heads, or a read-out trained on the frozen encoder where it has none.

    Returns:
        The heads in evaluation mode, and for protocols where they come from: `map`, and of a read-out `readout_steps`,
        `readout_learning_rate`, and the digests of what it was trained on, `readout_images` and `readout_labels`.

    Raises:
        InputError: no labels to train a read-out from, or stages that the backbone does not have.
    """
    with torch.random.fork_rng():
        torch.manual_seed(probe.seed)
        readout = Readout(subject.config, subject.backbone).to(subject.device)
    if subject.heads:
        try:
            readout.heads.load_state_dict(subject.heads)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{subject.name}: its attention heads do not fit its config ({reason})") from error
        return readout.eval(), {"map": "the student's own head"}
    steps = probe.gaze_options.readout_steps or subject.step or DEFAULT_STEPS

    def make() -> dict[str, Tensor]:
        train_readout(readout, subject, probe, steps=steps)
        return readout.state_dict()

    key = readout_key(subject, probe)
    readout.load_state_dict(kept_tensors(subject.cache, "readout", key, make, ranks=subject.ranks))
    return readout.eval(), {
        "map": f"read-out trained for {steps} steps on the frozen encoder",
        "readout_steps": steps,
        "readout_learning_rate": probe.gaze_options.readout_lr,
        "readout_images": key["images"],
        "readout_labels": key["labels"],
    }


def readout_key(subject: Subject, probe: ProbeConfig) -> dict[str, Any]:
    """All that decides what `open_readout` returns, known without training it.

    Raises:
        InputError: no labels to train a read-out from.
    """
    key: dict[str, Any] = {
        "encoder": subject.hash,
        "attention": key_digest(dataclasses.asdict(subject.config.attention)),
    }
    if subject.heads:
        return key | {"heads": {name: tensor_digest(value) for name, value in sorted(subject.heads.items())}}
    config = readout_config(subject, probe)
    shards = open_data(config)
    assert shards.label_manifest is not None
    options = probe.gaze_options
    steps = options.readout_steps or subject.step or DEFAULT_STEPS
    recipe = [dataclasses.asdict(part) for part in (config.views, config.model)]
    numbers = [steps, options.readout_lr, probe.seed, config.seed, config.data.batch_size, config.data.image_size]
    return key | {
        "images": shards.digest,
        "labels": shards.label_manifest.digest,
        "options": key_digest([recipe, numbers, config.data.window, subject.statistics]),
    }


def readout_config(subject: Subject, probe: ProbeConfig) -> Config:
    """The config of the training that a read-out gets: the run's own, with attention.

    Raises:
        InputError: no labels.
    """
    run = subject.config
    labels = probe.labels or run.data.labels
    if labels is None:
        raise InputError(f"{subject.name} has no attention head: give label shards to train a read-out with --labels")
    arm: Arm = "contrastive+attention" if run.contrastive else "supervised+attention"
    data = dataclasses.replace(run.data, labels=labels, teacher=None, remote=probe.remote)
    return dataclasses.replace(run, arm=arm, data=data)


def train_readout(readout: Readout, subject: Subject, probe: ProbeConfig, *, steps: int) -> None:
    """Train the heads alone, on the run's own views, batches and attention loss.

    Every rank trains the same heads on the whole batch: the result does not depend on the number of ranks.
    """
    config = readout_config(subject, probe)
    shards = open_data(config)
    batch = min(config.data.batch_size, shards.num_samples)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch))
    optimizer = torch.optim.AdamW(readout.parameters(), lr=probe.gaze_options.readout_lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = view_batches(
        make_dataset(config, shards),
        data=config.data,
        loop=dataclasses.replace(config.loop, num_workers=probe.num_workers),
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=steps,
        seed=config.seed,
    )
    mean, std = subject.statistics
    with torch.enable_grad():
        for step, read in enumerate(batches):
            views = read.to(subject.device)
            images = recolour(views.images.flatten(0, 1), views.colours.flatten(0, 1), mean=mean, std=std)
            loss, _ = attention_objective(readout(subject.backbone, images), views, config.attention)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                subject.report(f"read-out step {step}/{steps} loss {loss.item():.4f}")


def feature_norm(subject: Subject) -> Densities:
    """The L2 norm over channels of the last feature map, as a density."""

    def densities(images: Tensor) -> Tensor:
        (last,) = subject.backbone.forward_intermediates(
            images, indices=[-1], norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return to_density(last.float().norm(dim=1))

    return densities


def grad_cam(subject: Subject, head: LinearHead) -> Densities:
    """Grad-CAM of the class that a linear probe predicts: `relu(sum_k mean(d y / d A_k) A_k)` on the last feature map.

    Source: Selvaraju et al., ICCV 2017. An image on which nothing speaks for the class gets the uniform density.
    """

    def densities(images: Tensor) -> Tensor:
        with torch.enable_grad():
            maps = subject.backbone.forward_features(images).detach().requires_grad_()
            scores = head.scores(subject.backbone.forward_head(maps, pre_logits=True).float())
            (gradient,) = torch.autograd.grad(scores.amax(1).sum(), maps)
        weights = gradient.mean((2, 3), keepdim=True)
        return to_density(torch.relu((weights * maps.detach()).sum(1)).float())

    return densities


def has_feature_map(subject: Subject) -> bool:
    """Whether the features before pooling are maps `(batch, channels, height, width)`, as Grad-CAM needs."""
    size = subject.image_size
    with torch.no_grad():
        final = subject.backbone.forward_features(torch.zeros(1, 3, size, size, device=subject.device))
    return final.ndim == 4 and final.shape[1] == subject.backbone.num_features


def _upsample(density: Tensor, grid: tuple[int, ...]) -> Tensor:
    fine = functional.interpolate(density.unsqueeze(1), size=grid, mode="bilinear", align_corners=False).squeeze(1)
    return fine / fine.sum((1, 2), keepdim=True)
