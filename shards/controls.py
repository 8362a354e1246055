"""Control label sets: the same maps, no longer fitting their images, to see what the fit is worth."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from attention.maps import decode_map_np
from engine.errors import InputError
from shards.folder import open_folder
from shards.labels import MAP, encode_label, labels_complete, seal_labels, stored_keys, write_label_shard
from shards.manifest import Manifest, holds_objects, read_manifest
from shards.map_png import decode_map_png
from shards.objects import OBJECTS
from shards.order import stable_permutation
from shards.reader import BadSample, ShardSet

CONTROLS = ("shuffled", "centre_bias")

Position = tuple[int, int]


def write_control(
    kind: str, images: ShardSet, labels: Path | str, root: Path | str, *, seed: int = 0
) -> tuple[Path, Manifest]:
    """Write a control of a sealed label set.

    Args:
        kind: `shuffled`: every image gets another image's map (one random cycle over all maps, so none keeps its own);
            `centre_bias`: every image gets the mean of all maps. Of objects there is `shuffled` alone.
        labels: folder of the sealed label set.
        root: folder for label sets; the control gets its own folder in it, named for teacher, kind and seed.

    Returns:
        The folder and the manifest. A second call completes what a killed one left and changes nothing else.

    Raises:
        InputError: unknown kind, or labels that are damaged or do not fit the images.
    """
    if kind not in CONTROLS:
        raise InputError(f"control {kind!r}: give one of {', '.join(CONTROLS)}")
    objects = holds_objects(read_manifest(open_folder(labels, remote=images.remote), kind="labels"))
    if objects and kind != "shuffled":
        raise InputError(f"control {kind!r} of {labels}: these labels are objects, which have no mean: give shuffled")
    source = ShardSet(images.root, labels=labels, objects=objects, remote=images.remote)
    assert source.label_manifest is not None  # labels were given
    teacher, settings = (dict(source.label_manifest.extra[key]) for key in ("teacher", "settings"))
    directory = Path(root) / (str(teacher["hash"])[:16] + (f"-shuffled-{seed}" if kind == "shuffled" else f"-{kind}"))
    try:
        labelled = _labelled(source)
        map_at = _shuffled(source, labelled, seed=seed) if kind == "shuffled" else _mean(source, labelled)
        rows_of: dict[int, list[int]] = {}
        for shard, row in labelled:
            rows_of.setdefault(shard, []).append(row)
        for shard in range(source.manifest.num_shards):
            if not labels_complete(directory, images, shard):
                rows = rows_of.get(shard, [])
                keys = stored_keys(images, shard)
                given = ((keys[row], map_at((shard, row))) for row in rows)
                write_label_shard(directory, images, shard, given, member=OBJECTS if objects else MAP)
    except BadSample as error:
        raise InputError(f"{labels}: {error}: run python shards/verify.py {labels}") from error
    control = {"control": kind} | ({"seed": seed} if kind == "shuffled" else {})
    return directory, seal_labels(directory, images, teacher=teacher | control, settings=settings)


def _labelled(source: ShardSet) -> list[Position]:
    """(shard, stored row) of every map of the set, in order."""
    found = [
        (shard, row)
        for shard in range(source.manifest.num_shards)
        for row in range(int(source.manifest.num_samples_of[shard]))
        if source.stored_map(shard, row) is not None
    ]
    if len(found) < 2:
        raise InputError(f"{source.root}: a control needs at least 2 labelled images, {len(found)} found")
    return found


def _shuffled(source: ShardSet, labelled: list[Position], *, seed: int) -> Callable[[Position], bytes]:
    cycle = [labelled[i] for i in stable_permutation(len(labelled), seed, "shuffled labels")]
    donor = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return lambda position: source.stored_map(*donor[position]) or b""


def _mean(source: ShardSet, labelled: list[Position]) -> Callable[[Position], bytes]:
    total = np.zeros(())
    for position in labelled:
        total = total + decode_map_np(decode_map_png(source.stored_map(*position) or b"")).astype(np.float64)
    data = encode_label(total / len(labelled))
    return lambda _: data
