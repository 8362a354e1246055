"""Top-1 accuracy of k nearest neighbours on frozen features."""

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import InputError
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.features import pooled_features
from pretrain.evaluators.linear_probe import accuracies, pair_protocol
from pretrain.evaluators.sources import labelled_pair
from pretrain.probe_config import ProbeConfig

BANK_CHUNK = 65536  # training features compared at a time


def knn(subject: Subject, probe: ProbeConfig) -> Result:
    """Classify the validation images by their nearest training images.

    Metrics, percent: `top1`, with more than five classes `top5`.

    Raises:
        InputError: unlabelled shards, classes that differ, or fewer training images than `knn.k`.
    """
    config = probe.knn
    train, val = labelled_pair(probe)
    bank, classes = pooled_features(subject, probe, train)
    queries, labels = pooled_features(subject, probe, val)
    if config.k > len(bank):
        raise InputError(f"knn.k {config.k} is more than the {len(bank)} training images: give a smaller k")
    scores = knn_scores(
        queries.to(subject.device),
        bank.to(subject.device),
        classes.to(subject.device),
        num_classes=len(train.classes),
        k=config.k,
        temperature=config.temperature,
        chunk=config.chunk,
    )
    protocol = pair_protocol(probe, train, val) | {"k": config.k, "temperature": config.temperature}
    return Result(accuracies(scores.cpu(), labels), protocol, note=f"k {config.k}, T {config.temperature:g}")


def knn_scores(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
    chunk: int = 1024,
) -> Tensor:
    """Votes of the k nearest: `score_c = sum_(i in top k, y_i = c) exp(s_i / T)`, s the cosine similarity.

    Args:
        queries: `(num_queries, dim)`.
        bank: `(num_samples, dim)`.
        labels: `(num_samples,)` in [0, num_classes).
        k: at most num_samples.
        chunk: queries at a time; memory is `chunk` x 65,536 similarities.

    Returns:
        `(num_queries, num_classes)`, positive where a neighbour has the class.

    Source: Wu et al., CVPR 2018 (InstDisc).
    """
    bank = functional.normalize(bank, dim=1)
    parts = [
        _votes(functional.normalize(part, dim=1), bank, labels, num_classes=num_classes, k=k, temperature=temperature)
        for part in queries.split(chunk)
    ]
    return torch.cat(parts)


def _votes(queries: Tensor, bank: Tensor, labels: Tensor, *, num_classes: int, k: int, temperature: float) -> Tensor:
    best = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), BANK_CHUNK):
        similarity = queries @ bank[start : start + BANK_CHUNK].T
        values, indices = similarity.topk(min(k, similarity.shape[1]), dim=1)
        best, places = torch.cat([best, values], dim=1), torch.cat([places, indices + start], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        places = places.gather(1, kept)
    votes = torch.zeros(len(queries), num_classes, device=queries.device)
    return votes.scatter_add_(1, labels[places], (best / temperature).exp())


evaluator = Evaluator("knn", needs=("train", "val"), run=knn)
