"""How well predicted attention agrees with where people looked."""

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.maps import log_density
from engine.errors import InputError
from pretrain.config import Arm, Config
from pretrain.data import view_batches
from pretrain.encoder import load_heads
from pretrain.evaluators.base import Result, Subject
from pretrain.evaluators.features import image_batches
from pretrain.model import AttentionHead, input_statistics, resolve_stages
from pretrain.objective import Objective, attention_objective
from pretrain.probe_config import ProbeConfig
from pretrain.trainer import make_dataset, open_data
from shards.gaze import load_targets, score_densities
from shards.reader import ShardSet


class Readout(nn.Module):
    """Attention heads on a frozen backbone."""

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


def alignment(subject: Subject, probe: ProbeConfig) -> Result:
    """Score the attention head, or a read-out trained on the frozen encoder where it has none, against human gaze.

    Metrics: `nss`, `kld`, `cc`, `sim`, `auc_judd`, means over the images of the gaze shards with at least one fixation.

    Raises:
        InputError: shards without gaze, or no labels to train a read-out from.
    """
    gaze = ShardSet(probe.gaze)
    targets = load_targets(gaze)
    readout = Readout(subject.config, subject.backbone).to(subject.device)
    heads = load_heads(subject.encoder) if subject.encoder is not None else {}
    source = "the student's own head"
    if heads:
        readout.heads.load_state_dict(heads)
    else:
        source = f"read-out trained for {subject.step} steps on the frozen encoder"
        train_readout(readout, subject, probe)
    densities = predict_densities(readout.eval(), subject, probe, gaze)
    numbers = [int(gaze.shard_starts[target.shard]) + target.row for target in targets]
    chosen = [densities[i] for i in numbers]
    metrics = score_densities(targets, chosen, stride=probe.gaze_options.stride)
    protocol = {
        "gaze": {"samples": gaze.num_samples, "scored": len(targets), "digest": gaze.digest},
        "map": source,
        "stride": probe.gaze_options.stride,
        "seed": probe.seed,
    }
    maps = {target.key: density for target, density in zip(targets, chosen, strict=True)}
    return Result({name: float(value) for name, value in metrics.items()}, protocol, maps)


def predict_densities(readout: Readout, subject: Subject, probe: ProbeConfig, gaze: ShardSet) -> np.ndarray:
    """Densities `(num_samples, rows, columns)` of whole images, squeezed to the student's square input.

    With heads on several stages, the mean of their densities on the finest stage's grid.
    """
    parts = []
    with torch.inference_mode():
        for images, _ in image_batches(subject, probe, gaze, crop=0.0):
            logits = readout(subject.backbone, images)
            grid = max((tuple(one.shape[1:]) for one in logits), default=(1, 1))
            fine = [_upsample(log_density(one).exp(), grid) for one in logits]
            parts.append(torch.stack(fine).mean(0).cpu().numpy())
    gathered = subject.ranks.gather(np.concatenate(parts) if parts else None)
    return np.concatenate([part for part in gathered if part is not None])


def train_readout(readout: Readout, subject: Subject, probe: ProbeConfig) -> None:
    """Train the heads alone, on the run's own views, batches and attention loss, for as many steps as the run had.

    Every rank trains the same heads on the whole batch: the result does not depend on the number of ranks.
    """
    run = subject.config
    labels = probe.labels or run.data.labels
    if labels is None:
        raise InputError(f"{probe.run} has no attention head: give label shards to train a read-out with --labels")
    arm: Arm = "contrastive+attention" if run.contrastive else "supervised+attention"
    config = dataclasses.replace(run, arm=arm, data=dataclasses.replace(run.data, labels=labels, teacher=None))
    shards = open_data(config)
    torch.manual_seed(probe.seed)
    optimizer = torch.optim.AdamW(readout.parameters(), lr=probe.gaze_options.readout_lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, subject.step)
    objective = Objective(subject.backbone, config, input_statistics(subject.backbone), subject.device)
    batches = view_batches(
        make_dataset(config, shards),
        data=config.data,
        loop=dataclasses.replace(run.loop, num_workers=probe.num_workers),
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=subject.step,
        seed=run.seed,
    )
    for step, batch in enumerate(batches):
        batch = batch.to(subject.device)
        loss, _ = attention_objective(readout(subject.backbone, objective.prepare(batch)), batch, config.attention)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            subject.report(f"read-out step {step}/{subject.step} loss {loss.item():.4f}")


def _upsample(density: Tensor, grid: tuple[int, ...]) -> Tensor:
    fine = functional.interpolate(density.unsqueeze(1), size=grid, mode="bilinear", align_corners=False).squeeze(1)
    return fine / fine.sum((1, 2), keepdim=True)
