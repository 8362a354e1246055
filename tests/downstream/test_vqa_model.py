"""The question-answering network: its formulas against plain convolutions, its masks, its probes."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from downstream.masks import grid_masks, pair_masks
from downstream.miner import mine, true_class_score
from downstream.models.vqa import LookName, QuestionAnswering, SmallTrunk
from downstream.protocol import Inputs

LOOK_NAMES: tuple[LookName, ...] = ("glimpses", "stacked")
TOKENS = torch.tensor([[5, 6, 7, 8], [3, 4, 0, 0], [7, 0, 0, 0]])


def small(look: LookName = "glimpses", *, trunk: bool = False) -> QuestionAnswering:
    torch.manual_seed(0)
    return QuestionAnswering(
        12,
        num_classes=5,
        channels=6,
        trunk=SmallTrunk(6) if trunk else None,
        look=look,
        embedding=7,
        lstm=8,
        width=9,
        hidden=10,
    ).eval()


def inputs_of(model: QuestionAnswering) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    if model.trunk is not None:
        images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=generator)
        return {"tokens": TOKENS, "images": images}
    return {"tokens": TOKENS, "features": torch.rand(3, 6, 4, 5, generator=generator).half()}


@pytest.mark.parametrize("look", LOOK_NAMES)
@pytest.mark.parametrize("trunk", [False, True])
def test_maps_are_densities_and_padding_gets_none(look: LookName, trunk: bool) -> None:
    model = small(look, trunk=trunk)
    found = model(inputs_of(model))
    assert found.logits.shape == (3, 5)
    assert found.maps["image"].shape == ((3, 4, 4) if trunk else (3, 4, 5)) and found.maps["text"].shape == (3, 4)
    for density in found.maps.values():
        assert torch.allclose(density.flatten(1).sum(1), torch.ones(3), atol=1e-5) and (density >= 0).all()
    assert torch.equal(found.masks["text"], TOKENS != 0) and (found.maps["text"][TOKENS == 0] == 0).all()


def test_padding_changes_nothing() -> None:
    model = small()
    inputs = inputs_of(model)
    longer = {**inputs, "tokens": functional.pad(TOKENS, (0, 3))}
    short, long = model(inputs), model(longer)
    assert torch.allclose(short.logits, long.logits, atol=1e-6)
    assert torch.allclose(short.maps["text"], long.maps["text"][:, :4], atol=1e-6)


def test_glimpses_are_those_of_the_paper() -> None:
    """Kazemi and Elqursh, section 3.3, with 1x1 convolutions channels first, an einsum, and the question by hand."""
    model = small()
    inputs = inputs_of(model)
    values = inputs["features"].float()
    values = values / values.square().sum(1, keepdim=True).sqrt()
    states, _ = model.read.lstm(torch.tanh(model.embed.weight[TOKENS]))
    energies = torch.tanh(states @ model.read.inner.weight.t() + model.read.inner.bias) @ model.read.outer.weight[0]
    words = torch.stack(
        [functional.pad(e[:n].softmax(0), (0, 4 - n)) for e, n in zip(energies, (4, 2, 1), strict=True)]
    )
    question = torch.einsum("bt,btc->bc", words, states)
    look = model.look
    keys = functional.conv2d(values, look.keys.weight[:, :, None, None])  # type: ignore[index, arg-type]
    query = functional.linear(question, look.query.weight, look.query.bias)  # type: ignore[union-attr, arg-type]
    outer = look.outer.weight[:, :, None, None]  # type: ignore[index, union-attr]
    maps = functional.conv2d(torch.relu(keys + query[:, :, None, None]), outer, look.outer.bias)  # type: ignore[union-attr, arg-type]
    glimpses = maps.flatten(2).softmax(2).view_as(maps)
    context = torch.einsum("bghw,bchw->bgc", glimpses, values).flatten(1)
    logits = model.classify(torch.cat([context, question], dim=1))
    found = model(inputs)
    assert torch.allclose(found.logits, logits, atol=1e-5) and torch.allclose(found.maps["text"], words, atol=1e-5)
    assert torch.allclose(found.maps["image"], glimpses.mean(1), atol=1e-5) and glimpses.shape[1] == 2


def test_the_default_widths_are_the_papers() -> None:
    with torch.device("meta"):
        model = QuestionAnswering(100, num_classes=3000)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert shapes["embed.weight"] == (100, 300) and shapes["read.lstm.weight_hh_l0"] == (4 * 1024, 1024)
    assert shapes["look.keys.weight"] == (512, 2048) and shapes["look.query.weight"] == (512, 1024)
    assert shapes["look.outer.weight"] == (2, 512)
    assert shapes["classify.1.weight"] == (1024, 2 * 2048 + 1024) and shapes["classify.4.weight"] == (3000, 1024)


@pytest.mark.parametrize("look", LOOK_NAMES)
def test_a_mask_behind_the_projection_is_a_mask_on_the_normalised_features(look: LookName) -> None:
    model = small(look)
    features = functional.normalize(inputs_of(model)["features"].float(), dim=1).permute(0, 2, 3, 1)
    mask = grid_masks((4, 5), count=1, scale=2, seed=0)[1].unsqueeze(-1)
    assert 0 < mask.mean() < 1
    assert torch.allclose(model.look.project(features * mask), model.look.project(features) * mask, atol=1e-6)


@pytest.mark.parametrize("look", LOOK_NAMES)
@pytest.mark.parametrize("modality", ["image", "text"])
def test_probing_with_the_question_read_once_is_probing_one_by_one(look: LookName, modality: str) -> None:
    model = small(look)
    inputs, targets = inputs_of(model), torch.tensor([0, 3, 1])
    grids = grid_masks((4, 5), count=9, scale=2, seed=0)

    def masks(one: Inputs) -> Tensor:
        return grids if modality == "image" else pair_masks(int((one["tokens"] != 0).sum()), size=4)

    found = mine(model, inputs, targets, modality=modality, masks=masks, max_rows=5)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        scores, maps = [], []
        with torch.no_grad():
            for mask in masks(one):
                features = model.encode(one)
                features[modality] = features[modality] * mask.unsqueeze(-1)
                output = model.attend(features, one)
                scores.append(float(true_class_score(output.logits, targets[row : row + 1])))
                maps.append(output.maps[modality][0])
        best = int(np.argmax(scores))
        assert int(found.best[row]) == best and float(found.scores[row]) == pytest.approx(scores[best], abs=1e-6)
        assert torch.allclose(found.maps[row], maps[best], atol=1e-5)


def test_stacked_attention_looks_twice_and_adds() -> None:
    model = small("stacked")
    question, features = torch.randn(2, 8), torch.randn(2, 3, 3, 6)
    look = model.look
    values = torch.tanh(features @ look.values.weight.t()).flatten(1, 2)  # type: ignore[union-attr, operator]
    refined, maps = question, []
    for keys, query, outer in zip(look.keys, look.queries, look.outers, strict=True):  # type: ignore[arg-type]
        weights = outer(torch.tanh(keys(values) + query(refined)[:, None])).softmax(1)
        refined = refined + (weights * values).sum(1)
        maps.append(weights.view(2, 3, 3))
    answer, density = look(look.project(features), question)
    assert torch.allclose(answer, refined, atol=1e-5) and torch.allclose(density, sum(maps) / 2, atol=1e-6)
    assert len(maps) == 2 and isinstance(look.keys, nn.ModuleList)


def test_both_maps_have_gradients() -> None:
    model = small(trunk=True).train()
    found = model(inputs_of(model))
    (found.maps["image"].square().sum() + found.maps["text"].square().sum()).backward()
    for name in ("trunk.0.weight", "look.keys.weight", "read.outer.weight", "embed.weight"):
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None and float(gradient.abs().sum()) > 0, name
