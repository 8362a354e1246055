"""Crops cut on the device against torchvision, maps that move with their images, and the split."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import resized_crop

from attention.maps import encode_map, to_density
from downstream.branch.data import stratified
from downstream.branch.pictures import Batch, Cropping, PictureSet, central_boxes, cut
from downstream.data import training_batches


def make(count: int, *, side: int = 48, seed: int = 0) -> PictureSet:
    """Smooth pictures whose channels equal their maps."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(
        torch.rand(count, 1, 5, 5, generator=generator), size=(side, side), mode="bilinear"
    )
    codes = encode_map(smooth[:, 0])
    pixels = (255 * (codes.float() / 255).square()).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    keys = [f"class{i % 4}/image{i}" for i in range(count)]
    targets = torch.tensor([i % 4 for i in range(count)])
    return PictureSet(keys, pixels, np.full((count, 2), side), targets, codes, torch.ones(count, dtype=torch.bool))


def test_a_crop_is_torchvisions() -> None:
    pixels = make(3).pixels
    boxes = torch.tensor([[0.25, 0.125, 0.5, 0.75], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    flips = torch.tensor([False, True, False])
    found = cut(pixels, boxes, flips, size=16)
    assert found.shape == (3, 3, 16, 16) and found.is_contiguous(memory_format=torch.channels_last)
    for i, (top, left, height, width) in enumerate((48 * boxes).int().tolist()):
        wanted = resized_crop(pixels[i].float() / 255, top, left, height, width, [16, 16], antialias=True)
        assert torch.allclose(found[i], wanted.flip(2) if flips[i] else wanted, atol=2e-3)


def test_maps_move_with_their_images() -> None:
    """Pictures that are their own maps stay so under any crop and mirror."""
    pictures = make(8)
    batch = Cropping(pictures.sizes, min_area=0.2, seed=3).__getitems__([(0, 0, row) for row in range(8)])
    assert batch.flips.any() and not batch.flips.all()
    views = pictures.views(batch, size=12, grid=(12, 12))
    assert views.maps is not None and views.use.tolist() == [1.0] * 8
    assert torch.allclose(to_density(views.images[:, 0]), to_density(views.maps), atol=1e-4)


def test_a_view_without_attention_or_without_map_is_not_supervised() -> None:
    pictures = make(2)
    corner = torch.zeros(2, 48, 48)
    corner[:, :8, :8] = 1
    pictures = replace(pictures, maps=encode_map(corner), has_map=torch.tensor([True, False]))
    whole, away = torch.tensor([0.0, 0, 1, 1]), torch.tensor([0.5, 0.5, 0.5, 0.5])
    rows, flips = torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.bool)
    views = pictures.views(Batch(rows, torch.stack([whole, away, whole]), flips), size=8, grid=(4, 4))
    assert views.use.tolist() == [1.0, 0.0, 0.0]
    assert pictures.views(Batch(rows, torch.stack([whole] * 3), flips), size=8, grid=None).maps is None


def test_the_central_square_is_square_in_the_image() -> None:
    boxes = central_boxes(np.array([[100, 200], [300, 100], [64, 64]]), share=0.8)
    assert np.allclose(boxes[0], [0.1, 0.3, 0.8, 0.4]) and np.allclose(boxes[1], [1.1 / 3, 0.1, 0.8 / 3, 0.8])
    assert np.allclose(boxes[2], [0.1, 0.1, 0.8, 0.8])


def test_batches_do_not_depend_on_ranks_or_where_a_run_began() -> None:
    pictures = make(12)
    cropping = Cropping(pictures.sizes, min_area=0.3, seed=5)
    options = {"count": len(pictures), "batch_size": 4, "seed": 5, "num_workers": 0}

    def batches(rank: int, world_size: int, start: int) -> list[Batch]:
        places = {"rank": rank, "world_size": world_size, "start_step": start, "stop_step": 6}
        return list(training_batches(cropping, **options, **places))  # type: ignore[arg-type]

    whole, later = batches(0, 1, 0), batches(0, 1, 4)
    halves = [batches(rank, 2, 0) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.boxes, torch.cat([half[step].boxes for half in halves]))
    assert torch.equal(whole[5].boxes, later[1].boxes) and torch.equal(whole[5].flips, later[1].flips)
    assert sorted(torch.cat([b.rows for b in whole[:3]]).tolist()) == list(range(12))
    assert not torch.equal(whole[0].boxes, whole[3].boxes), "another crop in another epoch"


def test_the_split_is_stratified_and_does_not_depend_on_the_order() -> None:
    pictures = make(40)
    held = stratified(pictures, share=0.3, seed=1)
    assert np.bincount(pictures.targets.numpy()[held]).tolist() == [3, 3, 3, 3]
    order = np.random.default_rng(0).permutation(40)
    shuffled = pictures.part(order)
    again = stratified(shuffled, share=0.3, seed=1)
    assert {k for k, h in zip(pictures.keys, held, strict=True) if h} == {
        k for k, h in zip(shuffled.keys, again, strict=True) if h
    }
    assert not np.array_equal(held, stratified(pictures, share=0.3, seed=2))


@pytest.mark.parametrize("count", [4, 8])
def test_no_class_is_held_back_whole(count: int) -> None:
    held = stratified(make(count), share=0.9, seed=0)
    assert held.sum() == (0 if count == 4 else 4), "one image of a class stays for training"
