"""Top-1 accuracy of a linear classifier on frozen features (SimCLR's protocol on cached features)."""

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import InputError
from pretrain.evaluators.base import Result, Subject
from pretrain.evaluators.features import pooled_features
from pretrain.model import build_backbone
from pretrain.probe_config import LinearConfig, ProbeConfig
from shards.reader import ShardSet


def linear_probe(subject: Subject, probe: ProbeConfig) -> Result:
    """Train a linear classifier on the training shards' features, measure it on the validation shards'.

    Metrics: `top1` (percent), with `linear.random_init` also `random_init_top1` of the same backbone, untrained.

    Raises:
        InputError: unlabelled shards, or classes that differ between the two sets.
    """
    train, val = ShardSet(probe.train), ShardSet(probe.val)
    if train.classes != val.classes:
        raise InputError(f"{probe.train} and {probe.val} have different classes: probe within one data set")
    top1, rate = _probe(subject, probe, train, val)
    metrics = {"top1": top1}
    if probe.linear.random_init:
        untrained = copy.copy(subject)
        torch.manual_seed(probe.seed)
        backbone = build_backbone(subject.config)
        untrained.backbone = backbone.eval().requires_grad_(False).to(subject.device)
        metrics["random_init_top1"], _ = _probe(untrained, probe, train, val)
    protocol = {
        "train": {"samples": train.num_samples, "digest": train.digest},
        "val": {"samples": val.num_samples, "digest": val.digest},
        "epochs": probe.linear.epochs,
        "learning_rate": rate,
        "crop": probe.crop,
        "seed": probe.seed,
    }
    return Result(metrics, protocol)


def _probe(subject: Subject, probe: ProbeConfig, train: ShardSet, val: ShardSet) -> tuple[float, float]:
    features, labels = pooled_features(subject, probe, train)
    held_out, answers = pooled_features(subject, probe, val)
    scores, rate = fit_linear(
        features, labels, held_out, num_classes=len(train.classes), config=probe.linear, seed=probe.seed
    )
    return 100 * (scores.argmax(1) == answers).double().mean().item(), rate


def fit_linear(
    features: Tensor, labels: Tensor, held_out: Tensor, *, num_classes: int, config: LinearConfig, seed: int
) -> tuple[Tensor, float]:
    """Choose a learning rate on a tenth of the training set, train on all of it, and score `held_out`.

    Args:
        features: `(num_samples, dim)`; standardised here with their own mean and deviation.
        labels: `(num_samples,)` in [0, num_classes).
        held_out: `(num_held_out, dim)`.

    Returns:
        Class scores `(num_held_out, num_classes)` and the learning rate.
    """
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    features, held_out = (features - mean) / std, (held_out - mean) / std
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    chosen, rest = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    rate = config.rates[0]
    if len(config.rates) > 1 and len(rest):
        heads = _train_heads(features[rest], labels[rest], config.rates, num_classes, config=config, seed=seed)
        scores = torch.einsum("nd,rdc->rnc", _with_bias(features[chosen]), heads)
        correct = (scores.argmax(2) == labels[chosen]).double().mean(1)
        rate = config.rates[int(correct.argmax())]
    head = _train_heads(features, labels, [rate], num_classes, config=config, seed=seed)[0]
    return _with_bias(held_out) @ head, rate


def _train_heads(
    features: Tensor, labels: Tensor, rates: list[float], num_classes: int, *, config: LinearConfig, seed: int
) -> Tensor:
    """One head per learning rate, all in one pass: `(rates, dim + 1, num_classes)`."""
    inputs = _with_bias(features)
    heads = torch.zeros(len(rates), inputs.shape[1], num_classes, requires_grad=True)
    momentum = torch.zeros_like(heads)
    scale = torch.tensor(rates).view(-1, 1, 1) * config.batch_size / 256
    generator = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(len(inputs) / config.batch_size)
    total = config.epochs * per_epoch
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(inputs), generator=generator)
        rows = order[step % per_epoch * config.batch_size :][: config.batch_size]
        scores = torch.einsum("nd,rdc->rnc", inputs[rows], heads)
        targets = labels[rows].expand(len(rates), -1)
        loss = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum") / len(rows)
        (gradient,) = torch.autograd.grad(loss, heads)
        with torch.no_grad():
            gradient = gradient + config.weight_decay * heads
            momentum = 0.9 * momentum + gradient
            rate = scale * 0.5 * (1 + math.cos(math.pi * step / total))
            heads -= rate * (gradient + 0.9 * momentum)
    return heads.detach()


def _with_bias(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
