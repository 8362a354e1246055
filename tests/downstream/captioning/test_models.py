"""Captioners step by step and at once, and the search against exhaustive search."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from downstream.captioning.beam import search
from downstream.captioning.models.base import Captioner
from downstream.captioning.models.show_attend_tell import ShowAttendTell
from downstream.captioning.models.transformer import CaptionTransformer
from downstream.captioning.models.trunk import FeatureTrunk
from downstream.captioning.vocabulary import END, PADDING, START, UNKNOWN
from downstream.protocol import Inputs

KINDS = ("show_attend_tell", "transformer")
TOKENS = torch.tensor([[START, 5, 6, 4, END], [START, 7, END, 0, 0]])


def captioner(kind: str, *, num_words: int = 8, seed: int = 0, max_words: int = 6) -> Captioner:
    torch.manual_seed(seed)
    trunk = FeatureTrunk(3)
    if kind == "transformer":
        model: Captioner = CaptionTransformer(
            num_words, channels=3, trunk=trunk, grid=(2, 3), max_words=max_words, width=8, hidden=16, heads=2
        )
    else:
        model = ShowAttendTell(num_words, channels=3, trunk=trunk, embedding=5, attention=6, decoder=7)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from uniform, so that the order of captions matters
    return model.eval()


def features(count: int, seed: int = 1) -> Inputs:
    return {"features": torch.randn(count, 3, 2, 3, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("kind", KINDS)
def test_word_by_word_is_teacher_forcing(kind: str) -> None:
    model = captioner(kind)
    told = model({**features(2), "tokens": TOKENS})
    assert told.logits.shape == (2, 4, 8) and told.maps.shape == told.energies.shape == (2, 4, 2, 3)
    assert torch.allclose(told.maps.sum((2, 3)), torch.ones(2, 4), atol=1e-5)
    state = model.begin(features(2))
    for step in range(4):
        logits, maps, state = model.advance(TOKENS[:, step], state)
        assert torch.allclose(logits, told.logits[:, step], atol=1e-4)
        assert torch.allclose(maps, told.maps[:, step], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_later_and_padding_change_nothing(kind: str) -> None:
    model = captioner(kind)
    told = model({**features(2), "tokens": TOKENS})
    other = TOKENS.clone()
    other[0, 3] = 7
    changed = model({**features(2), "tokens": functional.pad(other, (0, 1))})
    assert torch.allclose(changed.logits[0, :3], told.logits[0, :3], atol=1e-5)
    assert torch.allclose(changed.logits[1, :4], told.logits[1], atol=1e-5)


def test_show_attend_tell_is_the_published_formula() -> None:
    """One step by hand: additive attention with a ReLU, a gate, an LSTM cell on word and context."""
    model = captioner("show_attend_tell")
    assert isinstance(model, ShowAttendTell)
    inputs = features(1)
    places = functional.layer_norm(
        inputs["features"][0].flatten(1).T, (3,), model.trunk.norm.weight, model.trunk.norm.bias
    )  # type: ignore[arg-type]
    hidden, cell = model.first_hidden(places.mean(0)), model.first_cell(places.mean(0))
    energies = torch.stack([model.outer(torch.relu(model.keys(p) + model.query(hidden))) for p in places])[:, 0]
    alpha = energies.softmax(0)
    context = torch.sigmoid(model.gate(hidden)) * (alpha @ places)
    word = torch.cat([model.embed.weight[START], context])
    hidden, cell = model.cell(word.unsqueeze(0), (hidden.unsqueeze(0), cell.unsqueeze(0)))
    told = model({**inputs, "tokens": TOKENS[:1, :2]})
    assert torch.allclose(told.logits[0, 0], model.classify(hidden[0]), atol=1e-5)
    assert torch.allclose(told.energies[0, 0].flatten(), energies, atol=1e-5)
    assert torch.allclose(told.maps[0, 0].flatten(), alpha, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_words_have_gradients_everywhere(kind: str) -> None:
    model = captioner(kind).train()
    told = model({**features(2), "tokens": TOKENS})
    (told.logits.square().mean() + told.energies.square().mean() + told.maps.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert float(parameter.grad.abs().sum()) > 0, name


def greedy(model: Captioner, inputs: Inputs, *, max_words: int) -> list[list[int]]:
    """One image and one word at a time."""
    found = []
    for row in range(len(inputs["features"])):
        state = model.begin({"features": inputs["features"][row : row + 1]})
        tokens = [START]
        while len(tokens) <= max_words and tokens[-1] != END:
            logits, _, state = model.advance(torch.tensor(tokens[-1:]), state)
            logits[:, [PADDING, START, UNKNOWN]] = -torch.inf
            tokens.append(int(logits.argmax()))
        found.append(tokens[1:])
    return found


def log_probability(model: Captioner, inputs: Inputs, caption: tuple[int, ...]) -> float:
    told = model({**inputs, "tokens": torch.tensor([[START, *caption]])})
    chosen = told.logits[0].log_softmax(1)
    return float(sum(chosen[t, token] for t, token in enumerate(caption)))


def without_padding(tokens: Tensor) -> list[list[int]]:
    return [[token for token in row if token != PADDING] for row in tokens.tolist()]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_beam_of_one_is_greedy(kind: str) -> None:
    for seed in range(3):
        model = captioner(kind, seed=seed)
        found = search(model, features(6), beam=1, max_words=5)
        assert without_padding(found.tokens) == greedy(model, features(6), max_words=5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [0.0, 0.7])
@torch.inference_mode()
def test_a_beam_that_holds_every_prefix_finds_the_best_caption(kind: str, penalty: float) -> None:
    words, longest = (4, 5, 6), 3
    captions = [(*body, END) for n in range(longest) for body in itertools.product(words, repeat=n)] + list(
        itertools.product(words, repeat=longest)
    )
    differs = 0
    for seed in range(4):
        model = captioner(kind, num_words=7, seed=seed)
        inputs = features(3, seed=seed)
        found = search(model, inputs, beam=len(captions), max_words=longest, length_penalty=penalty)
        narrow = search(model, inputs, beam=1, max_words=longest, length_penalty=penalty)
        for row in range(3):
            one = {"features": inputs["features"][row : row + 1]}
            scores = {c: log_probability(model, one, c) / len(c) ** penalty for c in captions}
            best = max(scores, key=lambda c: scores[c])
            assert tuple(without_padding(found.tokens)[row]) == best
            assert float(found.scores[row]) == pytest.approx(scores[best], abs=1e-4)
            differs += without_padding(narrow.tokens)[row] != list(best)
    assert differs, "greedy is not exact, or this test shows nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beam", [1, 2, 3, 20, 100])
@torch.inference_mode()
def test_any_beam_is_finite_and_batched(kind: str, beam: int) -> None:
    model = captioner(kind, num_words=6)
    inputs = features(5)
    together = search(model, inputs, beam=beam, max_words=4)
    assert torch.isfinite(together.scores).all() and torch.isfinite(together.maps).all()
    assert not set(together.tokens.flatten().tolist()) & {START, UNKNOWN}
    for row in range(5):
        alone = search(model, {"features": inputs["features"][row : row + 1]}, beam=beam, max_words=4)
        assert without_padding(alone.tokens) == [without_padding(together.tokens)[row]]
        assert float(alone.scores) == pytest.approx(float(together.scores[row]), abs=1e-5)
        length = len(without_padding(alone.tokens)[0])
        assert torch.allclose(together.maps[row, :length].sum((1, 2)), torch.ones(length), atol=1e-5)
        assert (together.maps[row, length:] == 0).all()


@torch.inference_mode()
def test_maps_belong_to_the_words_of_the_caption() -> None:
    model = captioner("show_attend_tell")
    inputs = features(1)
    found = search(model, inputs, beam=4, max_words=5)
    (tokens,) = without_padding(found.tokens)
    told = model({**inputs, "tokens": torch.tensor([[START, *tokens]])})
    assert torch.allclose(found.maps[0, : len(tokens)], told.maps[0], atol=1e-5)


def test_a_beam_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        search(captioner("transformer"), features(1), beam=0)


def test_batch_statistics_of_a_learning_encoder_are_kept() -> None:
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    trunk = FeatureTrunk(4, backbone=backbone, statistics=((0.5,) * 3, (0.5,) * 3)).train()
    assert trunk.training and backbone[0].training and not backbone[1].training
