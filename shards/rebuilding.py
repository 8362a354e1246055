"""Indices made anew from their tars, for `shards/verify.py --repair`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TypeGuard

from engine.files import sha256_of
from shards.index import IndexFault, ShardIndex, index_bytes, read_index, write_index
from shards.manifest import Manifest, write_manifest
from shards.tar import scan
from shards.verifying import compare_index, split_name
from shards.writer import index_of_tar, index_path

Skipped = tuple[tuple[str, str], ...]

# Every run of so many names is tried. A pack puts fewer into the manifest; a hostile one may hold any number.
_MAX_NAMED = 32


class CannotRebuild(Exception):
    """No index was written; the message says why, and what to do."""


def rebuild_index(root: Path, manifest: Manifest, shard: int, *, keys: Sequence[str] | None = None) -> Manifest:
    """Write a lost or damaged index anew from its tar, which must be the manifest's.

    It is the manifest's very index wherever that can be found. The one thing that a tar and a manifest may not tell are
    the images that packing left out: then the index is the same but for their names, the manifest takes over its
    hash, and a damaged one is kept as `.index.damaged`, as it may still be read by eye.

    Args:
        keys: for labels those of the image shard, as rows without a label are not in the tar; None takes the tar's.

    Returns:
        The manifest that holds from now on: the same object where the index is the very one.

    Raises:
        CannotRebuild: files are as they were.
    """
    path = index_path(root / manifest.files[shard])
    if path.is_dir():
        raise CannotRebuild(f"{path.name} is a folder: move it away")
    index = _index_of(root / manifest.files[shard], manifest, shard, keys)
    lists = _skipped_lists(path, manifest)
    for skipped in lists:
        exact = replace(index, skipped=skipped)
        if sha256(index_bytes(exact)).hexdigest() == manifest.hash_of(shard, "index_sha256"):
            write_index(path, exact)
            return manifest
    if path.exists():
        path.replace(path.with_name(f"{path.name}.damaged"))
    # The manifest first: after a kill between the two the next repair finds no index, and no other to put aside.
    index = replace(index, skipped=lists[0])
    manifest = renew_index_hashes(root, manifest, {shard: sha256(index_bytes(index)).hexdigest()})
    write_index(path, index)
    return manifest


def renew_index_hashes(root: Path, manifest: Manifest, found: Mapping[int, str]) -> Manifest:
    """Take SHA-256s of indices over into the manifest of `root`: shard -> hexadecimal. Written only if one is new."""
    found = {shard: new for shard, new in found.items() if new != manifest.hash_of(shard, "index_sha256")}
    if not found:
        return manifest
    hashes = manifest.hashes["index_sha256"].copy()
    for shard, new in found.items():
        hashes[shard] = list(bytes.fromhex(new))
    manifest = replace(manifest, hashes=manifest.hashes | {"index_sha256": hashes})
    write_manifest(root, manifest)
    return manifest


def _index_of(tar: Path, manifest: Manifest, shard: int, keys: Sequence[str] | None) -> ShardIndex:
    """Index of a tar, as far as the tar tells it."""
    count = int(manifest.num_samples_of[shard])
    again = "copy tar and index from where the set came from, or make the shard again"
    if not tar.is_file():
        raise CannotRebuild(f"{tar.name} is no file: move away what is there, then {again}")
    try:
        if sha256_of(tar) != manifest.hash_of(shard, "sha256"):
            raise CannotRebuild(
                f"its tar is not the manifest's either, so nothing tells which of its samples are sound: {again}; or "
                f"move the tar out of the folder, and --repair leaves its {count} samples out"
            )
        keys = _keys_of(tar) if keys is None else keys
        if manifest.kind == "labels" and len(keys) < count:
            raise CannotRebuild(
                "rows without a label are known from the images alone: give their folder with --images, and repair "
                "them first where they have faults"
            )
        index = index_of_tar(tar, keys=keys, kind=manifest.kind)
        compare_index(index, manifest, shard)
    except OSError as error:
        raise CannotRebuild(f"its tar cannot be read ({error.strerror}): see to its permissions and disk") from error
    except (ValueError, OverflowError) as error:
        raise CannotRebuild(f"no index fits both tar and manifest ({str(error)[:160]}): {again}") from error
    return index


def _keys_of(tar: Path) -> list[str]:
    """Keys in the order of their first members."""
    with open(tar, "rb") as file:
        return list(dict.fromkeys(split_name(member.name)[0] for member in scan(file)))


def _skipped_lists(path: Path, manifest: Manifest) -> list[Skipped]:
    """What packing may have left out of this shard, the likeliest first: what a damaged index says, nothing, or some
    successive names of those in the manifest, which are in the order of the shards."""
    try:
        said = [read_index(path).skipped]
    except IndexFault:
        said = []
    source = manifest.extra.get("source")
    entries = source.get("skipped") if isinstance(source, dict) else None
    named = [(name, reason) for name, reason in entries[:_MAX_NAMED]] if _are_named(entries) else []
    runs = [tuple(named[i:j]) for i in range(len(named)) for j in range(i + 1, len(named) + 1)]
    return [*said, (), *runs]


def _are_named(entries: object) -> TypeGuard[list[list[str]]]:
    """Whether these are pairs of name and reason."""
    return isinstance(entries, list) and all(
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)
        for entry in entries
    )
