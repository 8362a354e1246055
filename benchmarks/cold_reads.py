"""Bytes read per sample from a cold page cache, against the size of the image files.

    python benchmarks/cold_reads.py [--source FOLDER]     FOLDER, or else SACCADE_DATA, holds osie/ and imagenette128/

Sets of images are packed, their pages dropped from the page cache, and samples read in training's shuffled order:
a single batch (what a seek costs), and a whole epoch. Counted by the kernel for this process: bytes asked for by
system calls, and bytes fetched from the disk, which come in pages and with read-ahead. Compared with the same images
as files in a folder, read in random order from a cold cache. Index and manifest are read before and not counted.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from common import add_source, environment, report
from data_path import osie_like

from shards.order import SampleOrder
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder

BATCH = 64


def drop_pages(paths: Iterable[Path]) -> None:
    """Write back and forget the cached pages of files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that `work` asked for, and bytes that came from the disk."""
    before = _counters()
    work()
    after = _counters()
    return after["rchar"] - before["rchar"], after["read_bytes"] - before["read_bytes"]


def _counters() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}


def _read_samples(shards: ShardSet, positions: list[list[int]]) -> None:
    for shard, row in positions:
        shards.read(shard, row)


def _read_files(files: list[Path]) -> None:
    for file in files:
        file.read_bytes()


def measure(images: list[bytes], folder: Path) -> dict[str, float]:
    """Figures of one set of images."""
    for number, data in enumerate(images):
        file = folder / "images" / f"class{number % 2}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    pack(ImageFolder(folder / "images"), folder / "shards", shard_mb=4, workers=1)
    shards = ShardSet(folder / "shards")
    positions = SampleOrder(shards.shard_sizes, seed=0).slice(0, shards.num_samples)[:, 1:].tolist()
    tars = sorted((folder / "shards").glob("*.tar"))
    files = sorted((folder / "images").rglob("*.jpg"))
    order = np.random.default_rng(0).permutation(len(files)).tolist()
    for shard in range(len(tars)):
        shards.keys(shard)  # opens it and reads its index
    mean = sum(map(len, images)) / len(images)
    figures = {"file_bytes_per_sample": mean}
    for name, count in (("batch", min(BATCH, len(images))), ("epoch", len(images))):
        drop_pages(tars)
        asked, fetched = bytes_read(partial(_read_samples, shards, positions[:count]))
        drop_pages(files)
        _, of_files = bytes_read(partial(_read_files, [files[number] for number in order[:count]]))
        figures |= {
            f"{name}_asked_bytes_per_sample": asked / count,
            f"{name}_disk_bytes_per_sample": fetched / count,
            f"{name}_folder_disk_bytes_per_sample": of_files / count,
            f"{name}_disk_bytes_over_file_bytes": fetched / count / mean,
            f"{name}_shards_vs_folder": of_files / fetched,
        }
    return figures


def main() -> None:
    """Measure both sets and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser, holds="osie/ and imagenette128/")
    parser.add_argument("--images", type=int, default=700, help="images of each set")
    options = parser.parse_args()
    nette = sorted((options.source / "imagenette128" / "train").rglob("*.*"))
    chosen = [nette[i] for i in np.linspace(0, len(nette) - 1, options.images).astype(int)]
    sets = {"": osie_like(options.source, options.images), "imagenette_": [path.read_bytes() for path in chosen]}
    figures: dict[str, float] = {}
    for prefix, images in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(images, Path(folder))
        figures |= {prefix + name: value for name, value in found.items()}
    report(
        "cold_reads",
        figures=figures,
        environment=environment(images=options.images, batch=BATCH, shard_mb=4),
        title="Bytes read per sample from a cold page cache",
        notes=__doc__ or "",
    )


if __name__ == "__main__":
    main()
