"""Which classes a shard set has images of, from its indices alone."""

from functools import lru_cache

import numpy as np

from shards.folder import open_folder
from shards.index import IndexFault
from shards.opening import read_shard_index
from shards.reader import ShardSet


def class_labels(shards: ShardSet) -> np.ndarray:
    """Class of every usable sample: `(num_samples,)`, -1 for none and in an index that cannot be read."""
    kept = _kept(str(shards.root), shards.digest)
    if not kept:
        kept.append(_read_labels(shards))
    return kept[0]


def unseen_classes(shards: ShardSet, numbers: np.ndarray | None = None) -> list[str]:
    """Classes without an image among the samples with these numbers; None: in the whole set."""
    if not shards.classes:
        return []
    labels = class_labels(shards)
    found = set((labels if numbers is None else labels[numbers]).tolist())
    return [name for number, name in enumerate(shards.classes) if number not in found]


@lru_cache(maxsize=4)
def _kept(root: str, digest: str) -> list[np.ndarray]:
    """Where the labels of a folder with that content stay once they are read: the set itself, with its open files,
    does not."""
    return []


def _read_labels(shards: ShardSet) -> np.ndarray:
    """See `class_labels`."""
    folder, labels = open_folder(shards.root, remote=shards.remote), []
    for shard, size in enumerate(shards.shard_sizes.tolist()):
        try:
            index = read_shard_index(folder, shards.manifest, shard)
        except IndexFault:  # its samples are counted as unreadable when they are read
            labels.append(np.full(size, -1))
            continue
        if len(index) > size:  # some are in the list of bad samples
            usable, stored = set(shards.keys(shard)), index.keys()
            labels.append(index.label[[key in usable for key in stored]])
        else:
            labels.append(index.label)
    return np.concatenate(labels)
