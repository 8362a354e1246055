"""Evaluations in a training: what several evaluators need is read and computed once."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from timm.models.resnet import ResNet
from torch import Tensor

from engine.program import parse_config
from pretrain.config import Config
from pretrain.trainer import train
from tests.conftest import TinySample

NUM_IMAGES = 72 + 40  # of the tiny sample's training and validation set


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of images of each batch that a frozen encoder is given; but for the single one that sizes the heads."""
    sizes: list[int] = []
    forward = ResNet.forward_features

    def counted(self: ResNet, images: Tensor) -> Tensor:
        if not self.training and len(images) > 1:
            sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(ResNet, "forward_features", counted)
    return sizes


@pytest.fixture
def watched(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    """Trains for four steps with these evaluators after every second one; what they found."""

    def run(evaluators: str, **online: Any) -> list[dict[str, Any]]:
        name = evaluators.replace(",", "-")
        given = {"evaluators": evaluators, "every_steps": 2, "val": str(tiny_sample.val)} | online
        given["options"] = {"knn.k": 5, "linear.epochs": 3} | online.get("options", {})
        config = student_config(run=name, max_steps=4, arm="contrastive", online=given)
        train(parse_config(Config, argv=["--config", str(config)])[0])
        lines = (tmp_path / "runs" / name / "probe" / "online.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def features_in_memory() -> int:
    """Tensors with a row for each image of one of the sets."""
    gc.collect()
    return sum(type(each) is Tensor and each.shape[:1] in ((72,), (40,)) for each in gc.get_objects())


def test_features_that_several_evaluators_need_are_computed_once(
    watched: Callable[..., list[dict[str, Any]]], encoded: list[int]
) -> None:
    """Twice, after the second and the fourth step; the numbers are those of each evaluator on its own."""
    alone = watched("knn") + watched("linear_probe") + watched("retrieval")
    assert sum(encoded) == 3 * 2 * NUM_IMAGES
    encoded.clear()
    before = features_in_memory()
    together = watched("knn,linear_probe,retrieval")
    assert sum(encoded) == 2 * NUM_IMAGES
    assert sorted(together, key=lambda line: (line["evaluator"], line["step"])) == alone
    assert len({line["encoder"] for line in together}) == 2
    assert features_in_memory() == before  # when the evaluations are over


def test_views_of_one_evaluator_are_not_kept(watched: Callable[..., list[dict[str, Any]]], encoded: list[int]) -> None:
    """A view comes again after as many epochs as there are views, and is computed again rather than kept in memory."""
    watched("linear_probe", options={"linear.epochs": 4, "linear.views": 2, "linear.rates": [0.1]})
    assert sum(encoded) == 2 * (NUM_IMAGES + 4 * 72)
