"""Check shard sets against their manifests: `python shards/verify.py DIRECTORY`.

Counts, hashes, decodability, and for label sets agreement with the images. Exit code 2 on any fault. `--repair`
rebuilds indices that can be rebuilt and writes the samples that cannot be used into a list that readers respect; what
that does not mend, such as a tar that other tools cannot read to its end, stays a fault.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
from jsonargparse.typing import NonNegativeInt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine.errors import InputError
from engine.files import sha256_of
from engine.forking import end_opencv_threads
from engine.program import run_program
from engine.progress import ProgressBar
from shards.folder import open_folder
from shards.location import is_remote, url_of
from shards.manifest import FILE_NAME, Manifest, check_labels, read_manifest
from shards.packing import available_cores
from shards.quarantine import BadEntry, bad_rows, read_quarantine, write_quarantine
from shards.verifying import ShardReport, check_shard, rebuild_index

MAX_LINES = 20

Images = dict[str, tuple[Path | str, Manifest]]
"""Digest of an image set -> where it lies, and its manifest."""


@dataclass
class VerifyConfig:
    """Options of `shards/verify.py`."""

    path: str = ""
    """Folder or URL of a set, or a folder that holds sets; may be given without --path as the first argument."""
    images: str = ""
    """For label sets: the folder or URL of their images. Image sets found under `path` are tried on their own."""
    teacher: str = ""
    """For label sets: the run folder of the teacher that must have written them; its weights are hashed. For objects:
    the file of the detector's weights or results."""
    decode: bool = True
    """Decode every image; without, only headers and checksums are checked."""
    repair: bool = False
    """Rebuild lost indices and write unusable samples into quarantine.json beside the manifest."""
    workers: NonNegativeInt = 0
    """Processes; 0 takes one per available core."""


@dataclass(slots=True)
class SetReport:
    """What was found in one set; `left_out`: shard -> rows that readers leave out, which are no fault."""

    root: Path | str
    manifest: Manifest
    shards: list[ShardReport]
    faults: list[str]
    left_out: dict[int, set[int]]

    @property
    def bad(self) -> list[BadEntry]:
        """Unusable samples that are not quarantined."""
        return [BadEntry(s.shard, row, *s.bad[row]) for s in self.shards for row in sorted(s.bad)]

    @property
    def num_faults(self) -> int:
        """Faults of the set, its shards and its samples."""
        return len(self.faults) + sum(len(shard.faults) + len(shard.bad) for shard in self.shards)

    def forgive(self) -> None:
        """Take away what samples that are left out explain."""
        for shard in self.shards:
            shard.forgive(self.left_out.get(shard.shard, set()))


def main(config: VerifyConfig) -> None:
    """Verify, print the table, and fail on any fault."""
    roots = _find_sets(config)
    manifests = {root: read_manifest(root) for root in roots}
    images: Images = {m.digest: (root, m) for root, m in manifests.items() if m.kind == "images"}
    if config.images:
        given = read_manifest(config.images, kind="images")
        images[given.digest] = (config.images, given)
    total = sum(manifest.num_samples for manifest in manifests.values())
    with ProgressBar(total, "verifying") as bar:
        reports = [_verify(root, manifest, images, config, bar) for root, manifest in manifests.items()]
    _print(reports)
    left = sum(_repair(report) if config.repair else report.num_faults for report in reports)
    if left:
        hint = "pack those shards again" if config.repair else "--repair leaves unusable samples out, or pack again"
        raise InputError(f"{config.path}: {left} faults, listed above: {hint}")


def check(config: VerifyConfig) -> list[str]:
    """What `--check` prints: the sets that would be verified."""
    return [f"{root}: {read_manifest(root).num_samples} samples" for root in _find_sets(config)]


def _find_sets(config: VerifyConfig) -> list[Path | str]:
    if not config.path:
        raise InputError("path: no folder given: python shards/verify.py DIRECTORY")
    if is_remote(config.path):
        if config.repair:
            raise InputError(f"{url_of(config.path)}: only local sets can be repaired: repair the original and copy it")
        return [url_of(config.path)]
    root = Path(config.path)
    if (root / FILE_NAME).exists() or not root.is_dir():
        return [root]  # a path that is no folder is refused when its manifest is read
    found = sorted({path.parent for pattern in (FILE_NAME, "shard-*.tar") for path in root.rglob(pattern)})
    return [*found] or [root]


def _verify(root: Path | str, manifest: Manifest, images: Images, config: VerifyConfig, bar: ProgressBar) -> SetReport:
    work = partial(check_shard, open_folder(root), manifest, decode=config.decode)
    end_opencv_threads()
    context = multiprocessing.get_context("fork")
    workers = max(1, min(config.workers or available_cores(), manifest.num_shards))
    shards = []
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for report in pool.map(work, range(manifest.num_shards)):
            shards.append(report)
            bar.update(report.num_samples)
    result = SetReport(root, manifest, shards, [], _left_out(root, manifest, images))
    result.forgive()
    hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *[report.key_hashes for report in shards]])
    repeated = len(hashes) - len(np.unique(hashes))
    if repeated:
        result.faults.append(f"{repeated} keys occur more than once")
    strays = {path.name for path in root.glob("*.tar")} - set(manifest.files) if isinstance(root, Path) else set()
    result.faults += [f"{name} is not in the manifest" for name in sorted(strays)[:MAX_LINES]]
    if manifest.kind == "labels":
        result.faults += _label_faults(root, manifest, images)
        result.faults += _teacher_faults(manifest, config.teacher)
    return result


def _left_out(root: Path | str, manifest: Manifest, images: Images) -> dict[int, set[int]]:
    """Rows of each shard that the quarantines name; of labels also those of their images, which need no label."""
    entries = read_quarantine(root, manifest)
    digest = _images_of(manifest)
    if digest in images:
        entries = entries + read_quarantine(*images[digest])
    return {shard: set(rows.tolist()) for shard, rows in bad_rows(entries).items()}


def _images_of(labels: Manifest) -> str:
    """Digest of the images that a label set names; of any other manifest nothing that is one."""
    named = labels.extra.get("images")
    return str(named.get("digest")) if isinstance(named, dict) else ""


def _label_faults(root: Path | str, manifest: Manifest, images: Images) -> list[str]:
    digest = _images_of(manifest)
    if digest not in images:
        return [f"its images ({digest[:12]}) are not at hand: give their folder with --images"]
    try:
        check_labels(root, manifest, images[digest][1])
    except InputError as error:
        return [str(error)]
    return []


def _teacher_faults(manifest: Manifest, run: str) -> list[str]:
    """The labels against the weights of a teacher's run, which are known here by the file they lie in alone."""
    if not run:
        return []
    weights = Path(run) if Path(run).is_file() else Path(run) / "best" / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"teacher: no weights in {weights.parent}: give the run folder that teacher/main.py wrote")
    described = manifest.extra.get("teacher")
    named = described.get("hash") if isinstance(described, dict) else None
    found = sha256_of(weights)
    return [] if named == found else [f"written by teacher {str(named)[:12]}, but {weights} is {found[:12]}"]


def _repair(report: SetReport) -> int:
    """Repair what can be repaired. Returns the faults that are left."""
    root = Path(report.root)
    for number, shard in enumerate(report.shards):
        if shard.lost and rebuild_index(root, report.manifest, number):
            report.shards[number] = check_shard(open_folder(root), report.manifest, number, decode=True)
    report.forgive()
    if report.bad:
        old = read_quarantine(root, report.manifest)
        write_quarantine(root, report.manifest, old + report.bad)
        sys.stdout.write(f"{report.root}: {len(report.bad)} samples added to quarantine.json\n")
        for shard in report.shards:
            shard.forgive(report.left_out.get(shard.shard, set()) | shard.bad.keys())
    return report.num_faults


def _print(reports: list[SetReport]) -> None:
    table = Table("set", "kind", "shards", "samples", "unusable", "left out", "no label", "MB", "state")
    for report in reports:
        manifest = report.manifest
        table.add_row(
            escape(str(report.root)),
            manifest.kind,
            str(manifest.num_shards),
            str(manifest.num_samples),
            str(len(report.bad)),
            str(sum(map(len, report.left_out.values()))),
            str(sum(shard.num_without for shard in report.shards)),
            f"{manifest.num_bytes / 1e6:.1f}",
            f"{report.num_faults} faults" if report.num_faults else "good",
        )
    lines = [f"{report.root}: {fault}" for report in reports for fault in report.faults]
    for report in reports:
        for shard in report.shards:
            name = f"{report.root}/{report.manifest.files[shard.shard]}"
            lines += [f"{name}: {fault}" for fault in shard.faults]
            lines += [f"{name}: row {row} {key[:80]!r}: {reason}" for row, (key, reason) in sorted(shard.bad.items())]
    width = None if sys.stdout.isatty() else max(160, 80 + max(len(str(report.root)) for report in reports))
    console = Console(file=sys.stdout, width=width)
    console.print(table)
    for kind in ("images", "labels"):
        chosen = [report.manifest.num_samples for report in reports if report.manifest.kind == kind]
        if chosen:
            sys.stdout.write(f"{kind}: {sum(chosen)} samples in {len(chosen)} sets\n")
    for line in lines[:MAX_LINES]:
        sys.stdout.write(line + "\n")
    if len(lines) > MAX_LINES:
        sys.stdout.write(f"... and {len(lines) - MAX_LINES} more\n")


def command_line(arguments: list[str]) -> list[str]:
    """Let the folder be given as a bare first argument, and `--repair` without a value."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--path", *arguments]
    return [
        "--repair=true" if word == "--repair" and (after is None or after.startswith("-")) else word
        for word, after in zip_longest(arguments, arguments[1:], fillvalue=None)
        if word is not None
    ]


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    run_program(main, VerifyConfig, description="Check shard sets against their manifests.", check=check)
