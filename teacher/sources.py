"""The gaze sets that a teacher trains on: one, or several with weights, behind one numbering of shards."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError
from shards.fetch import RemoteOptions
from shards.gaze import check_gaze, gaze_sigma
from shards.reader import ShardSet
from teacher.config import DataConfig, GazeSource
from teacher.mixture import MixedOrder, exact_shares


@dataclass(frozen=True)
class GazeSet:
    """A gaze set as it is trained on.

    Attributes:
        sigma: of its human maps, pixels of the stored image.
        weight: see `GazeSource`.
        limit: None for all of its images.
    """

    shards: ShardSet
    sigma: float
    weight: float = 1.0
    limit: int | None = None

    @property
    def edition(self) -> Any:
        """What its manifest says its gaze is."""
        return self.shards.manifest.extra["gaze"].get("edition")

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each shard that are used, `(shards,)`."""
        sizes = self.shards.shard_sizes
        if self.limit is None:
            return sizes
        return np.clip(self.limit - (np.cumsum(sizes) - sizes), 0, sizes)

    @property
    def num_samples(self) -> int:
        """Samples that are used."""
        return int(self.sizes.sum())

    def describe(self) -> dict[str, Any]:
        """What the teacher's facts say about this set. No path: the digest is its name."""
        source = self.shards.manifest.extra.get("source")
        kind = source.get("kind") if isinstance(source, dict) else None
        about = {"name": self.shards.manifest.name, "kind": kind, "edition": self.edition, "digest": self.shards.digest}
        return about | {"num_images": self.num_samples, "weight": self.weight, "sigma": self.sigma}


class GazeSets:
    """Training sets in the order of the config. Shards are numbered through: those of the first set come first."""

    def __init__(self, sets: Sequence[GazeSet]) -> None:
        self.sets = tuple(sets)
        counts = [0, *(len(one.sizes) for one in self.sets)]
        self._first_shards = np.cumsum(counts)
        self._first_samples = np.cumsum([0, *(one.shards.num_samples for one in self.sets)])

    @property
    def num_samples(self) -> int:
        """Samples of all sets that are used: an epoch."""
        return sum(one.num_samples for one in self.sets)

    @property
    def digest(self) -> str:
        """Identity of what is trained on; of one whole set its own digest."""
        if len(self.sets) == 1 and self.sets[0].limit is None:
            return self.sets[0].shards.digest
        content = [[one.shards.digest, one.weight, one.limit] for one in self.sets]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def order(self, *, seed: int, window: int) -> MixedOrder:
        """Which sample of which set stands at which position."""
        weights = [one.weight for one in self.sets]
        return MixedOrder([one.sizes for one in self.sets], weights=weights, seed=seed, window=window)

    def locate(self, shard: int) -> tuple[GazeSet, int, int]:
        """Set of a shard, the shard's number in that set, and the number of its first sample over all sets."""
        number = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        one, own = self.sets[number], shard - int(self._first_shards[number])
        return one, own, int(self._first_samples[number]) + int(one.shards.shard_starts[own])

    def shares(self) -> list[tuple[GazeSet, float]]:
        """Each set with its share of the training images, 0 to 1. Raises InputError: see `exact_shares`."""
        shares = exact_shares([one.weight for one in self.sets])
        return [(one, share / sum(shares)) for one, share in zip(self.sets, shares, strict=True)]

    def describe(self) -> list[dict[str, Any]]:
        """What the teacher's facts say: every set with its name, digest and weight."""
        return [one.describe() for one in self.sets]


def open_sources(config: DataConfig) -> tuple[GazeSets, ShardSet]:
    """Training sets and validation set.

    Raises:
        InputError: missing or empty shards, no gaze in them, sets of different editions that were not said to be
            mixed, weights that cannot be kept exactly, a limit above a set's size, or a set so small that a batch
            would hold an image twice.
    """
    given = config.train if isinstance(config.train, list) else [_single(config.train)]
    if not given:
        raise InputError("data.train is an empty list: give a folder of gaze shards, or a list of {shards, weight}")
    sets = GazeSets([_open(source, sigma=config.sigma, remote=config.remote) for source in given])
    val = ShardSet(config.val, remote=config.remote)
    check_gaze(val)
    _check_editions(sets, val, mixed=config.mix_editions)
    _check_sizes(sets, batch_size=config.batch_size)
    return sets, val


def _single(path: Path) -> GazeSource:
    """A folder alone. A list with a mistake in it arrives as a path, too, from the command line."""
    if str(path).lstrip().startswith("["):
        raise InputError(f"data.train {str(path)[:160]}: is no list of {{shards, weight, limit}}: correct its entries")
    return GazeSource(shards=path)


def _open(source: GazeSource, *, sigma: float | None, remote: RemoteOptions) -> GazeSet:
    shards = ShardSet(source.shards, remote=remote)
    check_gaze(shards)
    if source.limit is not None and source.limit > shards.num_samples:
        raise InputError(
            f"data.train: limit {source.limit} is more than the {shards.num_samples} images of {source.shards}: "
            f"lower it, or leave it out"
        )
    return GazeSet(shards, sigma or gaze_sigma(shards), float(source.weight), source.limit)


def _check_editions(sets: GazeSets, val: ShardSet, *, mixed: bool) -> None:
    if mixed:
        return
    first, *others = [(one.edition, one.shards.root) for one in sets.sets]
    for edition, root in [*others, (val.manifest.extra["gaze"].get("edition"), val.root)]:
        if edition != first[0]:
            raise InputError(
                f"{root} holds gaze of edition {edition!r}, {first[1]} of {first[0]!r}: take sets of one edition, or "
                f"say data.mix_editions true"
            )


def _check_sizes(sets: GazeSets, *, batch_size: int) -> None:
    for one, share in sets.shares():
        if share < 1 and batch_size * share > one.num_samples:
            raise InputError(
                f"data.train: its weight asks {one.shards.root} for {batch_size * share:.1f} of the {batch_size} "
                f"images of a step, but {one.num_samples} are used of it: lower its weight or data.batch_size"
            )
