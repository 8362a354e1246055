"""The losses by value: the mining term is a sum over the global batch; maps are compared at peak 1."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from attention.maps import encode_map
from downstream.branch.config import BranchConfig
from downstream.branch.model import AttentionBranchNetwork
from downstream.branch.objective import BranchObjective, map_loss
from downstream.branch.pictures import Batch, PictureSet

CONFIG = BranchConfig(backbone="test_resnet", size=32, sigma=0.5, alpha=0.3, gamma=0.7)


@pytest.fixture
def pictures() -> PictureSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 40, 40), generator=generator, dtype=torch.uint8)
    maps = encode_map(torch.rand(6, 8, 8, generator=generator))
    has_map = torch.tensor([True, True, False, True, True, True])
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    return PictureSet([f"k{i}" for i in range(6)], pixels, np.full((6, 2), 40), targets, maps, has_map)


def batch_of(pictures: PictureSet, rows: list[int]) -> Batch:
    return pictures.central(np.array(rows), share=0.9)


def losses(
    network: AttentionBranchNetwork, pictures: PictureSet, rows: list[int], *, config: BranchConfig, batch_size: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    network.zero_grad()
    objective = BranchObjective(network, pictures, config, batch_size, network.grid, use_maps=True)
    found = objective(batch_of(pictures, rows), step=0, backward=lambda loss: loss.backward())  # type: ignore[arg-type]
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return found, gradient


def test_the_loss_is_the_papers(pictures: PictureSet) -> None:
    torch.manual_seed(0)
    network = AttentionBranchNetwork(CONFIG, num_classes=3, mining=True)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    found, _ = losses(network, pictures, [0, 1, 2, 3], config=CONFIG, batch_size=4)
    network.load_state_dict(state)
    views = pictures.views(batch_of(pictures, [0, 1, 2, 3]), size=32, grid=network.grid)
    out = network(views.images)
    masked = out.masked_logits.softmax(1)[torch.arange(4), views.targets]
    given = views.maps / views.maps.amax(dim=(1, 2), keepdim=True)
    by_image = (out.maps - given).square().sum(dim=(1, 2)).sqrt() * torch.tensor([1.0, 1, 0, 1])
    wanted = cross_entropy(out.logits, views.targets) + cross_entropy(out.attention_logits, views.targets)
    wanted = wanted + 0.3 * masked.sum() + 0.7 * by_image.sum() / 4
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found["masked_score"].item() == pytest.approx(masked.mean().item(), rel=1e-5)


def test_averaged_over_two_ranks_it_is_one_ranks(pictures: PictureSet) -> None:
    """Half batches with averaged gradients, as DDP does it, give the whole batch's gradient; norms in eval mode."""
    torch.manual_seed(0)
    network = AttentionBranchNetwork(CONFIG, num_classes=3, mining=True)
    network(torch.rand(8, 3, 32, 32))
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.train(False)
    _, whole = losses(network, pictures, [0, 1, 3, 4], config=CONFIG, batch_size=4)
    halves = [losses(network, pictures, rows, config=CONFIG, batch_size=4)[1] for rows in ([0, 1], [3, 4])]
    assert torch.allclose(whole, (halves[0] + halves[1]) / 2, atol=1e-5)


def test_maps_are_compared_at_peak_one_whatever_their_scale() -> None:
    maps = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    given = torch.tensor([[[8.0, 0.0], [0.0, 0.0]]])
    assert map_loss("l2", maps, given).tolist() == pytest.approx([1.0])
    assert torch.equal(map_loss("l2", maps, given), map_loss("l2", maps, given / 100))
    assert map_loss("l2", maps, torch.zeros(1, 2, 2)).tolist() == pytest.approx([1.0]), "a map that says nothing"
    for name in ("mse", "kld", "nss"):
        better, worse = (map_loss(name, p, given) for p in (given + 0.1, given.flip(1) + 0.1))  # type: ignore[arg-type]
        assert better < worse


def test_without_mining_and_maps_both_terms_are_absent(pictures: PictureSet) -> None:
    torch.manual_seed(0)
    network = AttentionBranchNetwork(CONFIG, num_classes=3)
    objective = BranchObjective(network, pictures, replace(CONFIG, gamma=100), 2, network.grid, use_maps=False)
    found = objective(batch_of(pictures, [0, 1]), step=0, backward=lambda loss: loss.backward())  # type: ignore[arg-type]
    assert set(found) == {"loss", "attention", "perception", "score"}
    assert found["loss"].item() == pytest.approx((found["attention"] + found["perception"]).item())
