"""Control label sets: the same maps, no longer fitting their images, to see what the fit is worth."""

from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from attention.maps import decode_map_np
from engine.errors import InputError
from shards.folder import open_folder
from shards.labels import (
    MAP,
    claim_directory,
    encode_label,
    is_teacher_hash,
    label_directory,
    labels_complete,
    seal_labels,
    write_label_shard,
)
from shards.manifest import Manifest, holds_objects, read_manifest
from shards.map_png import decode_map_png
from shards.objects import OBJECTS
from shards.order import stable_permutation
from shards.quarantine import read_quarantine
from shards.reader import BadSample, ShardSet

CONTROLS = ("shuffled", "centre_bias")

Position = tuple[int, int]


def write_control(
    kind: str, images: ShardSet, labels: Path | str, root: Path | str, *, seed: int = 0
) -> tuple[Path, Manifest]:
    """Write a control of a sealed label set.

    Args:
        kind: `shuffled`: every image gets another image's map (one random cycle over all maps, so none keeps its own);
            `centre_bias`: every image gets the mean of all maps. Of objects there is `shuffled` alone. Maps of
            quarantined samples are left out, and their rows keep none; the control gets the labels' quarantine, so
            that both are read in the same order.
        labels: folder of the sealed label set.
        root: folder for label sets; the control gets its own folder in it, named for teacher, kind and seed.

    Returns:
        The folder and the manifest. A second call completes what a killed one left and changes nothing else.

    Raises:
        InputError: unknown kind, labels that are damaged, do not fit the images or are a control themselves, or a
            control of other labels in the folder: one that a run may have been trained on is never overwritten.
    """
    if kind not in CONTROLS:
        raise InputError(f"control {kind!r}: give one of {', '.join(CONTROLS)}")
    folder = open_folder(labels, remote=images.remote)
    manifest = read_manifest(folder, kind="labels")
    teacher, settings = _described(manifest, labels)
    objects = holds_objects(manifest)
    if objects and kind != "shuffled":
        raise InputError(f"control {kind!r} of {labels}: these labels are objects, which have no mean: give shuffled")
    source = ShardSet(images.root, labels=labels, objects=objects, remote=images.remote)
    own = label_directory(root, teacher["hash"])
    directory = own.with_name(f"{own.name}-{kind}" + (f"-{seed}" if kind == "shuffled" else ""))
    try:
        labelled = _labelled(source)
        map_at = _shuffled(source, labelled, seed=seed) if kind == "shuffled" else _mean(source, labelled)
        positions_of = {shard: list(found) for shard, found in groupby(labelled, key=itemgetter(0))}
        claim_directory(directory, {"source": manifest.digest, "samples": source.digest})
        for shard in range(source.manifest.num_shards):
            if not labels_complete(directory, images, shard):
                given = ((source.key(*position), map_at(position)) for position in positions_of.get(shard, []))
                write_label_shard(directory, images, shard, given, member=OBJECTS if objects else MAP)
    except BadSample as error:
        raise InputError(f"{labels}: {error}: run python shards/verify.py {labels}") from error
    control = {"control": kind} | ({"seed": seed} if kind == "shuffled" else {})
    left_out = read_quarantine(folder, manifest)
    return directory, seal_labels(directory, images, teacher=teacher | control, settings=settings, left_out=left_out)


def _described(manifest: Manifest, labels: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the manifest of a label set says about teacher and settings."""
    teacher, settings = (manifest.extra.get(key) for key in ("teacher", "settings"))
    if not (isinstance(teacher, dict) and is_teacher_hash(teacher.get("hash")) and isinstance(settings, dict)):
        raise InputError(f"{labels}/manifest.json: no hash of a teacher in it, or no settings: label the images again")
    if "control" in teacher:
        raise InputError(f"{labels}: is itself a control: give the label set that it was made of")
    return teacher, settings


def _labelled(source: ShardSet) -> list[Position]:
    """(shard, row) of every usable sample with a map, in order."""
    found = [
        (shard, row)
        for shard in range(source.manifest.num_shards)
        for row in range(int(source.shard_sizes[shard]))
        if source.read_label(shard, row) is not None
    ]
    if len(found) < 2:
        raise InputError(f"{source.root}: a control needs at least 2 labelled images, {len(found)} found")
    return found


def _shuffled(source: ShardSet, labelled: list[Position], *, seed: int) -> Callable[[Position], bytes]:
    cycle = [labelled[i] for i in stable_permutation(len(labelled), seed, "shuffled labels")]
    donor = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return lambda position: source.read_label(*donor[position]) or b""


def _mean(source: ShardSet, labelled: list[Position]) -> Callable[[Position], bytes]:
    total: np.ndarray | None = None
    for position in labelled:
        stored = source.read_label(*position) or b""
        try:
            density = decode_map_np(decode_map_png(stored)).astype(np.float64)
            if total is not None and density.shape != total.shape:
                raise ValueError("of {}x{}, the others are {}x{}".format(*density.shape, *total.shape))
        except ValueError as error:
            file = source.manifest.files[position[0]]
            raise BadSample(source.key(*position), file, f"label map: {error}") from error
        total = density if total is None else total + density
    assert total is not None  # `_labelled` found two maps at least
    data = encode_label(total / len(labelled))
    return lambda _: data
