"""Names of classes in captions, and masks on the grid."""

from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.captioning.config import SYNONYMS
from downstream.captioning.matching import (
    Mention,
    NameMatcher,
    grid_coverage,
    grid_labels,
    plural_of,
    read_synonyms,
)
from downstream.captioning.vocabulary import words_of
from engine.errors import InputError


@pytest.mark.parametrize(
    ("one", "several"),
    [
        ("dog", "dogs"),
        ("bus", "buses"),
        ("bench", "benches"),
        ("puppy", "puppies"),
        ("boy", "boys"),
        ("man", "men"),
        ("fireman", "firemen"),
        ("woman", "women"),
        ("person", "people"),
        ("knife", "knives"),
        ("sheep", "sheep"),
    ],
)
def test_plurals(one: str, several: str) -> None:
    assert plural_of(one) == several


def found_in(text: str, matcher: NameMatcher) -> list[tuple[int, str]]:
    return [(mention.position, mention.category) for mention in matcher.find(words_of(text))]


def test_names_plurals_and_synonyms_are_found_in_place() -> None:
    matcher = NameMatcher(["person", "dog", "traffic light"], {"person": ["man", "little girl"]})
    text = "Two men and a little girl wait at the traffic lights , their dogs too"
    assert found_in(text, matcher) == [
        (1, "person"),
        (5, "person"),
        (10, "traffic light"),
        (12, "dog"),
    ]
    assert matcher.find(["men"]) == [Mention(0, "person")]
    assert found_in("a light for traffic", matcher) == [] and found_in("doghouse", matcher) == []


def test_the_longest_name_wins() -> None:
    matcher = NameMatcher(["dog", "hot dog", "bear", "teddy bear"])
    assert found_in("a hot dog and a dog", matcher) == [(2, "hot dog"), (5, "dog")]
    assert found_in("teddy bears", matcher) == [(1, "teddy bear")]
    only_dogs = NameMatcher(["dog"], {"hot dog": []})
    assert found_in("a hot dog", only_dogs) == [(2, "hot dog")], "a class of the synonyms is known, detected or not"


def test_the_shipped_synonyms_name_cocos_80_classes_without_a_clash() -> None:
    synonyms = read_synonyms(SYNONYMS)
    assert len(synonyms) == 80
    matcher = NameMatcher([], synonyms)
    assert found_in("A woman with sunglasses rides her bike past parked cars", matcher) == [
        (1, "person"),
        (6, "bicycle"),
        (9, "car"),
    ]


def test_a_word_for_two_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'bat' stands for the classes 'animal' and 'baseball bat'"):
        NameMatcher(["animal"], {"baseball bat": ["bat"], "animal": ["bat"]})
    file = tmp_path / "synonyms.yaml"
    for text, complaint in (("[a, b]", "must map"), ("dog: puppy", "'dog' must have a list"), ("a: [b", "no YAML")):
        file.write_text(text)
        with pytest.raises(InputError, match=complaint):
            read_synonyms(file)
    assert read_synonyms(None) == {}


def test_coverage_is_the_area_of_each_cell() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((60, 90)) < 0.4
    expected = mask.reshape(5, 12, 6, 15).mean(axis=(1, 3))
    assert np.allclose(grid_coverage(mask, (5, 6)), expected, atol=1e-6)
    odd = rng.random((7, 10)) < 0.5  # cells that cut pixels
    fine = np.kron(odd, np.ones((3, 3)))  # 21 x 30 holds a 3 x 3 grid in whole pixels
    assert np.allclose(grid_coverage(odd, (3, 3)), fine.reshape(3, 7, 3, 10).mean(axis=(1, 3)), atol=1e-6)


def test_a_cell_counts_from_half_and_the_fullest_always() -> None:
    coverage = torch.tensor([[0.5, 0.49, 0.9, 0.0], [0.1, 0.02, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert grid_labels(coverage).tolist() == [[True, False, True, False], [True, False, False, False], [False] * 4]
