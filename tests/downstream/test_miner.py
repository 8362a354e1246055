"""The surrogate miner against probing one mask at a time, and the masks it probes with."""

from collections.abc import Callable
from dataclasses import fields, replace
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.masks import grid_masks, keep_only_masks, pair_masks
from downstream.miner import Surrogates, mine, true_class_score
from downstream.models.image import SmallAttentionNetwork
from downstream.models.text import SelfAttentiveText, TransformerText
from downstream.protocol import AttentionModel, Inputs
from downstream.surrogates import PART, SurrogateStore, num_parts
from engine.errors import InputError


def text_case(kind: str) -> tuple[AttentionModel, Inputs, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "transformer":
        model: AttentionModel = TransformerText(20, num_classes=4, tokens=6, width=16)
    else:
        model = SelfAttentiveText(20, num_classes=4, embedding=8, lstm=8, attention=8, hops=3, hidden=16)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 4, 5, 0, 0, 0], [7, 0, 0, 0, 0, 0]])
    return model.eval(), {"tokens": tokens}, torch.tensor([0, 3, 1])


def own_masks(inputs: Inputs) -> torch.Tensor:
    tokens = inputs["tokens"][0]
    return pair_masks(int((tokens != 0).sum()), size=len(tokens))


@torch.no_grad()
def one_by_one(
    model: AttentionModel, inputs: Inputs, targets: torch.Tensor, modality: str, masks: Callable[[Inputs], torch.Tensor]
) -> Surrogates:
    maps, best, scores, unmasked, own = [], [], [], [], []
    for row in range(len(targets)):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        found = []
        for mask in masks(one):
            features = model.encode(one)
            features[modality] = features[modality] * mask.unsqueeze(-1)
            output = model.attend(features, one)
            found.append((true_class_score(output.logits, targets[row : row + 1]).item(), output.maps[modality][0]))
        number = int(np.argmax([score for score, _ in found]))
        maps.append(found[number][1])
        best.append(number)
        scores.append(found[number][0])
        unmasked.append(found[0][0])
        own.append(found[0][1])
    columns = (torch.tensor(best), torch.tensor(scores), torch.tensor(unmasked))
    return Surrogates(torch.stack(maps), *columns, torch.stack(own))


@pytest.mark.parametrize("max_rows", [0, 1, 7])
@pytest.mark.parametrize("kind", ["self_attentive", "transformer"])
def test_text_surrogates_are_those_of_probing_one_by_one(kind: str, max_rows: int) -> None:
    model, inputs, targets = text_case(kind)
    found = mine(model, inputs, targets, modality="text", masks=own_masks, max_rows=max_rows)
    slow = one_by_one(model, inputs, targets, "text", own_masks)
    assert torch.allclose(found.scores, slow.scores, atol=1e-5) and torch.allclose(
        found.unmasked, slow.unmasked, atol=1e-5
    )
    assert torch.allclose(found.maps, slow.maps, atol=1e-5) and (found.best == slow.best).all()
    assert torch.allclose(found.own, slow.own, atol=1e-5)
    assert (found.scores >= found.unmasked).all() and found.best[2] == 0, "a text of one token has no pair to mask"
    assert torch.allclose(found.maps.sum(1), torch.ones(3), atol=1e-5)
    assert (found.maps[1, 3:] == 0).all(), "padding gets no attention"


def test_image_surrogates_are_those_of_probing_one_by_one() -> None:
    torch.manual_seed(0)
    model = SmallAttentionNetwork(num_classes=5, image_size=16, channels=8).eval()
    inputs = {"images": torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)}
    targets, masks = torch.tensor([0, 4, 2]), grid_masks((4, 4), count=20, scale=2, seed=1)
    found = mine(model, inputs, targets, modality="image", masks=lambda row: masks, max_rows=13)
    slow = one_by_one(model, inputs, targets, "image", lambda row: masks)
    assert torch.allclose(found.maps, slow.maps, atol=1e-6) and (found.best == slow.best).all()
    again = mine(model, inputs, targets, modality="image", masks=lambda row: masks, max_rows=64)
    assert torch.equal(found.best, again.best)


def test_answer_shares_score_by_their_mean() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    shares = torch.tensor([[0.6, 0.3, 0.0]])
    expected = (logits.softmax(1) * torch.tensor([[2 / 3, 1 / 3, 0.0]])).sum()
    assert true_class_score(logits, shares).item() == pytest.approx(expected.item())


def test_a_broken_model_is_named() -> None:
    model, inputs, targets = text_case("self_attentive")
    with torch.no_grad():
        model.classify.weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="not finite"):
        mine(model, inputs, targets, modality="text", masks=own_masks)


def test_masks_are_what_the_paper_counts() -> None:
    pairs = pair_masks(5, size=8)
    assert pairs.shape == (1 + comb(5, 2), 8) and (pairs[0] == 1).all()
    assert (pairs[1:].sum(1) == 6).all() and (pairs[:, 5:] == 1).all() and len(pairs.unique(dim=0)) == len(pairs)
    kept = keep_only_masks(5, num_kept=2, size=8)
    assert kept.shape == (10, 8) and (kept.sum(1) == 2 + 3).all()
    grids = grid_masks((14, 14), count=500, scale=6, seed=0)
    assert grids.shape == (501, 14, 14) and (grids[0] == 1).all() and grids.min() >= 0 and grids.max() <= 1
    assert abs(grids[1:].mean().item() - 0.5) < 0.03
    assert torch.equal(grids, grid_masks((14, 14), count=500, scale=6, seed=0)) and len(pair_masks(1, size=3)) == 1


def test_a_store_goes_on_part_by_part_and_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    root = tmp_path / "text"
    count = PART + 3
    keys = [f"k{i}" for i in range(count)]
    maps = torch.rand(count, 4) + 0.1
    maps /= maps.sum(1, keepdim=True)
    whole = Surrogates(maps, torch.arange(count), torch.rand(count), torch.rand(count), maps.flip(0))

    def part(number: int) -> Surrogates:
        rows = slice(number * PART, (number + 1) * PART)
        return Surrogates(*(getattr(whole, field.name)[rows] for field in fields(whole)))

    store = SurrogateStore(root)
    store.write_part(0, part(0))
    assert store.has_part(0) and not store.has_part(1) and not store.complete
    with pytest.raises(InputError, match="no complete surrogates"):
        store.load(keys)
    store.write_part(1, part(1))
    store.seal(keys, {"model": "m"})
    found = SurrogateStore(root).load(keys)
    assert num_parts(count) == 2 and torch.equal(found.best, whole.best)
    assert torch.allclose(found.own, whole.own, atol=1e-3)
    assert torch.allclose(found.maps, whole.maps, atol=1e-3) and torch.allclose(found.maps.sum(1), torch.ones(count))
    with pytest.raises(InputError, match="mined for other examples"):
        store.load(keys[::-1])
    broken = SurrogateStore(tmp_path / "broken")
    broken.write_part(0, replace(part(1), maps=torch.full((3, 4), torch.nan)))
    broken.seal(keys[:3], {})
    with pytest.raises(InputError, match="maps that are not finite"):
        broken.load(keys[:3])
    file = root / "part-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged"):
        store.load(keys)
