"""Insertion and deletion curves of scores whose areas are known."""

import pytest
import torch

from attention.insertion import blurred, deletion_auc, insertion_auc


def share_of(mask: torch.Tensor):
    """Score: how much of the masked area of an image is 1."""
    return lambda images: (images[:, 0] * mask).sum(dim=(1, 2)) / mask.sum()


@pytest.fixture
def setting() -> tuple[torch.Tensor, torch.Tensor]:
    """White images and an object that fills their upper left quarter."""
    mask = torch.zeros(20, 20)
    mask[:10, :10] = 1
    return torch.ones(2, 3, 20, 20), mask


def test_a_right_map_reveals_the_object_first(setting):
    images, mask = setting
    black = torch.zeros_like(images)
    maps = torch.stack([mask, 1 - mask])
    curve = insertion_auc(share_of(mask), images, maps, num_steps=100, start=black)
    # Right: rises to 1 over the first quarter. Wrong: stays at 0 until the last.
    torch.testing.assert_close(curve.auc, torch.tensor([0.875, 0.125]), atol=1e-3, rtol=0)
    assert curve.scores.shape == (2, 101) and curve.fractions[[0, -1]].tolist() == [0, 1]
    assert curve.scores[:, 0].tolist() == [0, 0] and curve.scores[:, -1].tolist() == [1, 1]


def test_a_right_map_deletes_the_object_first(setting):
    images, mask = setting
    curve = deletion_auc(share_of(mask), images, torch.stack([mask, 1 - mask]), num_steps=100)
    torch.testing.assert_close(curve.auc, torch.tensor([0.125, 0.875]), atol=1e-3, rtol=0)


def test_small_maps_are_resized_and_a_blur_is_the_start(setting):
    images, mask = setting
    small = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]).expand(2, -1, -1)
    striped = images.clone()
    striped[..., ::2] = 0
    curve = insertion_auc(share_of(mask), striped, small, num_steps=10)
    torch.testing.assert_close(curve.scores[:, 0], share_of(mask)(blurred(striped)))
    torch.testing.assert_close(curve.scores[:, -1], share_of(mask)(striped))
    assert curve.scores.shape == (2, 11)


def test_constant_nan_and_one_pixel_maps_have_a_curve(setting):
    images, mask = setting
    for maps in (torch.ones(2, 5, 5), torch.full((2, 5, 5), torch.nan), torch.zeros(2, 1, 1)):
        auc = deletion_auc(share_of(mask), images, maps, num_steps=4).auc
        assert ((auc > 0.1) & (auc < 0.9)).all()


def test_scores_are_not_differentiated(setting):
    images, mask = setting
    assert not deletion_auc(share_of(mask), images.requires_grad_(), mask.expand(2, -1, -1)).auc.requires_grad


def test_wrong_shapes_are_refused(setting):
    images, mask = setting
    for maps, num_steps in ((mask, 5), (mask.expand(3, -1, -1), 5), (mask.expand(2, -1, -1), 0)):
        with pytest.raises(ValueError, match="num_steps"):
            insertion_auc(share_of(mask), images, maps, num_steps=num_steps)
