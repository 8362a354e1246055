"""Images per second and core from JPEG to two SimCLR views: ours, lightly's, webdataset + torchvision, decoding alone.

    python benchmarks/data_path.py --source FOLDER        FOLDER holds osie/ and imagenette128/

One process, one thread, processor time, by turns in one run. On OSIE's stimuli resized to 500x375 (quality 90) and on
Imagenette's 128x128 files as they are; views of 224 and 128 pixels. "worker" ends at two uint8 crops with their label
map, as a data-loader worker hands them on; "all in" adds the colours and normalisation, done on the same core.
Bytes read from a cold page cache: benchmarks/cold_reads.py.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset
from common import environment, ratio_of_pairs, report, time_pairs
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from attention.maps import fixation_density
from pretrain.augment import recolour
from pretrain.config import ViewsConfig
from pretrain.data import ViewDataset
from shards.labels import encode_label, label_directory, seal_labels, write_label_shard
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder as FolderSource

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prepare(images: list[bytes], folder: Path) -> tuple[Path, Path, Path]:
    """An image folder, its shards and labels for them."""
    for number, data in enumerate(images):
        file = folder / "images" / f"class{number % 2}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    pack(FolderSource(folder / "images"), folder / "shards", workers=1)
    shards = ShardSet(folder / "shards")
    labels = label_directory(folder / "labels", "0" * 16)
    density = fixation_density([[40, 60]], size=(100, 100), sigma=12, grid=(56, 56))
    for shard in range(len(shards.shard_sizes)):
        write_label_shard(labels, shards, shard, [(key, encode_label(density)) for key in shards.keys(shard)])
    seal_labels(labels, shards, teacher={"hash": "0" * 16}, settings={"size": [56, 56]})
    return folder / "images", folder / "shards", labels


def contenders(images: list[bytes], folder: Path, *, size: int, batch: int) -> dict[str, Callable[[], object]]:
    """Functions that each bring all images through once."""
    image_folder, shards, labels = prepare(images, folder)
    dataset = ViewDataset(
        ShardSet(shards, labels=labels), views=ViewsConfig(), num_views=2, image_size=size, seed=0, map_size=56
    )
    sizes = dataset.shards.shard_sizes.tolist()
    rows = [(0, shard, row) for shard, count in enumerate(sizes) for row in range(count)]
    groups = [rows[i : i + batch] for i in range(0, len(rows), batch)]

    def all_in() -> None:
        for group in groups:
            views = dataset.__getitems__(group)
            recolour(views.images.flatten(0, 1), views.colours.flatten(0, 1), mean=MEAN, std=STD)

    lightly = ImageFolder(str(image_folder), transform=SimCLRTransform(input_size=size))
    jitter = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)
    blur = v2.RandomApply([v2.GaussianBlur(size // 10 | 1, (0.1, 2.0))], p=0.5)
    view = v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.08, 1), antialias=True),
            v2.RandomHorizontalFlip(),
            jitter,
            v2.RandomGrayscale(0.2),
            blur,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def two_views(sample: dict[str, bytes]) -> tuple[torch.Tensor, torch.Tensor]:
        image = v2.functional.pil_to_tensor(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))
        return view(image), view(image)

    tars = [str(path) for path in sorted(shards.glob("*.tar"))]

    def stock() -> None:
        pipeline = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).map(two_views).batched(batch)
        for _ in pipeline:
            pass

    return {
        "worker": lambda: [dataset.__getitems__(group) for group in groups],
        "all_in": all_in,
        "lightly": lambda: [None for _ in DataLoader(lightly, batch_size=batch)],
        "webdataset_torchvision": stock,
        "decode": lambda: [simplejpeg.decode_jpeg(data) for data in images],
    }


def osie_like(source: Path, count: int) -> list[bytes]:
    """OSIE's stimuli as 500x375 JPEGs of quality 90, repeated to `count`."""
    files = sorted((source / "osie" / "data" / "stimuli").glob("*.jpg"))[:count]
    encoded = []
    for file in files:
        small = cv2.resize(cv2.imread(str(file)), (500, 375), interpolation=cv2.INTER_AREA)
        encoded.append(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    return (encoded * (count // len(encoded) + 1))[:count]


def measure(functions: dict[str, Callable[[], object]], *, num_images: int, pairs: int) -> dict[str, float]:
    """Ratios from pairs, and images/s of each contender."""
    figures: dict[str, float] = {}
    questions = (
        ("worker", "lightly"), ("worker", "decode"), ("all_in", "lightly"), ("all_in", "webdataset_torchvision"),
    )  # fmt: skip
    rates: dict[str, list[float]] = {}
    for ours, theirs in questions:
        taken = time_pairs(functions[ours], functions[theirs], num_pairs=pairs, clock=time.process_time)
        figures[f"{ours}_vs_{theirs}"] = ratio_of_pairs(*taken)
        for name, seconds in zip((ours, theirs), taken, strict=True):
            rates.setdefault(name, []).extend(num_images / s for s in seconds)
    return figures | {f"{name}_images_per_s": statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """Measure both sets and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with osie/ and imagenette128/")
    parser.add_argument("--images", type=int, default=256, help="images per pass")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs per ratio")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    figures: dict[str, float] = {}
    nette = sorted((options.source / "imagenette128" / "train").rglob("*.*"))
    chosen = [nette[i] for i in np.linspace(0, len(nette) - 1, options.images).astype(int)]
    sets = {
        "": (osie_like(options.source, options.images), 224),
        "imagenette_": ([p.read_bytes() for p in chosen], 128),
    }
    for prefix, (images, size) in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            functions = contenders(images, Path(folder), size=size, batch=64)
            found = measure(functions, num_images=len(images), pairs=options.pairs)
            figures |= {prefix + name: value for name, value in found.items()}
    report(
        "data_path",
        figures=figures,
        environment=environment(images=options.images, pairs=options.pairs),
        title="From JPEG to two views, on one core",
        notes=__doc__ or "",
    )


if __name__ == "__main__":
    main()
