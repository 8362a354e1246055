"""Fixations as padded points and as maps."""

import numpy as np
import pytest
import torch

from attention.fixations import fixation_counts, fixations_from_maps, locate, pad_fixations, shuffled_negatives


def test_padding_keeps_every_image_apart():
    points, valid = pad_fixations([np.array([[1.0, 2.0]]), np.zeros((0, 2)), np.array([[3.0, 4.0], [5.0, 6.0]])])
    assert points.shape == (3, 2, 2) and valid.tolist() == [[True, False], [False, False], [True, True]]
    assert points[2].tolist() == [[3, 4], [5, 6]]
    assert pad_fixations([])[0].shape == (0, 0, 2)


def test_points_move_from_the_image_to_a_grid():
    image = np.array([[0, 0], [399.9, 1], [799, 599], [400, 300]])
    points, _ = pad_fixations([image], size=(600, 800), grid=(3, 4))
    index, usable = locate(points, None, (3, 4))
    assert usable.all() and index.tolist() == [[0, 1, 11, 6]]


def test_points_that_are_not_there_are_left_out():
    points = torch.tensor([[-0.5, 0], [4, 0], [0, 3], [torch.nan, 1], [torch.inf, 1], [3.99, 2.99], [1, 1]])
    valid = torch.tensor([True] * 6 + [False])
    index, usable = locate(points, valid, (3, 4))
    assert usable.tolist() == [False] * 5 + [True, False]
    assert index[5] == 11


def test_points_and_maps_say_the_same():
    points = torch.tensor([[[0.0, 0.0], [3.2, 1.9], [3.9, 1.1]], [[1.0, 2.0], [9.0, 9.0], [0.0, 0.0]]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    counts = fixation_counts(points, valid, (3, 4))
    assert counts.sum(dim=(1, 2)).tolist() == [3, 1] and counts[0, 1, 3] == 2
    again, real = fixations_from_maps(counts)
    assert real.tolist() == [[True, True, True], [True, False, False]]
    assert torch.equal(fixation_counts(again, real, (3, 4)), counts)
    assert fixations_from_maps(torch.zeros(2, 3, 4))[0].shape == (2, 0, 2)


def test_negatives_are_the_points_of_other_images():
    points = torch.arange(12.0).view(3, 2, 2)
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    pool, others = shuffled_negatives(points, valid)
    assert pool.tolist() == [[0, 1], [2, 3], [4, 5], [8, 9], [10, 11]]
    assert (~others).nonzero().tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [2, 4]]
    assert torch.equal(shuffled_negatives(points)[1].sum(dim=1), torch.tensor([4, 4, 4]))


def test_drawn_negatives_are_never_an_images_own():
    owner = torch.arange(4.0)[:, None, None].expand(4, 5, 2)
    valid = torch.tensor([5, 0, 3, 1])[:, None] > torch.arange(5)
    drawn, usable = shuffled_negatives(owner, valid, num=400)
    assert drawn.shape == (4, 400, 2) and usable.all()
    for image, others in enumerate(({2.0, 3.0}, {0.0, 2.0, 3.0}, {0.0, 3.0}, {0.0, 2.0})):
        assert set(drawn[image].flatten().tolist()) == others
    assert torch.equal(drawn, shuffled_negatives(owner, valid, num=400)[0])


def test_without_other_points_no_negative_is_usable():
    assert not shuffled_negatives(torch.rand(1, 5, 2), num=7)[1].any()
    drawn, usable = shuffled_negatives(torch.rand(2, 0, 2), num=7)
    assert drawn.shape == (2, 7, 2) and not usable.any()


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="num_points, 2"):
        locate(torch.zeros(2, 5, 3), None, (3, 4))
    with pytest.raises(ValueError, match="valid"):
        locate(torch.zeros(2, 5, 2), torch.ones(2, 4, dtype=torch.bool), (3, 4))
