"""Top-1 accuracy of a linear classifier on frozen features (SimCLR's protocol on cached features)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.cache import kept_tensors, key_digest
from pretrain.evaluators.features import pooled_features, view_features
from pretrain.evaluators.sources import ImageSource, ShardImages, labelled_pair
from pretrain.evaluators.subjects import untrained
from pretrain.probe_config import LinearConfig, ProbeConfig


@dataclass(frozen=True)
class LinearHead:
    """A classifier of standardised features.

    Attributes:
        mean, std: `(dim,)` of the training features.
        weights: `(dim + 1, num_classes)`, the bias last.
        rate: the learning rate that was chosen.
    """

    mean: Tensor
    std: Tensor
    weights: Tensor
    rate: float

    def scores(self, features: Tensor) -> Tensor:
        """Class scores `(num_samples, num_classes)` of features `(num_samples, dim)`."""
        mean, std, weights = (each.to(features.device) for each in (self.mean, self.std, self.weights))
        return _with_bias((features - mean) / std) @ weights


def linear_probe(subject: Subject, probe: ProbeConfig) -> Result:
    """Train a linear classifier on the training shards' features, measure it on the validation shards'.

    Metrics, percent: `top1`, with more than five classes `top5`, with `linear.random_init` also `random_init_top1` of
    the same backbone, untrained.

    Raises:
        InputError: unlabelled shards, or classes that differ between the two sets.
    """
    train, val = labelled_pair(probe)
    head = fit_on(subject, probe, train)
    features, labels = pooled_features(subject, probe, val)
    metrics = accuracies(head.scores(features), labels)
    if probe.linear.random_init:
        floor = untrained(subject, seed=probe.seed)
        features, labels = pooled_features(floor, probe, val)
        metrics["random_init_top1"] = accuracies(fit_on(floor, probe, train).scores(features), labels)["top1"]
    protocol = pair_protocol(probe, train, val) | linear_protocol(probe, head)
    return Result(metrics, protocol, note=f"lr {head.rate:g}, {probe.linear.epochs} epochs")


def linear_protocol(probe: ProbeConfig, head: LinearHead) -> dict[str, object]:
    """How a linear head was trained, for protocols."""
    config = probe.linear
    return {
        "epochs": config.epochs,
        "learning_rate": head.rate,
        "batch_size": config.batch_size,
        "weight_decay": config.weight_decay,
        "views": config.views,
    }


def pair_protocol(probe: ProbeConfig, train: ShardImages, val: ImageSource) -> dict[str, object]:
    """What every evaluator on a labelled pair says of its data."""
    return {
        "train": {"samples": len(train), "digest": train.digest},
        "val": {"samples": len(val), "digest": val.digest},
        "crop": probe.crop,
        "seed": probe.seed,
    }


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """`top1`, and with more than five classes `top5`, in percent, of scores `(num_samples, num_classes)`."""
    ranked = scores.topk(min(5, scores.shape[1])).indices
    hits = ranked == labels[:, None]
    found = {"top1": 100 * hits[:, 0].double().mean().item()}
    return found | ({"top5": 100 * hits.any(1).double().mean().item()} if scores.shape[1] > 5 else {})


def fit_on(subject: Subject, probe: ProbeConfig, train: ShardImages) -> LinearHead:
    """The head that `probe.linear` describes, trained on the subject's features of `train`; kept in the cache."""
    key = {
        "encoder": subject.hash,
        "train": train.digest,
        "options": key_digest([vars(probe.linear), probe.crop, probe.seed, subject.image_size, subject.statistics]),
    }

    def make() -> dict[str, Tensor]:
        head = _fit(subject, probe, train)
        rate = torch.tensor(head.rate, dtype=torch.float64)
        return {"mean": head.mean, "std": head.std, "weights": head.weights, "rate": rate}

    kept = kept_tensors(subject.cache, "linear", key, make, ranks=subject.ranks)
    return LinearHead(kept["mean"], kept["std"], kept["weights"], kept["rate"].item())


def _fit(subject: Subject, probe: ProbeConfig, train: ShardImages) -> LinearHead:
    features, labels = pooled_features(subject, probe, train)
    count = probe.linear.views

    def view(epoch: int) -> Tensor:
        # one view at a time: all of them together fit into no memory on a large set
        return view_features(subject, probe, train, number=epoch % count, count=count).to(subject.device)

    return fit_head(
        features.to(subject.device),
        labels.to(subject.device),
        num_classes=len(train.classes),
        config=probe.linear,
        seed=probe.seed,
        view=view if count else None,
    )


def fit_linear(
    features: Tensor, labels: Tensor, held_out: Tensor, *, num_classes: int, config: LinearConfig, seed: int
) -> tuple[Tensor, float]:
    """Train as `fit_head` and score `held_out`.

    Args:
        held_out: `(num_held_out, dim)`.

    Returns:
        Class scores `(num_held_out, num_classes)` and the learning rate.
    """
    head = fit_head(features, labels, num_classes=num_classes, config=config, seed=seed)
    return head.scores(held_out), head.rate


def fit_head(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    config: LinearConfig,
    seed: int,
    view: Callable[[int], Tensor] | None = None,
) -> LinearHead:
    """Choose a learning rate on a tenth of the training set, train on all of it.

    Args:
        features: `(num_samples, dim)` of the centre crops; standardised here with their own mean and deviation.
        labels: `(num_samples,)` in [0, num_classes).
        view: gives the features `(num_samples, dim)` of an augmented view to train on in an epoch, counted from 0; None
            trains on the centre crops.

    Returns:
        The head, on CPU.
    """
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)

    def inputs(epoch: int) -> Tensor:
        return _with_bias(((features if view is None else view(epoch)) - mean) / std)

    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    chosen, rest = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    rate = config.rates[0]
    if len(config.rates) > 1 and len(rest):
        heads = _train_heads(
            lambda epoch: inputs(epoch)[rest], labels[rest], config.rates, num_classes, config=config, seed=seed
        )
        scores = torch.einsum("nd,rdc->rnc", _with_bias((features[chosen] - mean) / std), heads)
        correct = (scores.argmax(2) == labels[chosen]).double().mean(1)
        rate = config.rates[int(correct.argmax())]
    weights = _train_heads(inputs, labels, [rate], num_classes, config=config, seed=seed)[0]
    return LinearHead(mean.cpu(), std.cpu(), weights.cpu(), rate)


def _train_heads(
    inputs: Callable[[int], Tensor],
    labels: Tensor,
    rates: list[float],
    num_classes: int,
    *,
    config: LinearConfig,
    seed: int,
) -> Tensor:
    """One head per learning rate, all in one pass: `(rates, dim + 1, num_classes)`."""
    data, count, device = inputs(0), len(labels), labels.device
    heads = torch.zeros(len(rates), data.shape[1], num_classes, requires_grad=True, device=device)
    momentum = torch.zeros_like(heads)
    scale = torch.tensor(rates, device=device).view(-1, 1, 1) * config.batch_size / 256
    generator = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(count / config.batch_size)
    total = config.epochs * per_epoch
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(count, generator=generator).to(device)
            if config.views and step:
                data = inputs(step // per_epoch)
        rows = order[step % per_epoch * config.batch_size :][: config.batch_size]
        scores = torch.einsum("nd,rdc->rnc", data[rows], heads)
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
    return torch.cat([features, features.new_ones((*features.shape[:-1], 1))], dim=-1)


evaluator = Evaluator("linear_probe", needs=("train", "val"), run=linear_probe)
