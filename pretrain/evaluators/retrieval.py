"""Image retrieval on frozen features: precision-recall curve, mean average precision, precision at k."""

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import InputError
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.corruptions import ALL, check_package, check_severities, warm_up
from pretrain.evaluators.features import pooled_features
from pretrain.evaluators.linear_probe import pair_protocol
from pretrain.evaluators.prepare import CentreCrop, Corrupted, Prepare
from pretrain.evaluators.sources import labelled_pair
from pretrain.probe_config import ProbeConfig, RetrievalConfig


def retrieval(subject: Subject, probe: ProbeConfig) -> Result:
    """Search the gallery with every validation image; images of its class are the hits.

    Metrics: `map`, `p_at_<k>`, all 0 to 1, means over queries; the table `precision_recall` is the mean interpolated
    precision at each recall level.

    Raises:
        InputError: a gallery of one class, a rank beyond the gallery, an unknown corruption, or no query whose class
            is in the gallery.
    """
    config = probe.retrieval
    train, val = labelled_pair(probe)
    clean = CentreCrop(subject.image_size, probe.crop)
    queries, labels = pooled_features(subject, probe, val, prepare=_query_preparation(config, clean, subject, probe))
    leave_one_out = config.gallery == "leave_one_out"
    gallery, classes = pooled_features(subject, probe, val if leave_one_out else train, prepare=clean)
    if len(classes.unique()) < 2:
        raise InputError(f"retrieval: the gallery ({config.gallery}) holds one class only: every image would be a hit")
    if leave_one_out and len(gallery) != len(queries):
        raise InputError("retrieval: images that can be read clean and not corrupted: run shards/verify.py on the set")
    size = len(gallery) - leave_one_out
    if not config.ranks or min(config.ranks) < 1 or max(config.ranks) > size:
        raise InputError(f"retrieval.ranks {config.ranks}: give ranks of 1 to the gallery's {size} images")
    metrics, curve, used = score_retrieval(
        queries.to(subject.device),
        labels.to(subject.device),
        gallery.to(subject.device),
        classes.to(subject.device),
        config=config,
    )
    protocol = pair_protocol(probe, train, val) | {
        "gallery": {"kind": config.gallery, "samples": size},
        "queries": {"samples": used, "left_out": len(queries) - used, "corruption": config.corruption},
    }
    if config.corruption is not None:
        protocol["severity"] = config.severity
    levels = [i / (config.points - 1) if config.points > 1 else 0.0 for i in range(config.points)]
    query = f"{config.corruption} {config.severity}" if config.corruption else "clean"
    table = {"precision_recall": {"recall": levels, "precision": curve}}
    return Result(metrics, protocol, tables=table, note=f"queries {query}, gallery {config.gallery}")


def score_retrieval(
    queries: Tensor, labels: Tensor, gallery: Tensor, classes: Tensor, *, config: RetrievalConfig
) -> tuple[dict[str, float], list[float], int]:
    """Score a ranking by cosine similarity; with `config.gallery` "leave_one_out" query i leaves gallery image i out.

    Average precision is the mean, over a query's hits, of the precision at the hit's place; images of equal similarity
    share the last place among them, as in scikit-learn's `average_precision_score`.

    Args:
        queries: `(num_queries, dim)`.
        labels: `(num_queries,)`.
        gallery: `(num_images, dim)`.
        classes: `(num_images,)`.

    Returns:
        Metrics; interpolated precision (the best at that recall or beyond) at `config.points` recall levels; number of
        queries scored: those whose class is in the gallery.

    Raises:
        InputError: no query has a hit.
    """
    gallery = functional.normalize(gallery.float(), dim=1)
    levels = torch.linspace(0, 1, config.points, dtype=torch.float64, device=gallery.device)
    averages, precisions, curves = [], [], []
    for start in range(0, len(queries), config.chunk):
        part = functional.normalize(queries[start : start + config.chunk].float(), dim=1)
        similarity = part @ gallery.T
        if config.gallery == "leave_one_out":
            rows = torch.arange(len(part), device=part.device)
            similarity[rows, rows + start] = -torch.inf
        ordered, order = similarity.sort(dim=1, descending=True, stable=True)
        hits = (classes[order] == labels[start : start + config.chunk, None]) & (ordered > -torch.inf)
        kept = hits.any(1)
        found, precision, recall = _ranking(ordered[kept], hits[kept])
        averages.append((precision * found).sum(1) / found.sum(1))
        precisions.append(torch.stack([found[:, :k].double().mean(1) for k in config.ranks], dim=1))
        curves.append(_interpolated(precision, recall, levels))
    average, at_rank, curve = torch.cat(averages), torch.cat(precisions), torch.cat(curves)
    if not len(average):
        raise InputError("retrieval: no query's class is in the gallery: give a gallery of the same classes")
    metrics = {"map": average.mean().item()}
    metrics |= {f"p_at_{k}": value for k, value in zip(config.ranks, at_rank.mean(0).tolist(), strict=True)}
    return metrics, curve.mean(0).tolist(), len(average)


def _ranking(ordered: Tensor, hits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hits, precision and recall at every place of descending similarities; equal ones share their last place."""
    last = torch.searchsorted(-ordered, -ordered, right=True) - 1
    counts = hits.cumsum(1).gather(1, last).double()
    return hits, counts / (last + 1), counts / hits.sum(1, keepdim=True)


def _interpolated(precision: Tensor, recall: Tensor, levels: Tensor) -> Tensor:
    """Best precision at each recall level or beyond: `(num_queries, num_levels)`."""
    best = precision.flip(1).cummax(1).values.flip(1)
    # a rounding error must not push a level beyond the recall that equals it
    places = torch.searchsorted(recall, (levels - 1e-9).expand(len(recall), -1).contiguous())
    return best.gather(1, places.clamp(max=recall.shape[1] - 1))


def _query_preparation(config: RetrievalConfig, clean: CentreCrop, subject: Subject, probe: ProbeConfig) -> Prepare:
    if config.corruption is None:
        return clean
    if config.corruption not in ALL:
        raise InputError(f"retrieval.corruption {config.corruption!r} is none of {', '.join(ALL)}")
    check_severities([config.severity])
    check_package(subject.image_size)
    warm_up([config.corruption])
    return Corrupted(clean, config.corruption, config.severity, probe.seed)


evaluator = Evaluator("retrieval", needs=("train", "val"), run=retrieval)
