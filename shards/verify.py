"""Check shard sets against their manifests: `python shards/verify.py DIRECTORY`.

Counts, hashes, decodability, and for label sets agreement with the images. Exit code 2 on any fault. `--repair`
rebuilds indices that can be rebuilt, writes the samples that cannot be used into a list that readers respect, and takes
those out of it that are sound again; what that does not mend, such as a tar that other tools cannot read to its end,
stays a fault.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
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
from shards.index import IndexFault
from shards.location import is_remote, url_of
from shards.manifest import FILE_NAME, Manifest, check_labels, read_manifest
from shards.opening import read_shard_index
from shards.packing import available_cores
from shards.quarantine import FILE_NAME as QUARANTINE
from shards.quarantine import BadEntry, bad_rows, read_quarantine, write_quarantine
from shards.rebuilding import CannotRebuild, rebuild_index
from shards.verifying import ShardReport, check_shard

MAX_LINES = 20

# Not "delete": what a shard still holds is lost with it where it cannot be made again.
ANEW = {
    "images": "or move the tars of those shards out of the folder and pack again, which writes them anew",
    "labels": "or move tars and indices of those label shards out of the folder and give the command that wrote them "
    "(teacher/label.py, teacher/detect.py) again",
}

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
    """Rebuild lost indices, write unusable samples into quarantine.json beside the manifest, and take those out of it
    that are sound again (where `decode` is on). Both change the order of samples: runs on the set cannot be resumed."""
    workers: NonNegativeInt = 0
    """Processes; 0 takes one per available core."""


@dataclass(slots=True)
class SetReport:
    """What was found in one set; `quarantined` is its own list. Without `decoded` no sample is known to be sound."""

    root: Path | str
    manifest: Manifest
    shards: list[ShardReport]
    decoded: bool
    faults: list[str] = field(default_factory=list)
    quarantined: list[BadEntry] = field(default_factory=list)

    @property
    def bad(self) -> list[BadEntry]:
        """Unusable samples that are in use."""
        return [BadEntry(s.shard, row, *found) for s in self.shards for row, found in s.unusable.items()]

    @property
    def sound_again(self) -> list[BadEntry]:
        """Quarantined samples with which nothing is wrong any more."""
        return [entry for entry in self.quarantined if self.decoded and self.shards[entry.shard].is_sound(entry.row)]

    @property
    def num_faults(self) -> int:
        """Faults of the set, its shards and its samples."""
        return len(self.faults) + sum(len(shard.faults) + len(shard.unusable) for shard in self.shards)

    def leave_out(self, images: Images) -> None:
        """Read which rows readers leave out: by the set's quarantine; of labels also by that of their images."""
        self.quarantined = entries = read_quarantine(self.root, self.manifest)
        digest = _images_of(self.manifest)
        if digest in images:
            entries = entries + read_quarantine(*images[digest])
        rows = bad_rows(entries)
        for shard in self.shards:
            shard.left_out = set(rows[shard.shard].tolist()) if shard.shard in rows else set()


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
    for report in sorted(reports, key=lambda report: report.manifest.kind):  # images first: labels go by them
        if config.repair:
            _repair(report, images, config)
        elif again := len(report.sound_again):
            sys.stdout.write(f"{report.root}: {again} samples left out are sound again: --repair lets them back in\n")
    left = sum(report.num_faults for report in reports)
    if left:
        first = "do what is said there" if config.repair else "--repair leaves unusable samples out"
        anew = "; ".join(ANEW[kind] for kind in sorted({r.manifest.kind for r in reports if r.num_faults}))
        raise InputError(f"{config.path}: {left} faults, listed above: {first}; {anew}")


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
    result = SetReport(root, manifest, shards, config.decode)
    result.leave_out(images)
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


def _repair(report: SetReport, images: Images, config: VerifyConfig) -> None:
    """Mend what can be mended, and say what was done."""
    root = Path(report.root)
    here = {number for number, name in enumerate(report.manifest.files) if (root / name).exists()}
    for number in here:
        if report.shards[number].lost:
            _rebuild(report, number, images, config)
    report.leave_out(images)
    # Of a shard that is here but has no index nobody knows what is sound: that stays a fault.
    bad = [entry for entry in report.bad if entry.shard not in here or not report.shards[entry.shard].lost]
    sound = set(report.sound_again)
    if not bad and not sound:
        return
    if entries := [entry for entry in report.quarantined if entry not in sound] + bad:
        write_quarantine(root, report.manifest, entries)
    else:
        (root / QUARANTINE).unlink()
    if bad:
        sys.stdout.write(f"{root}: {len(bad)} samples added to {QUARANTINE}\n")
    if sound:
        sys.stdout.write(f"{root}: {len(sound)} samples are sound again and were taken out of {QUARANTINE}\n")
    report.leave_out(images)


def _rebuild(report: SetReport, number: int, images: Images, config: VerifyConfig) -> None:
    """Make the index of one shard anew, and check the shard with it."""
    root, name = Path(report.root), report.manifest.files[number]
    try:
        manifest = rebuild_index(root, report.manifest, number, keys=_image_keys(report, number, images))
    except CannotRebuild as error:
        sys.stdout.write(f"{root}/{name}: left as it is: {error}\n")
        return
    less = "" if manifest is report.manifest else f" but for the names of images left out; {FILE_NAME} has its new hash"
    sys.stdout.write(f"{root}/{name}: index rebuilt{less}\n")
    report.manifest = manifest
    report.shards[number] = check_shard(open_folder(root), manifest, number, decode=config.decode)


def _image_keys(report: SetReport, number: int, images: Images) -> list[str] | None:
    """Keys of the image shard that a label shard belongs to; None where that is not at hand, or unreadable."""
    if report.manifest.kind != "labels" or _label_faults(report.root, report.manifest, images):
        return None
    where, _ = images[_images_of(report.manifest)]
    try:
        return read_shard_index(open_folder(where), read_manifest(where), number).keys()  # repair may have renewed it
    except IndexFault:
        return None


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
            str(sum(len(shard.left_out) for shard in report.shards)),
            str(sum(len(shard.without) for shard in report.shards)),
            f"{manifest.num_bytes / 1e6:.1f}",
            f"{report.num_faults} faults" if report.num_faults else "good",
        )
    lines = [f"{report.root}: {fault}" for report in reports for fault in report.faults]
    for report in reports:
        for shard in report.shards:
            name = f"{report.root}/{report.manifest.files[shard.shard]}"
            lines += [f"{name}: {fault}" for fault in shard.faults]
            lines += [f"{name}: row {row} {key[:80]!r}: {reason}" for row, (key, reason) in shard.unusable.items()]
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
    """Let the folder be given as a bare word, before or after options, and `--repair` without a value."""
    words = [
        "--repair=true" if word == "--repair" and after.lower() not in ("true", "false") else word
        for word, after in zip(arguments, [*arguments[1:], ""], strict=False)
    ]
    for place, (before, word) in enumerate(zip(["", *words], words, strict=False)):
        is_value = before.startswith("--") and "=" not in before and before != "--check"
        if not (is_value or word.startswith("-")):
            return [*words[:place], "--path", *words[place:]]
    return words


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    run_program(main, VerifyConfig, description="Check shard sets against their manifests.", check=check)
