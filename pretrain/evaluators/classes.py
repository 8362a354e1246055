"""Which classes a shard set has images of, from its indices alone."""

from functools import lru_cache

import numpy as np

from shards.fetch import RemoteOptions
from shards.folder import open_folder
from shards.index import IndexFault
from shards.opening import read_shard_index
from shards.reader import ShardSet


def class_labels(shards: ShardSet) -> np.ndarray:
    """Class of every usable sample: `(num_samples,)`, -1 for none and in an index that cannot be read."""
    return _read_labels(str(shards.root), shards.digest, shards.remote)


def unseen_classes(shards: ShardSet, numbers: np.ndarray | None = None) -> list[str]:
    """Classes without an image among the samples with these numbers; None: in the whole set."""
    if not shards.classes:
        return []
    labels = class_labels(shards)
    found = set((labels if numbers is None else labels[numbers]).tolist())
    return [name for number, name in enumerate(shards.classes) if number not in found]


@lru_cache(maxsize=4)
def _read_labels(root: str, digest: str, remote: RemoteOptions | None) -> np.ndarray:
    """See `class_labels`; read once for all evaluators. `digest`: which content of the folder they are of."""
    shards, folder, labels = ShardSet(root, remote=remote), open_folder(root, remote=remote), []
    for shard, size in enumerate(shards.shard_sizes.tolist()):
        try:
            index = read_shard_index(folder, shards.manifest, shard)
        except IndexFault:  # its samples are counted as unreadable when they are read
            labels.append(np.full(size, -1))
            continue
        if len(index) > size:  # some are in the list of bad samples
            usable = set(shards.keys(shard))
            labels.append(index.label[[key in usable for key in shards.stored_keys(shard)]])
        else:
            labels.append(index.label)
    return np.concatenate(labels)
