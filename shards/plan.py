"""Which image goes into which shard: decided before anything is read, so that packing can stop and go on anywhere."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from engine.errors import InputError
from shards.keys import check_key
from shards.order import stable_permutation
from shards.sources.base import Item
from shards.writer import estimated_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """The images of each shard, in order, and the digest of everything that decides the bytes written."""

    shards: tuple[tuple[Item, ...], ...]
    digest: str

    @property
    def num_items(self) -> int:
        """Images in all shards."""
        return sum(len(shard) for shard in self.shards)


def make_plan(
    items: Sequence[Item], *, shard_bytes: int, shard_samples: int | None, seed: int | None, settings: dict[str, Any]
) -> Plan:
    """Cut the images into shards of equal count, or of about `shard_bytes` each.

    Args:
        shard_samples: images per shard; None goes by size.
        seed: order of the images over the whole set; None keeps the source's order.
        settings: whatever else decides the bytes written; part of the digest.

    Raises:
        InputError: two images with one key, or a name that cannot be a key.
    """
    _check_keys(items)
    order = stable_permutation(len(items), seed, "pack").tolist() if seed is not None else range(len(items))
    ordered = [items[index] for index in order]
    if shard_samples is not None:
        cuts = list(range(shard_samples, len(ordered), shard_samples))
    else:
        sizes = np.array([estimated_bytes(item.size) for item in ordered], dtype=np.int64)
        count = max(1, round(int(sizes.sum()) / shard_bytes))
        # Cut where the running total passes equal parts: shards come out within one image of each other.
        parts = np.arange(1, count) * (int(sizes.sum()) / count)
        cuts = sorted(set(np.searchsorted(np.cumsum(sizes), parts).tolist()) - {0})
    bounds = [0, *cuts, len(ordered)]
    shards = tuple(tuple(ordered[a:b]) for a, b in pairwise(bounds) if b > a)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for shard in shards:
        text = "".join(f"{item.name}\0{item.size}\0{item.label}\n" for item in shard)
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest())
    return Plan(shards, digest.hexdigest())


def _check_keys(items: Sequence[Item]) -> None:
    seen: dict[str, str] = {}
    for item in items:
        key = check_key(item.key)
        if key in seen:
            raise InputError(
                f"images {seen[key]!r} and {item.name!r} would both get the key {key!r}: rename one of them"
            )
        seen[key] = item.name
