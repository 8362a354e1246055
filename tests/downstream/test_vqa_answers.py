"""Official normalisation and accuracy of VQA answers."""

from itertools import product

import pytest
import torch

from downstream.objective import classification_score
from downstream.tasks.answers import AnswerShares, as_compared, most_frequent, normalise


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The Dog", "dog"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("a red, white and blue one", "red white and blue 1"),
        ("1,000", "1000"),
        ("yes, 1,000 people", "yes 1000 people"),
        ("3.5", "3.5"),
        ("u.s.a.", "usa"),
        ("black/white", "black white"),
        ("dont know", "don't know"),
        ("it's", "it s"),
        ("10 o'clock", "10 o clock"),
        ("oclock", "o'clock"),
        ("  new\tyork\n", "new york"),
        ("what?", "what"),
        ("Im", "im"),
        ("x :;y", "x y"),
        ("t-shirt", "t-shirt"),
        ("the", ""),
    ],
)
def test_answers_are_normalised_by_the_official_rules(given: str, expected: str) -> None:
    assert normalise(given) == expected


def official_accuracy(answers: list[str], predicted: str) -> float:
    scores = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        scores.append(min(1.0, others.count(predicted) / 3))
    return sum(scores) / len(scores)


def test_the_score_is_the_mean_over_the_ten_leave_one_out_subsets() -> None:
    classes = {"yes": 0, "no": 1, "2": 2}
    for yes, no in product(range(11), repeat=2):
        if yes + no > 10:
            continue
        answers = ["yes"] * yes + ["no"] * no + [f"other {i}" for i in range(10 - yes - no)]
        shares = AnswerShares([answers], classes)[torch.tensor([0])]
        for number, name in enumerate(classes):
            logits = torch.nn.functional.one_hot(torch.tensor([number]), 3).float()
            score = float(classification_score(logits, shares))
            assert score == pytest.approx(official_accuracy(answers, name), abs=1e-6), (yes, no, name)


def test_shares_are_made_dense_by_row_and_know_what_is_answerable() -> None:
    shares = AnswerShares([["a"] * 7 + ["b"] * 2 + ["?"], ["?"] * 10, ["b"] * 10], {"a": 0, "b": 1})
    assert len(shares) == 3 and shares.answerable.tolist() == [True, False, True]
    found = shares[torch.tensor([2, 0, 1])]
    assert found.dtype == torch.float32 and torch.allclose(found, torch.tensor([[0, 1], [0.7, 0.2], [0, 0]]))


def test_unanimous_answers_are_compared_as_they_are() -> None:
    assert as_compared(["u.s.\n"] * 10) == ["u.s."] * 10
    assert as_compared(["u.s."] * 9 + ["us"]) == ["us"] * 10


def test_classes_are_the_most_frequent_answers_and_ties_go_by_the_alphabet() -> None:
    assert most_frequent(["b", "a", "c", "c"], count=2) == {"c": 0, "a": 1}
