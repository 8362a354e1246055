"""Views are a pure function of (seed, epoch, sample, view) and follow SimCLR's distributions."""

import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import ColorJitter

from engine.loading import make_loader
from pretrain.config import ViewsConfig
from pretrain.data import ViewDataset, find_label_set
from pretrain.philox import philox
from pretrain.reuse import ArrayPool
from pretrain.views import BLUR, GREY, ORDER, ORDERS, SOLARIZE, ViewCutter, Views, draw_views
from shards.decode import decode_rgb, image_header
from shards.faults import RemoteFault
from shards.reader import ShardSet, Stored
from tests.conftest import TinySample


def jpeg(image: np.ndarray, *, quality: int = 98, subsampling: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def draw(
    samples: Sequence[int],
    *,
    epoch: int = 0,
    seed: int = 0,
    size: tuple[int, int] = (300, 400),
    config: ViewsConfig | None = None,
) -> Views:
    count = len(samples)
    config = config or ViewsConfig()
    return draw_views(config, seed=seed, epochs=[epoch] * count, samples=samples, sizes=[size] * count, num_views=2)


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFF_FFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_its_authors_known_answers(counter: list[int], key: int, block: list[int]) -> None:
    """The known answers that Random123 ships for philox4x32-10; each in the middle of a batch of others."""
    batch = np.random.default_rng(0).integers(0, 2**32, (4, 3, 5))
    batch[:, 1, 2] = counter
    assert philox(batch, key=key)[:, 1, 2].tolist() == block


def test_a_view_depends_on_its_key_alone() -> None:
    """Neither on its place in the batch, nor on the others in it, nor on their sizes."""
    first = draw([5, 6, 7])
    sizes = [(31, 17), (300, 400), (300, 400)]
    again = draw_views(ViewsConfig(), seed=0, epochs=[3, 0, 0], samples=[5, 7, 5], sizes=sizes, num_views=2)
    for found, expected in ((2, 0), (1, 2)):
        for array in ("crops", "flips", "colours"):
            assert np.array_equal(getattr(again, array)[:, found], getattr(first, array)[:, expected])
    huge = [draw([5], epoch=1), draw([5], seed=1), draw([5], seed=1 << 40), draw([5], seed=-1), draw([5 + (1 << 32)])]
    crops = [tuple(crop) for views in [first, *huge] for crop in views.colours.reshape(-1, 8).tolist()]
    assert len(set(crops)) == len(crops)


def test_boxes_are_distributed_as_torchvisions() -> None:
    """Mean and spread of area, ratio and position over 3,000 draws, against RandomResizedCrop itself."""
    ours = draw(range(3000)).crops[1].astype(float)
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400)
    params = [RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3]) for _ in range(3000)]
    for found, expected in zip(measures(ours), measures(np.array(params, dtype=float)), strict=True):
        error = np.hypot(found.std(), expected.std()) / np.sqrt(3000)
        assert abs(found.mean() - expected.mean()) < 4 * error
        assert found.std() == pytest.approx(expected.std(), rel=0.08)


@pytest.mark.parametrize("size", [(100, 1000), (1000, 100), (1, 1), (3, 500), (250, 200)])
def test_crops_lie_inside_and_extreme_images_get_torchvisions_central_one(size: tuple[int, int]) -> None:
    top, left, tall, wide = draw(range(500), size=size).crops.reshape(-1, 4).T
    assert (top >= 0).all() and (left >= 0).all() and (tall >= 1).all() and (wide >= 1).all()
    assert (top + tall <= size[0]).all() and (left + wide <= size[1]).all()
    if max(size) == 10 * min(size):  # with area 0.08 and more, few tries fit
        image = torch.zeros(3, *size)
        central = RandomResizedCrop.get_params(image, scale=[0.99, 1.0], ratio=[3 / 4, 4 / 3])
        assert (np.stack([top, left, tall, wide], 1) == central).all(axis=1).mean() > 0.2


def measures(boxes: np.ndarray) -> list[np.ndarray]:
    """Top, left, area and log ratio of boxes `(boxes, 4)`."""
    top, left, height, width = boxes.T
    return [top, left, height * width, np.log(width / height)]


def test_rates_of_flip_jitter_grey_and_blur_are_simclrs() -> None:
    views = draw(range(4000))
    colours = views.colours[0]
    rates = {
        0.5: np.mean(views.flips[0]),
        0.8: np.mean(colours[:, ORDER] >= 0),
        0.2: np.mean(colours[:, GREY]),
    }
    for expected, found in rates.items():
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)
    assert abs(np.mean(colours[:, BLUR] > 0) - 0.5) < 0.035
    sigmas = colours[:, BLUR][colours[:, BLUR] > 0]
    assert sigmas.min() >= 0.1 and sigmas.max() <= 2.0 and abs(sigmas.mean() - 1.05) < 0.06
    assert len(np.unique(colours[:, ORDER])) == 25  # 24 orders and none


@pytest.mark.parametrize("jitter", [0.5, 1.0, 2.0])
def test_colours_are_distributed_as_torchvisions(jitter: float) -> None:
    """Range, mean, quantiles and order of the jitter's parameters, against ColorJitter's own draws."""
    colours = draw(range(4000), config=ViewsConfig(jitter=jitter)).colours[1]
    theirs = ColorJitter(*[0.8 * jitter] * 3, hue=0.2 * jitter)
    torch.manual_seed(0)
    params = [theirs.make_params([]) for _ in range(4000)]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        low, high = getattr(theirs, name)
        found, expected = colours[:, column], np.array([one[f"{name}_factor"] for one in params])
        width = high - low
        assert low <= found.min() < low + 0.005 * width and high - 0.005 * width < found.max() <= high
        error = np.hypot(found.std(), expected.std()) / np.sqrt(4000)
        assert abs(found.mean() - expected.mean()) < 4 * error
        shares = np.linspace(0.05, 0.95, 19)
        assert np.abs(np.quantile(found, shares) - np.quantile(expected, shares)).max() < 0.04 * width
    ours = ORDERS[colours[colours[:, ORDER] >= 0][:, ORDER].astype(int)]
    orders = torch.stack([one["fn_idx"] for one in params]).numpy()
    for place in range(4):
        rates = [np.bincount(found[:, place], minlength=4) / len(found) for found in (ours, orders)]
        assert np.abs(rates[0] - rates[1]).max() < 4 * np.sqrt(0.25 * 0.75 * (1 / len(ours) + 1 / len(orders)))


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
def test_views_are_solarised_as_often_as_said(rate: float) -> None:
    found = draw(range(4000), config=ViewsConfig(solarize=rate)).colours[..., SOLARIZE]
    assert abs(found.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / found.size)


def test_what_is_drawn_for_views_and_properties_is_independent() -> None:
    """Over 4,000 images no two of a view's numbers go together, nor any with the other view's."""
    views = draw(range(4000))
    columns = [*views.crops[0].T, *views.crops[1].T, *views.flips, *views.colours[0].T, *views.colours[1].T]
    table = np.array(columns, dtype=float)
    table = table[np.ptp(table, axis=1) > 0]
    correlation = np.corrcoef(table) - np.eye(len(table))
    for view in (slice(0, 4), slice(4, 8)):
        correlation[view, view] = 0  # a large crop has little room to move, and is high and wide
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


def cut(
    data: bytes, crops: list[tuple[int, ...]], *, stored: tuple[int, int], size: int, flip: bool = False
) -> np.ndarray:
    """The views of one image, written among others that must stay as they are."""
    images = np.full((len(crops), 3, size, size, 3), 7, dtype=np.uint8)
    header = image_header(data)
    assert header[:2] == stored
    ViewCutter(size).cut(data, header, crops, [flip] * len(crops), out=images[:, 1])
    assert (images[:, ::2] == 7).all()
    return images[:, 1].astype(float)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [16, 40, 64, 96, 128])
@pytest.mark.parametrize("second", [(0, 0, 100, 130), (9, 7, 12, 15)])
def test_a_crop_shows_what_its_box_says(flip: bool, size: int, second: tuple[int, ...]) -> None:
    """On a gradient image every output pixel's colour tells where it came from, whatever door and kernel it takes.

    A tiny second crop keeps the image from being decoded at a smaller scale, so that the first is shrunk here.
    """
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    image = np.stack([x, y, np.full_like(x, 128)], -1).astype(np.uint8)
    crops = [(64, 32, 128, 96), second, (3, 5, 231, 201)]
    for (top, left, tall, wide), out in zip(
        crops, cut(jpeg(image), crops, stored=(256, 256), size=size, flip=flip), strict=True
    ):
        across = left + wide * (np.arange(size) + 0.5) / size - 0.5
        down = top + tall * (np.arange(size) + 0.5) / size - 0.5
        inner = slice(2, -2)
        expected = across[::-1] if flip else across
        assert np.abs(out[inner, inner, 0] - expected[None, inner]).max() < 3
        assert np.abs(out[inner, inner, 1] - down[inner, None]).max() < 3


@pytest.mark.parametrize("side", [70, 90, 100, 110, 120, 192, 240])
def test_resizing_comes_close_to_antialiased_bicubic(side: int) -> None:
    """Closer than OpenCV's bicubic kernel alone where the crop shrinks, on a scene with fine texture.

    A tiny second crop keeps the image from being decoded at a smaller scale.
    """
    rng = np.random.default_rng(0)
    texture = [rng.integers(0, 256, (n, n, k), dtype=np.uint8) for n, k in ((16, 3), (48, 1), (120, 1))]
    parts = [Image.fromarray(np.repeat(part, 3 // part.shape[2], axis=2)) for part in texture]
    scene = np.mean([np.asarray(part.resize((256, 256), Image.Resampling.BICUBIC)) for part in parts], axis=0)
    data = jpeg(scene.astype(np.uint8), quality=90, subsampling=2)
    out = cut(data, [(3, 5, side, side), (0, 0, 40, 40)], stored=(256, 256), size=64)[0]
    crop = decode_rgb(data)[3 : 3 + side, 5 : 5 + side]
    reference = np.asarray(Image.fromarray(crop).resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
    cubic = cv2.resize(crop, (64, 64), interpolation=cv2.INTER_CUBIC)
    error = np.abs(out - reference).mean()
    assert error < (3 if side < 3 * 64 else 5)
    if side > 1.2 * 64:
        assert error < np.abs(cubic - reference).mean()


@pytest.mark.parametrize(("size", "side"), [(64, 513), (64, 521), (128, 1025), (224, 449), (224, 1793), (32, 259)])
def test_images_decoded_at_a_smaller_scale_stay_in_place(size: int, side: int) -> None:
    """A dot near the far corner, in images whose sides are no multiples of eight."""
    place, width = side - 1 - 6 * side / size, 3 * side / size
    y, x = np.mgrid[:side, :side]
    dot = 255 * np.exp(-((y - place) ** 2 + (x - place) ** 2) / (2 * width**2))
    data = jpeg(np.repeat(dot[..., None], 3, axis=2).astype(np.uint8), quality=98)
    view = cut(data, [(0, 0, side, side)], stored=(side, side), size=size)[0, ..., 0]
    view[view < 40] = 0
    centre = [(view.sum(1 - axis) * np.arange(size)).sum() / view.sum() for axis in (0, 1)]
    assert np.abs(np.array(centre) - ((place + 0.5) * size / side - 0.5)).max() < 0.1


def test_scaled_decoding_changes_little_and_extreme_images_work() -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    image = np.asarray(small.resize((1600, 1200), Image.Resampling.BICUBIC))
    out = cut(jpeg(image), [(0, 0, 1200, 1600)], stored=(1200, 1600), size=64)[0]
    reference = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BOX))
    assert np.abs(out - reference).mean() < 2
    for stored in ((1, 1), (3, 500), (500, 3)):
        crops = draw([0], size=stored).crops[:, 0].tolist()
        out = cut(jpeg(np.full((*stored, 3), 77, np.uint8)), crops, stored=stored, size=8)
        assert np.abs(out - 77).max() <= 1
    whole = jpeg(np.full((20, 30, 3), 77, np.uint8))
    with pytest.raises(ValueError, match=r".+"):
        ViewCutter(8).cut(
            whole[:-200], image_header(whole), [(0, 0, 9, 9)], [False], out=np.empty((1, 8, 8, 3), np.uint8)
        )


def dataset_of(images: Path, labels: Path) -> ViewDataset:
    shards = ShardSet(images, labels=labels)
    return ViewDataset(shards, views=ViewsConfig(), num_views=2, image_size=32, seed=3, map_size=56)


def test_a_sample_is_the_same_whatever_batch_it_comes_in(tiny_sample: TinySample) -> None:
    """And as its parts say: image, class and map of the shards, and the view that its box and flip describe."""
    dataset = dataset_of(tiny_sample.train, find_label_set(tiny_sample.labels))
    positions = [(epoch, shard, row) for epoch, shard, row in [(0, 1, 3), (5, 0, 0), (0, 2, 23), (1, 1, 3)] * 5]
    batch = dataset.__getitems__(positions)
    for number, position in enumerate(positions[:4]):
        alone, sample = dataset[position], dataset.shards.read(*position[1:])
        for field in ("images", "boxes", "flips", "colours"):
            assert torch.equal(getattr(alone, field)[:, 0], getattr(batch, field)[:, number]), field
            assert torch.equal(getattr(batch, field)[:, number], getattr(batch, field)[:, number + 8]), field
        assert batch.labels[number] == sample.label and batch.valid[number]
        assert batch.sizes is not None and batch.sizes[number].tolist() == [64, 64]
        np.testing.assert_allclose(batch.densities()[number], sample.map, rtol=1e-6)
        pixels = decode_rgb(sample.image)
        for view in range(2):
            top, left, tall, wide = (batch.boxes[view, number] * batch.sizes[number].repeat(2)).round().int().tolist()
            crop = cv2.resize(pixels[top : top + tall, left : left + wide], (32, 32), interpolation=cv2.INTER_AREA)
            seen = batch.images[view, number].numpy()
            seen = seen[:, ::-1] if batch.flips[view, number] else seen
            assert np.abs(seen.astype(float) - crop).mean() < 6
    assert not torch.equal(batch.boxes[:, 0], batch.boxes[:, 3])


@pytest.mark.parametrize("payload", [b"\xff\xd8\xff\xe0", b"no image at all", b"cut"])
def test_unreadable_samples_are_marked_and_leave_the_others_alone(
    tiny_sample: TinySample, monkeypatch: pytest.MonkeyPatch, payload: bytes
) -> None:
    dataset = dataset_of(tiny_sample.train, find_label_set(tiny_sample.labels))
    positions = [(0, 0, row) for row in range(6)]
    whole, key, read = dataset.__getitems__(positions), dataset.shards.key(0, 2), dataset.shards.read_stored

    def spoiled(shard: int, row: int) -> Stored:
        stored = read(shard, row)
        if row == 2:
            stored.image = stored.image[: len(stored.image) // 2] if payload == b"cut" else payload
        if row == 4:
            stored.codes = np.zeros((28, 28), dtype=np.uint8)
        return stored

    monkeypatch.setattr(dataset.shards, "read_stored", spoiled)
    batch = dataset.__getitems__(positions)
    good = [0, 1, 3, 5]
    assert batch.valid.tolist() == [row in good for row in range(6)] and batch.labels[[2, 4]].tolist() == [-1, -1]
    assert len(batch.bad) == 2 and key in batch.bad[0] and "28" in batch.bad[1]
    file = tiny_sample.train / dataset.shards.manifest.files[0]
    assert all(reason.startswith(f"{file}: sample ") for reason in batch.bad), batch.bad
    assert batch.sizes is not None and batch.sizes.tolist() == [[64 * (row in good)] * 2 for row in range(6)]
    assert (batch.images[:, [2, 4]] == 0).all() and (batch.colours[:, [2, 4]] == 0).all()
    assert batch.boxes[:, [2, 4]].tolist() == [[[0, 0, 1, 1]] * 2] * 2 and not batch.flips[:, [2, 4]].any()
    assert batch.maps is not None and whole.maps is not None and torch.equal(batch.maps[good], whole.maps[good])
    for field in ("images", "boxes", "flips", "colours"):
        assert torch.equal(getattr(batch, field)[:, good], getattr(whole, field)[:, good]), field


def test_a_lost_connection_is_no_bad_sample(tiny_sample: TinySample, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(tiny_sample.train, find_label_set(tiny_sample.labels))

    def lost(shard: int, row: int) -> Stored:
        raise RemoteFault("http://host/shard-000000.tar: no answer in time")

    monkeypatch.setattr(dataset.shards, "read_stored", lost)
    with pytest.raises(RemoteFault, match="no answer in time"):
        dataset.__getitems__([(0, 0, 0)])


@pytest.mark.parametrize(
    "keep",
    [
        lambda array: array,
        lambda array: array[1:, ::2],
        lambda array: torch.from_numpy(array),
        lambda array: torch.from_numpy(array)[1].unsqueeze(0),
        lambda array: torch.from_numpy(array).view(-1).numpy()[3:],
    ],
    ids=["array", "slice", "tensor", "view", "array of a tensor"],
)
def test_memory_is_used_again_only_when_nobody_holds_it(keep: Callable[[np.ndarray], object]) -> None:
    pool = ArrayPool()
    array = pool.take((4, 3), np.uint8)
    address, held = array.ctypes.data, keep(array)
    del array
    assert pool.take((4, 3), np.uint8).ctypes.data != address
    assert pool.take((4, 2), np.uint8).shape == (4, 2) and pool.take((4, 3), np.int8).dtype == np.int8
    del held
    assert address in [array.ctypes.data for array in (pool.take((4, 3), np.uint8), pool.take((4, 3), np.uint8))]
    many = [pool.take((4, 3), np.uint8) for _ in range(9)]
    assert len({array.ctypes.data for array in many}) == 9 and len(pickle.dumps(pool)) < 200


def test_batches_that_are_kept_stay_as_they_are(tiny_sample: TinySample) -> None:
    """Though the memory of those that are dropped is used again, and whatever workers they come from."""
    dataset = dataset_of(tiny_sample.train, find_label_set(tiny_sample.labels))
    groups = [[(epoch, 0, row) for row in range(4)] for epoch in range(12)]
    expected = [dataset_of(tiny_sample.train, find_label_set(tiny_sample.labels)).__getitems__(g) for g in groups]
    addresses = {dataset.__getitems__(group).images.data_ptr() for group in groups}
    assert len(addresses) == 1
    for workers in (0, 1):
        kept = list(make_loader(dataset, groups, num_workers=workers))
        for batch, right in zip(kept, expected, strict=True):
            assert torch.equal(batch.images, right.images) and torch.equal(batch.maps, right.maps)
