"""Accuracy on corrupted images (ImageNet-C and its like) of a linear probe that was trained on clean ones."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from engine.errors import InputError
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.cache import key_digest
from pretrain.evaluators.corruptions import (
    ALL,
    COMMON,
    check_package,
    check_severities,
    choose_corruptions,
    summarise,
    warm_up,
)
from pretrain.evaluators.features import pooled_each, pooled_features
from pretrain.evaluators.kept import Condition, KeptNumbers
from pretrain.evaluators.linear_probe import LinearHead, accuracies, fit_on, linear_protocol, pair_protocol
from pretrain.evaluators.prepare import CentreCrop, Corrupted, Prepare, ReleasedCrop
from pretrain.evaluators.sources import ArrayImages, FolderImages, ImageSource, ShardImages, labelled_pair
from pretrain.probe_config import ProbeConfig

NAMES = ("error",)
IMAGENET_CLASSES, IMAGENET_SIZE = 1000, 224  # those of AlexNet's errors; pixels


def imagenet_c(subject: Subject, probe: ProbeConfig) -> Result:
    """Measure the clean probe under every corruption and severity; what was measured before is not measured again.

    Metrics: see `corruptions.summarise`. A released set with missing severities, or a chosen part, gives a partial
    result: `partial_mean_top1`, no mCE, and the protocol's `missing` names the gaps.

    Raises:
        InputError: an unknown corruption, a released set in neither layout or without one usable severity, the
            package missing.
    """
    train, val = labelled_pair(probe)
    corrupted = CorruptedSets(subject, probe, val)
    head = fit_on(subject, probe, train)
    clean = 1 - _top1(head, *pooled_features(subject, probe, val))
    kept = kept_errors(subject, probe, corrupted, train)
    # rank 0 says what is left to do: jobs of an array write at any time, and the ranks must do the same
    missing = subject.ranks.broadcast([one for one in corrupted.conditions() if not kept.has(one)])
    for condition, (features, labels) in zip(
        missing, pooled_each(subject, probe, corrupted.open_each(missing)), strict=True
    ):
        error = 1 - _top1(head, features, labels)
        subject.report(f"imagenet_c: {condition[0]} severity {condition[1]}: top1 {100 * (1 - error):.2f}")
        kept.put(condition, error, write=subject.ranks.is_main)
    protocol = pair_protocol(probe, train, val) | linear_protocol(probe, head) | corrupted.protocol()
    return summary(subject.ranks.broadcast(kept.all()), clean=clean, protocol=protocol, corrupted=corrupted)


def kept_errors(subject: Subject, probe: ProbeConfig, corrupted: "CorruptedSets", train: ShardImages) -> KeptNumbers:
    """The errors that are known."""
    key = corrupted.key(subject, probe, train)
    return KeptNumbers(subject.cache, key, kind="errors", names=NAMES, images=corrupted.digest)


def summary(
    found: Mapping[Condition, tuple[float, ...]],
    *,
    clean: float,
    protocol: dict[str, Any],
    corrupted: "CorruptedSets",
) -> Result:
    """The result of whatever was measured so far.

    Args:
        found: condition to its error.
        clean: error on the clean images.
        protocol: of data, probe and corrupted sets.
        corrupted: what was measured.
    """
    errors: dict[str, dict[int, float]] = {}
    for (name, severity), (error,) in found.items():
        errors.setdefault(name, {})[severity] = error
    metrics, state = summarise(errors, clean=clean, alexnet=corrupted.layout != "array")
    protocol = protocol | state
    note = "" if state["complete"] else f"PARTIAL, {_gaps(state['missing'])} of 75 missing, no mCE"
    if "mce" in metrics:
        unlike = ", ".join(corrupted.unlike_imagenet())
        protocol["mce"] = "by AlexNet's errors on ImageNet" + (f"; not comparable: {unlike}" if unlike else "")
        note = f"mCE not comparable: {unlike}" if unlike else ""
    return Result(_ordered(metrics), protocol, tables=_tables(errors), note=note)


class CorruptedSets:
    """Every corruption and severity that is asked for, as image sets.

    Attributes:
        layout: "made" on the fly, "folder" for ImageNet-C's release, "array" for CIFAR-10-C's.

    Raises:
        InputError: see `imagenet_c`.
    """

    def __init__(self, subject: Subject, probe: ProbeConfig, val: ShardImages) -> None:
        self.probe, self.val, self.size = probe, val, subject.image_size
        self.names = choose_corruptions(probe.corruptions.names)
        self.severities = check_severities(probe.corruptions.severities)
        self.folder = probe.corruptions.folder
        self._digests: dict[Condition, str] = {}
        if self.folder is None:
            self.layout = "made"
            check_package(self.size)
        elif (self.folder / "labels.npy").is_file():
            self.layout = "array"
        else:
            self.layout = "folder"
        if not self.conditions():
            raise InputError(
                f"{self.folder}: holds none of the corruptions asked for; the layouts known are "
                "<corruption>/<severity>/<class>/*.JPEG and <corruption>.npy with labels.npy"
            )

    def conditions(self) -> list[Condition]:
        """Corruption and severity of every set that is there, in order."""
        return [(name, s) for name in self.names for s in self.severities if self._exists(name, s)]

    def open(self, condition: Condition) -> tuple[ImageSource, Prepare]:
        """The images of one condition and how they become inputs."""
        name, severity = condition
        if self.folder is None:
            clean = CentreCrop(self.size, self.probe.crop)
            return self.val, Corrupted(clean, name, severity, self.probe.seed)
        images: ImageSource
        if self.layout == "array":
            labels = self.folder / "labels.npy"
            images = ArrayImages(self.folder / f"{name}.npy", labels, severity=severity, classes=self.val.classes)
        else:
            images = FolderImages(self.folder / name / str(severity), classes=self.val.classes)
        self._digests[condition] = images.digest
        return images, CentreCrop(self.size, 1.0) if self.layout == "array" else ReleasedCrop(self.size)

    def digest(self, condition: Condition) -> str:
        """Of a released condition's images, as they were when they were last opened; made ones need none: `key`."""
        if self.folder is not None and condition not in self._digests:
            self.open(condition)
        return self._digests.get(condition, "")

    def open_each(self, conditions: Sequence[Condition]) -> Iterator[tuple[ImageSource, Prepare]]:
        """As `open`, one after another when they are needed."""
        if self.folder is None:
            warm_up(name for name, _ in conditions)
        yield from map(self.open, conditions)

    def key(self, subject: Subject, probe: ProbeConfig, train: ShardImages) -> dict[str, object]:
        """All that decides an error, but for what lies in a released folder, which `digest` tells.

        What was measured under another key is not mixed in.
        """
        where = str(self.folder.resolve()) if self.folder is not None else self.val.digest
        options = [vars(probe.linear), probe.crop, probe.seed, self.size, subject.statistics]
        return {
            "encoder": subject.hash,
            "train": train.digest,
            "val": self.val.digest,
            "images": where,
            "options": key_digest(options),
        }

    def protocol(self) -> dict[str, object]:
        """Where the corrupted images came from, for protocols."""
        made = "made on the fly by imagecorruptions on the centre crop" if self.folder is None else "released"
        return {"corruptions": made, "layout": self.layout}

    def unlike_imagenet(self) -> list[str]:
        """Why an mCE is not comparable with published ones; empty where it is."""
        used, whole = len(self.val), self.val.shards.num_samples
        reasons = {
            f"{len(self.val.classes)} classes, not ImageNet's": len(self.val.classes) != IMAGENET_CLASSES,
            f"inputs of {self.size} pixels, not {IMAGENET_SIZE}": self.size != IMAGENET_SIZE,
            f"{used} of {whole} validation images": used < whole,
        }
        return [reason for reason, holds in reasons.items() if holds]

    def _exists(self, name: str, severity: int) -> bool:
        if self.folder is None:
            return True
        if self.layout == "array":
            return (self.folder / f"{name}.npy").is_file()
        return (self.folder / name / str(severity)).is_dir()


def _top1(head: LinearHead, features: Tensor, labels: Tensor) -> float:
    """Share of hits, 0 to 1."""
    return accuracies(head.scores(features), labels)["top1"] / 100


def _gaps(missing: dict[str, list[int]]) -> int:
    return sum(len(severities) for severities in missing.values())


def _ordered(metrics: dict[str, float]) -> dict[str, float]:
    """The summary numbers first, as they are the ones that a log line shows."""
    first = [name for name in metrics if "/" not in name]
    groups = [name for name in metrics if name.endswith("/top1") and name.split("/")[0] not in ALL]
    return {name: metrics[name] for name in [*first, *groups, *metrics]}


def _tables(errors: dict[str, dict[int, float]]) -> dict[str, dict[str, list[float]]]:
    """Mean accuracy in percent by severity over the 15 corruptions, where all of them were measured."""
    full = [s for s in range(1, 6) if all(s in errors.get(name, {}) for name in COMMON)]
    means = [100 * (1 - sum(errors[name][s] for name in COMMON) / len(COMMON)) for s in full]
    return {"by_severity": {"severity": [float(s) for s in full], "top1": means}} if full else {}


evaluator = Evaluator("imagenet_c", needs=("train", "val"), run=imagenet_c)
