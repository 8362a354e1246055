"""Images per second and core from JPEG to two SimCLR views: ours, lightly's, webdataset + torchvision, decoding alone.

    python benchmarks/data_path.py [--source FOLDER]     FOLDER, or else SACCADE_DATA, holds osie/ and imagenette128/

One process, one thread, processor time, by turns in one run; results are dropped as they come, as a training step
drops its batch. On OSIE's stimuli resized to 500x375 (quality 90), views of 224 pixels with SimCLR's augmentations and,
as `small_views`, of 128 pixels; and on Imagenette's 128x128 files as they are, with batch, view size and augmentations
of configs/pretrain/imagenette.yaml (256, 64 pixels) and, as `imagenette_128`, with views of 128 pixels and SimCLR's.
"worker" ends at two uint8 crops with their label map's codes, as a data-loader worker hands them on; "all in" adds the
colours and normalisation, and the densities of the maps, done on the same core. "decode" is simplejpeg alone on the
JPEG, as it is called by default. "limit" is what our worker cannot leave out: simplejpeg as the worker calls it (into
memory that it keeps, colours repeated, not interpolated, four bytes a pixel), two bare resizes of the worker's crops,
the fourth byte dropped, and the decompression of the map; files are in memory, nothing is drawn, checked, flipped or
counted. There is none for `small_views`, whose images are decoded at half their size where both crops allow it.
"without_map" leaves the maps out of both. Maps are an image's own low-pass contrast, about as large as a teacher's: one
map for all would teach the processor its branches. "resize_difference", not timed: of the worker's views to
torchvision's resized_crop (bicubic, antialiased) of the same crops of the fully decoded image, in levels of 0 to 255,
mean over all values and largest. Bytes read from a cold page cache: benchmarks/cold_reads.py.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset
import yaml
from common import add_source, environment, ratio_of_pairs, report, time_pairs
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pretrain.augment import recolour
from pretrain.config import ViewsConfig
from pretrain.data import ViewDataset
from pretrain.views import ViewCutter, draw_views, resize
from shards.decode import Scratch, image_header
from shards.labels import encode_label, label_directory, seal_labels, write_label_shard
from shards.map_png import read_map_png
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder as FolderSource

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "pretrain" / "imagenette.yaml"
QUESTIONS = (
    ("worker", "lightly"),
    ("worker", "decode"),
    ("worker_without_map", "decode"),
    ("all_in", "lightly"),
    ("all_in", "webdataset_torchvision"),
)
LIMITS = (("worker", "limit"), ("limit", "decode"), ("limit_without_map", "decode"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """Images, and what is made of them."""

    images: list[bytes]
    size: int
    views: ViewsConfig
    batch: int = 64
    questions: Sequence[tuple[str, str]] = QUESTIONS + LIMITS


def label_map(image: bytes) -> bytes:
    """PNG of a map about as rough as a teacher's, from the contrast of the image."""
    grey = simplejpeg.decode_jpeg(image, colorspace="GRAY")[..., 0]
    small = cv2.resize(grey, (56, 56), interpolation=cv2.INTER_AREA).astype(np.float32)
    contrast = np.abs(small - cv2.GaussianBlur(small, (0, 0), 5))
    return encode_label(cv2.GaussianBlur(contrast, (0, 0), 2.5) + 1e-3)


def prepare(images: list[bytes], folder: Path) -> tuple[Path, ShardSet]:
    """An image folder, and its shards with labels."""
    for number, data in enumerate(images):
        file = folder / "images" / f"class{number % 2}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    pack(FolderSource(folder / "images"), folder / "shards", workers=1)
    shards = ShardSet(folder / "shards")
    labels = label_directory(folder / "labels", "0" * 16)
    for shard, count in enumerate(shards.shard_sizes.tolist()):
        read = [shards.read(shard, row) for row in range(count)]
        write_label_shard(labels, shards, shard, [(sample.key, label_map(sample.image)) for sample in read])
    seal_labels(labels, shards, teacher={"hash": "0" * 16}, settings={"size": [56, 56]})
    return folder / "images", ShardSet(folder / "shards", labels=labels)


def ours(case: Case, shards: ShardSet) -> dict[str, Callable[[], object]]:
    """The worker's side, with and without maps, and all of it."""

    def make(shard_set: ShardSet, map_size: int) -> ViewDataset:
        return ViewDataset(shard_set, views=case.views, num_views=2, image_size=case.size, seed=0, map_size=map_size)

    dataset, without = make(shards, 56), make(ShardSet(shards.root), 0)
    rows = [(0, shard, row) for shard, count in enumerate(shards.shard_sizes.tolist()) for row in range(count)]
    groups = [rows[i : i + case.batch] for i in range(0, len(rows), case.batch)]

    def all_in() -> None:
        for group in groups:
            views = dataset.__getitems__(group)
            views.densities()
            recolour(views.images.flatten(0, 1), views.colours.flatten(0, 1), mean=MEAN, std=STD)

    return {
        "worker": lambda: drop(dataset.__getitems__(group) for group in groups),
        "worker_without_map": lambda: drop(without.__getitems__(group) for group in groups),
        "all_in": all_in,
    }


def limits(case: Case) -> dict[str, Callable[[], object]]:
    """Decoding alone, and decoding with the least that two views and a map take."""
    sizes = [simplejpeg.decode_jpeg_header(image)[:2] for image in case.images]
    count = len(sizes)
    drawn = draw_views(case.views, seed=0, epochs=[0] * count, samples=range(count), sizes=sizes, num_views=2)
    crops = drawn.crops.swapaxes(0, 1).tolist()
    pngs = [label_map(image) for image in case.images]
    out = np.empty((case.size, case.size, 3), dtype=np.uint8)
    four = np.empty((case.size, case.size, 4), dtype=np.uint8)
    memory = Scratch().take(4 * max(height * width for height, width in sizes))

    def two_resizes(image: np.ndarray, two: list[list[int]]) -> None:
        for crop in two:
            resize(image, crop, four)
            cv2.cvtColor(four, cv2.COLOR_RGBA2RGB, out)

    def limit(maps: bool) -> None:
        for data, two, png in zip(case.images, crops, pngs, strict=True):
            two_resizes(simplejpeg.decode_jpeg(data, "RGBX", fastupsample=True, buffer=memory), two)
            if maps:
                read_map_png(png)

    return {
        "decode": lambda: drop(simplejpeg.decode_jpeg(data) for data in case.images),
        "limit": lambda: limit(True),
        "limit_without_map": lambda: limit(False),
    }


def resize_difference(case: Case) -> dict[str, float]:
    """How far the worker's crops are from an antialiased bicubic resize, colours decoded fast and all."""
    sizes = [simplejpeg.decode_jpeg_header(image)[:2] for image in case.images]
    count = len(sizes)
    drawn = draw_views(case.views, seed=0, epochs=[0] * count, samples=range(count), sizes=sizes, num_views=2)
    cutter, found = ViewCutter(case.size), []
    views = np.empty((2, case.size, case.size, 3), dtype=np.uint8)
    for data, two in zip(case.images, drawn.crops.swapaxes(0, 1).tolist(), strict=True):
        cutter.cut(data, image_header(data), two, (False, False), out=views)
        image = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
        for crop, view in zip(two, views, strict=True):
            reference = v2.functional.resized_crop(
                image, *crop, [case.size] * 2, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
            )
            found.append(np.abs(view.astype(np.int16) - reference.permute(1, 2, 0).numpy()))
    return {
        "resize_difference_mean": float(np.mean([each.mean() for each in found])),
        "resize_difference_max": float(max(each.max() for each in found)),
    }


def theirs(case: Case, image_folder: Path, shards: Path) -> dict[str, Callable[[], object]]:
    """lightly's transform and torchvision's behind webdataset, with the same strengths."""
    views, size = case.views, case.size
    lightly = SimCLRTransform(
        input_size=size, cj_strength=views.jitter, min_scale=views.min_area, gaussian_blur=views.blur
    )
    s = views.jitter
    steps = [
        v2.RandomResizedCrop(size, (views.min_area, 1), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], p=0.8),
        v2.RandomGrayscale(views.grey),
        v2.RandomApply([v2.GaussianBlur(size // 10 | 1, (0.1, 2.0))], p=views.blur),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    view = v2.Compose(steps)

    def two_views(sample: dict[str, bytes]) -> tuple[torch.Tensor, torch.Tensor]:
        image = v2.functional.pil_to_tensor(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))
        return view(image), view(image)

    tars = [str(path) for path in sorted(shards.glob("*.tar"))]
    folder = ImageFolder(str(image_folder), transform=lightly)

    def stock() -> None:
        tar_samples = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
        drop(tar_samples.map(two_views).batched(case.batch))

    return {
        "lightly": lambda: drop(DataLoader(folder, batch_size=case.batch)),
        "webdataset_torchvision": stock,
    }


def drop(results: Iterable[object]) -> None:
    """Go through results without keeping any."""
    for _ in results:
        pass


def osie_like(source: Path, count: int) -> list[bytes]:
    """OSIE's stimuli as 500x375 JPEGs of quality 90, repeated to `count`."""
    files = sorted((source / "osie" / "data" / "stimuli").glob("*.jpg"))[:count]
    encoded = []
    for file in files:
        small = cv2.resize(cv2.imread(str(file)), (500, 375), interpolation=cv2.INTER_AREA)
        encoded.append(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    return (encoded * (count // len(encoded) + 1))[:count]


def measure(
    functions: dict[str, Callable[[], object]], questions: Sequence[tuple[str, str]], *, num_images: int, pairs: int
) -> dict[str, float]:
    """Ratios from pairs, and images/s of each contender."""
    figures: dict[str, float] = {}
    rates: dict[str, list[float]] = {}
    for one, other in questions:
        taken = time_pairs(functions[one], functions[other], num_pairs=pairs, clock=time.process_time)
        figures[f"{one}_vs_{other}"] = ratio_of_pairs(*taken)
        for name, seconds in zip((one, other), taken, strict=True):
            rates.setdefault(name, []).extend(num_images / s for s in seconds)
    return figures | {f"{name}_images_per_s": statistics.median(values) for name, values in rates.items()}


def cases(source: Path, count: int) -> dict[str, Case]:
    """What is measured, by the prefix of its figures."""
    files = sorted((source / "imagenette128" / "train").rglob("*.*"))
    nette = [files[i].read_bytes() for i in np.linspace(0, len(files) - 1, count).astype(int)]
    recipe = yaml.safe_load(RECIPE.read_text())
    large = osie_like(source, count)
    return {
        "": Case(large, 224, ViewsConfig()),
        "small_views_": Case(large, 128, ViewsConfig(), questions=QUESTIONS),
        "imagenette_": Case(
            nette,
            recipe["data"]["image_size"],
            ViewsConfig(**recipe["views"]),
            batch=recipe["data"]["batch_size"],
        ),
        "imagenette_128_": Case(nette, 128, ViewsConfig()),
    }


def main() -> None:
    """Measure all cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser, holds="osie/ and imagenette128/")
    parser.add_argument("--images", type=int, default=256, help="images per pass")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs per ratio")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    figures: dict[str, float] = {}
    for prefix, case in cases(options.source, options.images).items():
        with tempfile.TemporaryDirectory() as folder:
            image_folder, shards = prepare(case.images, Path(folder))
            functions = ours(case, shards) | limits(case) | theirs(case, image_folder, Path(folder) / "shards")
            found = measure(functions, case.questions, num_images=options.images, pairs=options.pairs)
        found |= resize_difference(case)
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
