"""How far the predicted attention moves under each corruption, beside the accuracy lost."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attention.metrics import kld
from engine.errors import InputError
from pretrain.evaluators.attention_maps import Readout, open_readout, readout_key
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.cache import Outputs, key_digest
from pretrain.evaluators.corruptions import ALL, COMMON, GROUPS, SEVERITIES
from pretrain.evaluators.features import collect, collect_each, pooled
from pretrain.evaluators.imagenet_c import CorruptedSets
from pretrain.evaluators.kept import Condition, KeptNumbers
from pretrain.evaluators.linear_probe import accuracies, fit_on, linear_protocol, pair_protocol
from pretrain.evaluators.prepare import CentreCrop
from pretrain.evaluators.reading import Compute, Job
from pretrain.evaluators.sources import ShardImages, labelled_pair
from pretrain.evaluators.subjects import state_hash
from pretrain.probe_config import ProbeConfig

Table = dict[str, list[float]]
Moved = Mapping[Condition, tuple[float, ...]]
NAMES = ("kld", "lost")


def robust_gaze(subject: Subject, probe: ProbeConfig) -> Result:
    """How far the predicted map moves from that of the clean image: `KLD(clean | corrupted)`.

    Metrics per `<corruption>/<severity>`, per corruption, per group, and over the 15 corruptions (or those of them that
    were measured): `kld` (nats, mean over images, 0: the map does not move) and `lost` (top-1 points lost by a linear
    probe trained on clean images); `correlation` is Pearson's between the two over the conditions. What was measured
    before is not measured again.

    Raises:
        InputError: a released set (its images have no clean twin), no class labels, no labels for a read-out.
    """
    train, val = labelled_pair(probe)
    corrupted = twins(subject, probe, val)
    readout, made = open_readout(subject, probe)
    head = fit_on(subject, probe, train)
    compute, key = maps_and_features(subject, readout), f"maps-and-features-{state_hash(readout)}"
    clean = collect(subject, probe, Job(val, CentreCrop(subject.image_size, probe.crop), compute, key, "clean maps"))
    use = clean["labels"] >= 0
    if not use.any():
        raise InputError(f"{val.name}: no labelled image can be read")
    if not use.all():
        subject.report(f"{val.name}: {int((~use).sum())} of {len(use)} images unreadable or unlabelled, left out")
    labels, maps = clean["labels"][use], clean["maps"][use]
    top1 = accuracies(head.scores(clean["features"][use]), labels)["top1"]
    kept = kept_moves(subject, probe, corrupted, train)
    # rank 0 says what is left to do: jobs of an array write at any time, and the ranks must do the same
    missing = subject.ranks.broadcast([one for one in corrupted.conditions() if not kept.has(one)])
    jobs = (
        Job(source, prepare, compute, key, f"{name} {severity}")
        for (name, severity), (source, prepare) in zip(missing, corrupted.open_each(missing), strict=True)
    )
    for condition, found in zip(missing, collect_each(subject, probe, jobs), strict=True):
        lost = top1 - accuracies(head.scores(found["features"][use]), labels)["top1"]
        moved = float(kld(found["maps"][use], maps).double().mean())
        subject.report(f"robust_gaze: {condition[0]} severity {condition[1]}: kld {moved:.4f}, lost {lost:.2f}")
        kept.put(condition, moved, lost, write=subject.ranks.is_main)
    protocol = pair_protocol(probe, train, val) | linear_protocol(probe, head) | corrupted.protocol()
    protocol |= made | {"clean_top1": top1, "grid": list(maps.shape[1:])}
    return summary(subject.ranks.broadcast(kept.all()), protocol=protocol)


def twins(subject: Subject, probe: ProbeConfig, val: ShardImages) -> CorruptedSets:
    """The corrupted sets, each image with its clean twin.

    Raises:
        InputError: a released set.
    """
    if probe.corruptions.folder is not None:
        raise InputError("robust_gaze compares each image with its clean twin: leave out corruptions.folder")
    return CorruptedSets(subject, probe, val)


def kept_moves(subject: Subject, probe: ProbeConfig, corrupted: CorruptedSets, train: ShardImages) -> KeptNumbers:
    """The conditions that were measured."""
    key = corrupted.key(subject, probe, train) | {"readout": key_digest(readout_key(subject, probe))}
    return KeptNumbers(subject.cache, key, kind="gaze", names=NAMES)


def summary(moved: Moved, *, protocol: dict[str, Any]) -> Result:
    """The result of whatever was measured so far.

    Args:
        moved: condition to `kld` and `lost`.
        protocol: of data, probe, maps and corrupted sets.
    """
    missing = sum((name, severity) not in moved for name in COMMON for severity in SEVERITIES)
    protocol = protocol | {"complete": not missing, "conditions": len(moved)}
    note = f"PARTIAL, {missing} of 75 missing" if missing else ""
    return Result(_metrics(moved), protocol, tables={"conditions": _table(moved)}, note=note)


def maps_and_features(subject: Subject, readout: Readout) -> Compute:
    """Computes `maps` `(batch, rows, columns)` and `features` `(batch, num_features)` of the same images."""
    features = pooled(subject)

    def compute(images: Tensor) -> Outputs:
        return features(images) | {"maps": readout.densities(subject.backbone, images)}

    return compute


def _metrics(moved: Moved) -> dict[str, float]:
    counted = [pair for (name, _), pair in moved.items() if name in COMMON] or list(moved.values())
    pairs = torch.tensor(counted, dtype=torch.float64)
    metrics = {"kld": float(pairs[:, 0].mean()), "lost": float(pairs[:, 1].mean())}
    if len(pairs) > 2 and bool((pairs.std(0) > 0).all()):
        metrics["correlation"] = float(torch.corrcoef(pairs.T)[0, 1])
    names = {name for name, _ in moved}
    rows = {group: members for group, members in GROUPS.items() if set(members) <= names}
    for label, members in {**rows, **{name: (name,) for name in ALL if name in names}}.items():
        chosen = torch.tensor([pair for (name, _), pair in moved.items() if name in members], dtype=torch.float64)
        metrics |= {f"{label}/kld": float(chosen[:, 0].mean()), f"{label}/lost": float(chosen[:, 1].mean())}
    for (name, severity), (distance, lost) in moved.items():
        metrics |= {f"{name}/{severity}/kld": distance, f"{name}/{severity}/lost": lost}
    return metrics


def _table(moved: Moved) -> Table:
    """Conditions in order; a corruption is given by its number among ImageNet-C's."""
    return {
        "corruption": [float(ALL.index(name)) for name, _ in moved],
        "severity": [float(severity) for _, severity in moved],
        "kld": [pair[0] for pair in moved.values()],
        "lost": [pair[1] for pair in moved.values()],
    }


evaluator = Evaluator("robust_gaze", needs=("train", "val"), run=robust_gaze)
