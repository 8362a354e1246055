"""Pack images, with gaze where there is any, into shards: `python shards/pack.py --help`.

Which image goes where is planned first, from names and sizes alone; then processes write shards independently. A pack
that was stopped or killed goes on when the same command is given again, and ends in the same bytes.
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
from shards.packing import Job, Skipped, available_cores, exclusive, write_shards
from shards.payload import gaze_of
from shards.plan import Plan, make_plan
from shards.sources.base import Source, SourceConfig, make_source

NUM_NAMED = 20
MAX_QUALITY = 95


@dataclass
class PackConfig:
    """Options of `shards/pack.py`."""

    source: SourceConfig = field(default_factory=SourceConfig)
    """What to pack."""
    output: str = ""
    """Folder for the shards. Must be new, empty, or hold an unfinished pack of the same images and options."""
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
    """Share of unusable images above which packing stops; fewer are left out and named in the manifest."""
    workers: NonNegativeInt = 0
    """Processes; 0 takes one per available core."""


def main(config: PackConfig) -> None:
    """Pack what the options describe and say what came out."""
    if _is_done(config, plan := _plan(config, source := make_source(config.source))):
        sys.stdout.write(f"{config.output}: already packed, nothing to do\n")
        return
    manifest = _pack(config, source, plan)
    skipped = manifest.extra["source"]["num_skipped"]
    sys.stdout.write(
        f"{config.output}: {manifest.num_samples} samples in {manifest.num_shards} shards, "
        f"{manifest.num_bytes / 1e6:.1f} MB, {len(manifest.classes)} classes, {skipped} images left out\n"
    )


def check(config: PackConfig) -> list[str]:
    """What `--check` prints: the source read and planned, nothing written."""
    source = make_source(config.source)
    plan = _plan(config, source)
    done = _is_done(config, plan)
    gaze = "no gaze" if source.gaze is None else f"gaze {source.gaze['edition']}"
    return [
        f"source {config.source.path}: {plan.num_items} images, {len(source.classes)} classes, {gaze}",
        f"output {config.output}: {len(plan.shards)} shards{', already packed' if done else ''}",
    ]


def pack(source: Source, output: Path | str, **options: Any) -> Manifest:
    """Pack from Python: `options` are the other fields of `PackConfig`. Returns the manifest.

    Raises:
        InputError: see `main`.
    """
    config = PackConfig(output=str(output), **options)
    plan = _plan(config, source)
    return read_manifest(output) if _is_done(config, plan) else _pack(config, source, plan)


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


def _is_done(config: PackConfig, plan: Plan) -> bool:
    """Whether the output already holds exactly this set.

    Raises:
        InputError: it holds another one.
    """
    if not (Path(config.output) / FILE_NAME).exists():
        return False
    settings = read_manifest(config.output).extra.get("settings")
    if not isinstance(settings, dict) or settings.get("plan") != plan.digest:
        raise InputError(
            f"{config.output}: holds a set of other images or options: choose another --output, or delete that folder"
        )
    return True


def _named(skipped: Skipped) -> list[list[str]]:
    """The first images left out, as JSON holds them; the rest are named in the indices."""
    return [list(entry) for entry in skipped[:NUM_NAMED]]


def _pack(config: PackConfig, source: Source, plan: Plan) -> Manifest:
    output = Path(config.output)
    options = {"max_side": config.max_side, "quality": config.quality, "decode": config.decode}
    try:
        with exclusive(output, plan.digest):
            job = Job(source, plan, output, options)
            limit = int(config.max_bad_fraction * plan.num_items)
            records, skipped = write_shards(job, workers=config.workers or available_cores(), max_bad=limit)
            manifest = make_manifest(
                records,
                kind="images",
                name=config.name or output.resolve().name,
                classes=source.classes,
                source=source.describe() | {"num_skipped": len(skipped), "skipped": _named(skipped)},
                gaze=gaze_of(source, max_side=config.max_side),
                settings=_settings(config) | {"plan": plan.digest},
            )
            write_manifest(output, manifest)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise InputError(
            f"{output}: cannot be written ({error.strerror}): make room or choose another --output; the same command "
            "goes on where it stopped"
        ) from error
    return manifest


if __name__ == "__main__":
    run_program(main, PackConfig, description="Pack images and gaze into shards.", check=check)
