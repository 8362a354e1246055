"""Insertion and deletion against one image at a time, step by step, in plain numpy."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from downstream.branch.config import BranchConfig
from downstream.branch.evaluate import CURVES, check_curves, evaluate, play, summarise
from downstream.branch.model import AttentionBranchNetwork
from engine.errors import InputError
from engine.ranks import Ranks
from tests.downstream.branch.test_pictures import make

CONFIG = BranchConfig(backbone="test_resnet", size=32, insertion_steps=16, test_batch=4)


@pytest.fixture(scope="module")
def network() -> AttentionBranchNetwork:
    torch.manual_seed(0)
    network = AttentionBranchNetwork(CONFIG, num_classes=4)
    network(torch.rand(16, 3, 32, 32))  # statistics that let the images through
    return network.double().eval()


def plain_blur(image: np.ndarray) -> np.ndarray:
    """11x11 Gaussian of sigma 5, mirrored at the border, one pixel after the other."""
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 5) ** 2)
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(image, ((0, 0), (5, 5), (5, 5)), mode="reflect")
    found = np.empty_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            found[:, y, x] = (padded[:, y : y + 11, x : x + 11] * kernel).sum(axis=(1, 2))
    return found


def plain_game(
    network: AttentionBranchNetwork, image: Tensor, saliency: np.ndarray, target: int, *, game: str, num_steps: int
) -> float:
    """RISE's game of one image: its pixels changed in falling order of saliency, one forward after every step."""
    grey = np.broadcast_to(network.mean.numpy()[0], image.shape)
    start, end = {
        "insertion": (plain_blur(image.numpy()), image.numpy()),
        "insertion_zero": (grey, image.numpy()),
        "deletion": (image.numpy(), grey),
    }[game]
    order = np.argsort(-saliency.flatten(), kind="stable")
    current, per_step, scores = start.copy().reshape(3, -1), order.size // num_steps, []
    for step in range(num_steps + 1):
        if step:
            changed = order[(step - 1) * per_step : step * per_step]
            current[:, changed] = end.reshape(3, -1)[:, changed]
        with torch.no_grad():
            logits = network(torch.from_numpy(current.reshape(1, *image.shape))).logits
        scores.append(float(logits.softmax(1)[0, target]))
    return (sum(scores) - scores[0] / 2 - scores[-1] / 2) / num_steps


@pytest.mark.parametrize("game", CURVES)
def test_batched_games_are_those_of_one_image_at_a_time(network: AttentionBranchNetwork, game: str) -> None:
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 3, 1])
    maps = torch.rand(3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = play(network, images, maps, targets, curves=[game], config=CONFIG, autocast=nullcontext)
    wanted = [
        plain_game(network, image, saliency.numpy(), int(target), game=game, num_steps=16)
        for image, saliency, target in zip(images, maps, targets, strict=True)
    ]
    assert found[game].tolist() == pytest.approx(wanted, abs=1e-6)
    assert max(wanted) - min(wanted) > 1e-3, "the three images differ"
    assert found[f"{game}_scores"].shape == (3, 17)


def test_an_evaluation_holds_every_image_once(network: AttentionBranchNetwork) -> None:
    """Whatever the batch; and top-1, top-5 and the misclassified images' areas are those counted by hand."""
    pictures = make(10, side=32)
    network = network.float()
    options = {"curves": ["insertion"], "ranks": Ranks(), "autocast": nullcontext, "label": "test"}
    whole = evaluate(network, pictures, replace(CONFIG, test_batch=10), **options)  # type: ignore[arg-type]
    parts = evaluate(network, pictures, replace(CONFIG, test_batch=3), **options)  # type: ignore[arg-type]
    assert all(len(value) == 10 for value in whole.values()) and "map_cc" in whole
    assert torch.allclose(whole["insertion"], parts["insertion"], atol=1e-4)
    assert torch.equal(whole["top1"] == 1, whole["predicted"] == pictures.targets)
    assert whole["top5"].tolist() == [1.0] * 10, "there are only four classes"
    wrong = whole["top1"] == 0
    found = summarise(whole, wrong=wrong)
    assert found["test/top1"] == pytest.approx(100 * (1 - wrong.float().mean().item()))
    assert found["misclassified/insertion"] == pytest.approx(whole["insertion"][wrong].mean().item())
    assert "misclassified/insertion" not in summarise(whole, wrong=torch.zeros(10, dtype=torch.bool))
    network.double()


def test_an_unknown_game_is_refused() -> None:
    with pytest.raises(InputError, match=r"'solitaire'.*not known"):
        check_curves(["insertion", "solitaire"])
