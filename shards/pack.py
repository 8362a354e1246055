"""Pack images, with gaze where there is any, into shards: `python shards/pack.py --help`.

Which image goes where is planned first, from names and sizes alone; then processes write shards independently. A pack
that was stopped or killed goes on when the same command is given again, and ends in the same bytes. Given for a
finished set, it writes those shards again of which a file is missing or has another size.
"""

import errno
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt

from engine.errors import InputError
from engine.program import run_program
from shards.location import local_folder
from shards.manifest import FILE_NAME, Manifest, make_manifest, read_manifest, write_manifest
from shards.owning import WORK_FOLDER, exclusive
from shards.packing import (
    Job,
    Skipped,
    available_cores,
    lost_shards,
    rewrite_shards,
    write_shards,
)
from shards.payload import gaze_of
from shards.plan import Plan, make_plan
from shards.sources.base import Source, SourceConfig, make_source

NUM_NAMED = 20
MAX_QUALITY = 95
DONE = "already packed, nothing to do"


@dataclass
class PackConfig:
    """Options of `shards/pack.py`."""

    source: SourceConfig = field(default_factory=SourceConfig)
    """What to pack."""
    output: str = ""
    """Folder for the shards. Must be new, empty, or hold a pack of the same images and options, finished or not."""
    name: str = ""
    """Name of the set in reports; empty takes the output folder's name."""
    shard_mb: PositiveFloat = 100.0
    """Target size of a shard in megabytes (10^6 bytes), reckoned from the source files."""
    shard_samples: PositiveInt | None = None
    """Images per shard, instead of shard_mb."""
    shuffle: bool = True
    """Shuffle the images over the whole set, so that every shard is a fair sample of it."""
    seed: int = 0
    """Seed of that shuffle."""
    max_side: PositiveInt | None = None
    """Scale images with a side of more pixels than this down to it and encode them again; None keeps every byte."""
    quality: PositiveInt = 92
    """JPEG quality (1 to 95) of images that are encoded again."""
    decode: bool = False
    """Decode every image while packing, to find damaged ones now. Headers are always checked."""
    max_bad_fraction: ClosedUnitInterval = 1e-3
    """Share of unusable images above which packing stops, until it is raised; fewer are left out and named in the
    manifest."""
    workers: NonNegativeInt = 0
    """Processes; 0 takes one per available core."""


def main(config: PackConfig) -> None:
    """Pack what the options describe and say what came out."""
    source = make_source(config.source)
    _, done = _pack(config, source, _plan(config, source))
    sys.stdout.write(f"{config.output}: {done}\n")


def check(config: PackConfig) -> list[str]:
    """What `--check` prints: the source read and planned, nothing written."""
    source = make_source(config.source)
    plan = _plan(config, source)
    gaze = "no gaze" if source.gaze is None else f"gaze {source.gaze['edition']}"
    return [
        f"source {config.source.path}: {plan.num_items} images, {len(source.classes)} classes, {gaze}",
        f"output {config.output}: {len(plan.shards)} shards{_state(config, plan)}",
    ]


def _state(config: PackConfig, plan: Plan) -> str:
    """What of this set is there, in words to append."""
    if (manifest := _finished(config, plan)) is None:
        return ""
    lost = len(lost_shards(Path(config.output), manifest))
    return f", already packed; {lost} missing or cut, to be written again" if lost else ", already packed"


def pack(source: Source, output: Path | str, **options: Any) -> Manifest:
    """Pack from Python: `options` are the other fields of `PackConfig`. Returns the manifest.

    Raises:
        InputError: see `main`.
        Fault: the source cannot be read for now.
    """
    config = PackConfig(output=str(output), **options)
    return _pack(config, source, _plan(config, source))[0]


def _plan(config: PackConfig, source: Source) -> Plan:
    if not config.output:
        raise InputError("output: no folder given: set --output to a new folder for the shards")
    local_folder(config.output, what="a packed set")
    if config.quality > MAX_QUALITY:
        raise InputError(f"quality: {config.quality} is above {MAX_QUALITY}: give 1 to {MAX_QUALITY}")
    return make_plan(
        source.items(),
        shard_bytes=int(config.shard_mb * 1e6),
        shard_samples=config.shard_samples,
        seed=config.seed if config.shuffle else None,
        settings=_settings(config) | {"source": source.describe(), "gaze": source.gaze, "classes": source.classes},
    )


def _settings(config: PackConfig) -> dict[str, Any]:
    """Options that decide the bytes written."""
    names = ("shard_mb", "shard_samples", "shuffle", "seed", "max_side", "quality", "decode")
    return {name: getattr(config, name) for name in names}


def _finished(config: PackConfig, plan: Plan) -> Manifest | None:
    """The manifest of exactly this set, where the output holds it.

    Raises:
        InputError: it holds another one, or its manifest is damaged.
    """
    if not (Path(config.output) / FILE_NAME).exists():
        return None
    try:
        manifest = read_manifest(config.output)
    except InputError as error:
        raise InputError(f"{error}; to pack again, delete {config.output} first") from error
    settings = manifest.extra.get("settings")
    same_plan = isinstance(settings, dict) and settings.get("plan") == plan.digest
    if not same_plan or manifest.num_shards != len(plan.shards):
        raise InputError(
            f"{config.output}: holds a set of other images or options: choose another --output, or delete that folder"
        )
    return manifest


def _named(skipped: Skipped) -> list[list[str]]:
    """The first images left out, as JSON holds them; the rest are named in the indices."""
    return [list(entry) for entry in skipped[:NUM_NAMED]]


def _pack(config: PackConfig, source: Source, plan: Plan) -> tuple[Manifest, str]:
    """The set's manifest, and what was done for it in words."""
    output, workers = Path(config.output), config.workers or available_cores()
    job = Job(source, plan, output, {"max_side": config.max_side, "quality": config.quality, "decode": config.decode})
    manifest = _finished(config, plan)
    if manifest and not (output / WORK_FOLDER).exists() and not lost_shards(output, manifest):
        return manifest, DONE
    try:
        with exclusive(output, plan.digest):
            manifest = _finished(config, plan)  # by now: another pack may have ended meanwhile
            if manifest is None:
                return _write(config, job, workers=workers)
            lost = lost_shards(output, manifest)
            if lost:
                manifest = rewrite_shards(job, manifest, lost, workers=workers)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise InputError(
            f"{output}: cannot be written ({error.strerror}): make room or choose another --output; the same command "
            "goes on where it stopped"
        ) from error
    again = f"{len(lost)} of {manifest.num_shards} shards were missing or cut and are written again"
    return manifest, again if lost else DONE


def _write(config: PackConfig, job: Job, *, workers: int) -> tuple[Manifest, str]:
    """Write what is missing of the shards, then the manifest."""
    limit = int(config.max_bad_fraction * job.plan.num_items)
    records, skipped = write_shards(job, range(len(job.plan.shards)), workers=workers, max_bad=limit)
    manifest = make_manifest(
        records,
        kind="images",
        name=config.name or job.output.resolve().name,
        classes=job.source.classes,
        source=job.source.describe() | {"num_skipped": len(skipped), "skipped": _named(skipped)},
        gaze=gaze_of(job.source, max_side=config.max_side),
        settings=_settings(config) | {"plan": job.plan.digest},
    )
    write_manifest(job.output, manifest)
    return manifest, (
        f"{manifest.num_samples} samples in {manifest.num_shards} shards, {manifest.num_bytes / 1e6:.1f} MB, "
        f"{len(manifest.classes)} classes, {len(skipped)} images left out"
    )


if __name__ == "__main__":
    run_program(main, PackConfig, description="Pack images and gaze into shards.", check=check)
