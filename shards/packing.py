"""The processes that write shards for `shards/pack.py`."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.files import fsync_directory
from engine.forking import end_opencv_threads
from engine.progress import ProgressBar
from shards.index import IndexFault, read_index
from shards.manifest import FILE_NAME, Manifest, ShardRecord
from shards.owning import WORK_FOLDER
from shards.payload import make_members
from shards.plain import read_plain
from shards.plan import Plan
from shards.rebuilding import renew_index_hashes
from shards.sources.base import Source, refuse_passing
from shards.writer import ShardWriter, index_path, record_of, shard_name

POLL_S = 0.1

Skipped = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Job:
    """What every packing process needs; handed over once, when it starts."""

    source: Source
    plan: Plan
    output: Path
    options: dict[str, Any]


class _Worker:
    """Holds the job in a packing process."""

    job: Job
    count: Any


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lost_shards(output: Path, manifest: Manifest) -> list[int]:
    """Shards of a finished set whose tar is missing or has another size, or whose index is missing or another.

    Whether the bytes of the tars are the same is for shards/verify.py to say: it takes as long as reading them.
    """

    def is_there(number: int) -> bool:
        tar = output / manifest.files[number]
        try:
            size, index_sha256 = tar.stat().st_size, sha256(read_plain(index_path(tar))).hexdigest()
        except OSError:
            return False
        return size == manifest.num_bytes_of[number] and index_sha256 == manifest.hash_of(number, "index_sha256")

    return [number for number in range(manifest.num_shards) if not is_there(number)]


def rewrite_shards(job: Job, manifest: Manifest, lost: Sequence[int], *, workers: int) -> Manifest:
    """Write shards of a finished set again. Each takes its place only if its tar is, to the byte, the manifest's.

    What is finished when an error or Ctrl-C ends the work takes its place too.

    Returns:
        The manifest that holds from now on: it takes the hash of an index over that names other images left out.

    Raises:
        InputError: some tars are others, as the images or what encodes them have changed.
    """
    apart = replace(job, output=job.output / WORK_FOLDER)
    _refuse_folders(job.output, lost)
    try:
        write_shards(apart, lost, workers=workers, max_bad=job.plan.num_items)
    finally:
        manifest, other = _place(apart, lost, output=job.output, manifest=manifest)
    if other:
        raise InputError(
            f"{job.output}: {len(other)} of {manifest.num_shards} shards come out otherwise than {FILE_NAME} says, the "
            f"first is {other[0]}: the images or the programs that encode them have changed since: bring those back, "
            "or delete that folder and pack again"
        )
    return manifest


def _place(apart: Job, lost: Sequence[int], *, output: Path, manifest: Manifest) -> tuple[Manifest, list[str]]:
    """Move the manifest's shards from the folder they were written in; also returns the names of the others there."""
    other: list[str] = []
    hashes: dict[int, str] = {}
    for number in lost:
        if (written := _complete(apart, number)) is None:
            continue
        record = written[0]
        if record.sha256 != manifest.hash_of(number, "sha256"):
            other.append(record.file)
            continue
        for path in (apart.output / record.file, index_path(apart.output / record.file)):
            os.replace(path, output / path.name)
        hashes[number] = record.index_sha256
    fsync_directory(output)
    return renew_index_hashes(output, manifest, hashes), other


def write_shards(job: Job, numbers: Sequence[int], *, workers: int, max_bad: int) -> tuple[list[ShardRecord], Skipped]:
    """Write those of the given shards that are missing; records and left-out images of all of them, in order.

    Args:
        numbers: ascending.
        max_bad: unusable images that may be left out.

    Raises:
        InputError: more unusable images than that.
        Fault: the source cannot be read for now.
    """
    _refuse_folders(job.output, numbers)
    found = {number: shard for number in numbers if (shard := _complete(job, number)) is not None}
    missing = [number for number in numbers if number not in found]
    total, done = (sum(len(job.plan.shards[number]) for number in part) for part in (numbers, found))
    with ProgressBar(total, "packing", done=done) as bar:
        if missing:
            found |= _run(job, missing, workers=min(workers, len(missing)), bar=bar, max_bad=max_bad, found=found)
    skipped = [entry for number in sorted(found) for entry in found[number][1]]
    _refuse(skipped, job, max_bad=max_bad)
    return [found[number][0] for number in sorted(found)], skipped


def _refuse_folders(output: Path, numbers: Sequence[int]) -> None:
    for tar in (output / shard_name(number) for number in numbers):
        for path in (tar, index_path(tar)):
            if path.is_dir():
                raise InputError(f"{path}: is a folder, where a file of the set belongs: move it away and pack again")


def _refuse(skipped: Skipped, job: Job, *, max_bad: int) -> None:
    if len(skipped) > max_bad:
        name, reason = skipped[0]
        raise InputError(
            f"{len(skipped)} of {job.plan.num_items} images cannot be used, at most {max_bad} may be left out; the "
            f"first is {name!r} ({reason}): raise --max_bad_fraction, which goes on with what is written, or repair or "
            f"remove them, delete {job.output} and pack again"
        )
    if len(skipped) == job.plan.num_items:
        raise InputError(f"none of the {job.plan.num_items} images can be used, the first is {skipped[0][0]!r}")


def _run(
    job: Job, missing: list[int], *, workers: int, bar: ProgressBar, max_bad: int, found: dict[int, Any]
) -> dict[int, tuple[ShardRecord, Skipped]]:
    # Forked, not spawned: the job is then inherited without a copy, however many images it lists.
    end_opencv_threads()
    context = multiprocessing.get_context("fork")
    count = context.Value("q", 0)
    results: dict[int, tuple[ShardRecord, Skipped]] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(job, count)) as pool:
        waiting: dict[Future[tuple[ShardRecord, Skipped]], int] = {pool.submit(_write, n): n for n in missing}
        seen = 0
        try:
            while waiting:
                wait(waiting, timeout=POLL_S, return_when=FIRST_EXCEPTION)
                for future in [future for future in waiting if future.done()]:
                    results[waiting.pop(future)] = future.result()
                _refuse([entry for part in (found | results).values() for entry in part[1]], job, max_bad=max_bad)
                bar.update(count.value - seen)
                seen = count.value
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results


def _complete(job: Job, number: int) -> tuple[ShardRecord, Skipped] | None:
    """A shard that an earlier run finished; None when it has to be written, with what is in the way removed."""
    path = job.output / shard_name(number)
    try:
        index = read_index(index_path(path))
        if path.stat().st_size == index.num_bytes:
            return record_of(path), list(index.skipped)
    except (IndexFault, OSError):
        pass
    index_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return None


def _start(job: Job, count: Any) -> None:
    """First thing in every packing process."""
    _Worker.job, _Worker.count = job, count
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A killed parent cannot stop its processes: they look for it and leave, so that the lock is freed."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


def _write(number: int) -> tuple[ShardRecord, Skipped]:
    """Write one shard; unusable images are left out and named in its index."""
    job = _Worker.job
    tell = _counter(_Worker.count)
    with ShardWriter(job.output / shard_name(number)) as writer:
        for item in job.plan.shards[number]:
            try:
                members = make_members(job.source, item, **job.options)
            except (ValueError, OSError) as error:
                refuse_passing(error, item.name)
                name = item.name.encode("utf-8", "backslashreplace").decode()
                # Only the reason: a full message may name the folder, and packs must not depend on where they run.
                writer.skipped.append((name, _reason(error)))
            else:
                writer.add(item.key, members, label=item.label)
            tell()
        return writer.close(), list(writer.skipped)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)[:200]


def _counter(count: Any) -> Callable[[], None]:
    def tell() -> None:
        with count.get_lock():
            count.value += 1

    return tell
