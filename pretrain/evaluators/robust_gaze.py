"""How far the predicted attention moves under each corruption, beside the accuracy lost."""

import torch
from torch import Tensor

from attention.metrics import kld
from engine.errors import InputError
from pretrain.evaluators.attention_maps import Readout, open_readout
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.corruptions import ALL, COMMON, GROUPS, SEVERITIES
from pretrain.evaluators.features import Compute, Job, Outputs, collect, pooled
from pretrain.evaluators.imagenet_c import CorruptedSets
from pretrain.evaluators.linear_probe import accuracies, fit_on, linear_protocol, pair_protocol
from pretrain.evaluators.prepare import CentreCrop, Prepare
from pretrain.evaluators.sources import ImageSource, labelled_pair
from pretrain.evaluators.subjects import state_hash
from pretrain.probe_config import ProbeConfig

Table = dict[str, list[float]]


def robust_gaze(subject: Subject, probe: ProbeConfig) -> Result:
    """How far the predicted map moves from that of the clean image: `KLD(clean | corrupted)`.

    Metrics per `<corruption>/<severity>`, per corruption, per group, and over the 15 corruptions (or those of them that
    were asked for): `kld` (nats, mean over images, 0: the map does not move) and `lost` (top-1 points lost by a linear
    probe trained on clean images); `correlation` is Pearson's between the two over the conditions.

    Raises:
        InputError: a released set (its images have no clean twin), no class labels, no labels for a read-out.
    """
    if probe.corruptions.folder is not None:
        raise InputError("robust_gaze compares each image with its clean twin: leave out corruptions.folder")
    train, val = labelled_pair(probe)
    corrupted = CorruptedSets(subject, probe, val)
    readout, origin = open_readout(subject, probe)
    head = fit_on(subject, probe, train)
    compute, key = maps_and_features(subject, readout), f"maps-and-features-{state_hash(readout)}"

    def outputs(source: ImageSource, prepare: Prepare, title: str) -> Outputs:
        return collect(subject, probe, Job(source, prepare, compute, key, title))

    clean = outputs(val, CentreCrop(subject.image_size, probe.crop), "clean maps")
    use = clean["labels"] >= 0
    if not use.any():
        raise InputError(f"{val.name}: no labelled image can be read")
    labels, maps = clean["labels"][use], clean["maps"][use]
    top1 = accuracies(head.scores(clean["features"][use]), labels)["top1"]
    moved: dict[tuple[str, int], tuple[float, float]] = {}
    for name, severity in corrupted.conditions():
        source, prepare = corrupted.open((name, severity))
        found = outputs(source, prepare, f"{name} {severity}")
        lost = top1 - accuracies(head.scores(found["features"][use]), labels)["top1"]
        moved[name, severity] = float(kld(found["maps"][use], maps).double().mean()), lost
        subject.report(f"robust_gaze: {name} severity {severity}: kld {moved[name, severity][0]:.4f}, lost {lost:.2f}")
    protocol = pair_protocol(probe, train, val) | linear_protocol(probe, head)
    protocol |= corrupted.protocol() | {"map": origin, "clean_top1": top1, "grid": list(maps.shape[1:])}
    missing = sum((name, severity) not in moved for name in COMMON for severity in SEVERITIES)
    protocol |= {"complete": not missing, "conditions": len(moved)}
    note = f"PARTIAL, {missing} of 75 missing" if missing else ""
    return Result(_metrics(moved), protocol, tables={"conditions": _table(moved)}, note=note)


def maps_and_features(subject: Subject, readout: Readout) -> Compute:
    """Computes `maps` `(batch, rows, columns)` and `features` `(batch, num_features)` of the same images."""
    features = pooled(subject)

    def compute(images: Tensor) -> Outputs:
        return features(images) | {"maps": readout.densities(subject.backbone, images)}

    return compute


def _metrics(moved: dict[tuple[str, int], tuple[float, float]]) -> dict[str, float]:
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


def _table(moved: dict[tuple[str, int], tuple[float, float]]) -> Table:
    """Conditions in order; a corruption is given by its number among ImageNet-C's."""
    return {
        "corruption": [float(ALL.index(name)) for name, _ in moved],
        "severity": [float(severity) for _, severity in moved],
        "kld": [pair[0] for pair in moved.values()],
        "lost": [pair[1] for pair in moved.values()],
    }


evaluator = Evaluator("robust_gaze", needs=("train", "val"), run=robust_gaze)
