"""Label sets: one label shard beside each image shard, in a folder of their own.

Any number of processes may write any shards of one set at the same time: a shard is put in place once, under its name,
and whoever comes second keeps the first one's bytes. When every shard is there, `seal_labels` writes the manifest.
"""

import errno
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from attention.maps import encode_map_np
from engine.errors import InputError
from engine.files import atomic_write
from shards.index import IndexFault
from shards.location import local_folder
from shards.manifest import Manifest, ShardRecord, make_manifest, write_manifest
from shards.map_png import encode_map_png
from shards.quarantine import FILE_NAME as QUARANTINE
from shards.quarantine import BadEntry, write_quarantine
from shards.reader import ShardSet
from shards.tar import TarError
from shards.writer import ShardWriter, is_complete, record_of, temporary_name

MAP = "map.png"
# Codes are multiples of it: KLD 2e-4 from the floats instead of 5e-5, for a fifth fewer bytes and a plainer PNG.
STEP = 2
ENCODING = "sqrt8"
SETTINGS = ".settings.json"
# A shard's temporary file is written in seconds: one that has not changed for so long has lost its writer.
DEAD_AFTER_S = 86_400.0
# What is wrong with a place itself (None: its name); anything else, such as a full disk, may pass.
UNUSABLE = (
    None, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
# What file systems without hard links say to one.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def label_directory(root: Path | str, teacher_hash: str) -> Path:
    """Folder of the labels that one teacher wrote: `root` / the first 16 digits of the teacher's checkpoint hash.

    Raises:
        InputError: the hash is not hexadecimal or too short.
    """
    if not is_teacher_hash(teacher_hash):
        raise InputError(f"teacher hash {teacher_hash[:40]!r}: at least 16 lower-case hexadecimal digits are needed")
    return Path(root) / teacher_hash[:16]


def is_teacher_hash(value: object) -> bool:
    """Whether a value, which may come from a manifest of any origin, names a teacher and can name a folder."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,}", value) is not None


def claim_directory(directory: Path, settings: dict[str, Any]) -> None:
    """Create a label folder for these settings, or check that it has the same.

    Args:
        settings: what its labels depend on beside the teacher, such as `images` (digest); JSON.

    Raises:
        InputError: it holds this teacher's labels of other images or with other settings, or shards without a note of
            theirs, or cannot be written.
    """
    path = local_folder(directory, what="a label set") / SETTINGS
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # looked for in this order: every writer leaves the note before its first shard
        orphaned = any(directory.glob("shard-*")) and not path.exists()
        if not orphaned and not path.exists():
            _write_once(path, (json.dumps(settings) + "\n").encode())
        found = {} if orphaned else _settings_in(path.read_bytes())
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) not in UNUSABLE:
            raise
        reason = getattr(error, "strerror", error)
        raise InputError(f"{str(directory)[:200]!r}: cannot be written ({reason}): choose another --output") from error
    if orphaned:
        raise InputError(
            f"{directory} holds label shards, but no {SETTINGS} that says what they were made of, so nothing is added: "
            "give another --output, put that file back, or move that folder away"
        )
    if found != settings:
        what = next((key for key in settings if found.get(key) != settings[key]), "settings")
        raise InputError(
            f"{directory} holds labels of other {what} ({str(found.get(what, 'unknown'))[:12]}, now "
            f"{str(settings.get(what))[:12]}): give another --output, or move that folder away"
        )


def _write_once(path: Path, data: bytes) -> None:
    """Write a whole file, unless another process is faster: two with other settings must not both take a folder."""
    temporary = temporary_name(path)
    atomic_write(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.replace(temporary, path)  # this file system knows nothing better
    finally:
        temporary.unlink(missing_ok=True)


def _settings_in(data: bytes) -> dict[str, Any]:
    """What a note says; nothing where it is damaged, as nobody knows then what the labels were made of."""
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return {}


def encode_label(density: np.ndarray) -> bytes:
    """PNG bytes of one map `(height, width)`, non-negative: 8 bits in steps of `STEP`, square-root companded."""
    return encode_map_png(encode_map_np(np.asarray(density), step=STEP))


def label_shard_path(directory: Path | str, images: ShardSet, shard: int) -> Path:
    """Tar of the labels of one image shard."""
    return local_folder(directory, what="a label set") / images.manifest.files[shard]


def labels_complete(directory: Path | str, images: ShardSet, shard: int) -> bool:
    """Whether the labels of this image shard are already written."""
    return is_complete(label_shard_path(directory, images, shard))


def write_label_shard(
    directory: Path | str, images: ShardSet, shard: int, maps: Iterable[tuple[str, bytes]], *, member: str = MAP
) -> ShardRecord:
    """Write the labels of one image shard; safe against other processes writing the same one.

    Args:
        maps: (key, PNG bytes from `encode_label`) in any order. An image that is left out (because it cannot be
            decoded) keeps a row without map, so rows match the image shard.
        member: extension of what is written: `map.png`, or what `shards/objects.py` names for objects.

    Returns:
        The record of the shard as it is on disk: another process's where that came first.

    Raises:
        InputError: a key that is not in the image shard or comes twice, or an unusable older file in the way.
    """
    path = label_shard_path(directory, images, shard)
    keys = _stored_keys(images, shard)
    given: dict[str, bytes] = {}
    for key, data in maps:
        if key in given:
            raise InputError(f"{path}: two label maps for key {key[:80]!r}: give one for each image")
        given[key] = data
    unknown = given.keys() - set(keys)
    if unknown:
        raise InputError(f"{path}: a label for {min(unknown)[:80]!r}, which is not in that image shard")
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_complete(path):
        return record_of(path)
    try:
        with ShardWriter(path, kind="labels") as writer:
            for key in keys:
                writer.add(key, {member: given[key]} if key in given else {})
            return writer.close()
    except TarError as error:
        raise InputError(f"{path}: an unusable file is in the way ({error}): delete it and label again") from error


def seal_labels(
    directory: Path | str,
    images: ShardSet,
    *,
    teacher: dict[str, Any],
    settings: dict[str, Any],
    left_out: Sequence[BadEntry] = (),
) -> Manifest:
    """Write the manifest of a label set whose shards are all complete. Sealing again gives the same bytes.

    What killed writers left is removed once it is a day old.

    Args:
        teacher: at least `hash`; kept as it is.
        settings: for maps at least `size` [height, width], for objects their `encoding`; kept as it is, with the
            encoding of maps where none is named.
        left_out: samples that readers are to leave out; a list that the folder has already is kept.

    Raises:
        InputError: shards are missing or damaged, or hold other keys than the images; or teacher or settings are not
            JSON.
    """
    directory = local_folder(directory, what="a label set")
    count = images.manifest.num_shards
    missing = [shard for shard in range(count) if not labels_complete(directory, images, shard)]
    if missing:
        raise InputError(
            f"{directory}: {len(missing)} of {count} label shards are missing, the first is "
            f"{images.manifest.files[missing[0]]}: run the labelling again, it writes only those"
        )
    try:
        records = [record_of(label_shard_path(directory, images, shard)) for shard in range(count)]
    except IndexFault as error:
        raise InputError(f"{directory}: {error}: delete that shard's files and label again") from error
    manifest = make_manifest(
        records,
        kind="labels",
        name=images.manifest.name,
        images={"digest": images.manifest.digest, "name": images.manifest.name},
        teacher=teacher,
        settings={"encoding": ENCODING} | settings,
    )
    for shard, record in enumerate(records):
        if record.keys_digest != images.manifest.hash_of(shard, "keys_digest"):
            raise InputError(f"{directory}/{record.file}: holds other keys than the image shard: label it again")
    if left_out and not (directory / QUARANTINE).exists():
        write_quarantine(directory, manifest, left_out)  # before the manifest: a sealed set has it
    try:
        write_manifest(directory, manifest)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{directory}: teacher or settings cannot be written as JSON ({error}): correct them"
        ) from error
    _remove_dead(directory)
    return manifest


def _remove_dead(directory: Path) -> None:
    """Delete temporary files without a writer. By their age: writers on other machines may be at work."""
    for path in directory.glob(".*.tmp"):
        with suppress(OSError):  # another task was faster, or it is another user's
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > DEAD_AFTER_S:
                path.unlink()


def _stored_keys(images: ShardSet, shard: int) -> list[str]:
    """All keys of an image shard, quarantined ones included: label rows follow the rows on disk."""
    try:
        return images.stored_keys(shard)
    except IndexFault as error:
        raise InputError(
            f"{images.root}/{images.manifest.files[shard]}: {error}: run python shards/verify.py {images.root}"
        ) from error
