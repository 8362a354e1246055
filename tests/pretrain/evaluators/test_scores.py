"""kNN, retrieval and the linear probe against other libraries and by hand."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lightly.utils.benchmarking import knn_predict
from sklearn.metrics import average_precision_score
from torch.nn.functional import normalize

from engine.errors import InputError
from pretrain.evaluators.base import Subject
from pretrain.evaluators.knn import knn, knn_scores
from pretrain.evaluators.linear_probe import accuracies, fit_head, linear_probe
from pretrain.evaluators.retrieval import retrieval, score_retrieval
from pretrain.evaluators.sources import ShardImages
from pretrain.probe_config import KnnConfig, LinearConfig, ProbeConfig, RetrievalConfig

Open = Callable[..., tuple[Subject, ProbeConfig]]


def clusters(count: int, *, dim: int = 16, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters: features `(count, dim)` and classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, dim, generator=generator), labels


@pytest.mark.parametrize(("k", "temperature"), [(200, 0.1), (20, 0.07), (1, 1.0)])
def test_knn_predicts_what_lightly_predicts(k: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever pieces queries and bank are compared."""
    bank, labels = clusters(700)
    queries, _ = clusters(300, seed=1)
    expected = knn_predict(
        normalize(queries, dim=1), normalize(bank, dim=1).T, labels, num_classes=5, knn_k=k, knn_t=temperature
    )[:, 0]
    options = {"num_classes": 5, "k": k, "temperature": temperature}
    whole = knn_scores(queries, bank, labels, **options)
    assert torch.equal(whole.argmax(1), expected)
    monkeypatch.setattr("pretrain.evaluators.knn.BANK_CHUNK", 97)
    pieces = knn_scores(queries, bank, labels, chunk=31, **options)
    assert torch.allclose(pieces, whole, rtol=1e-5) and torch.equal(pieces.argmax(1), expected)


def test_knn_says_its_options_and_refuses_too_many_neighbours(open_tiny: Open) -> None:
    subject, probe = open_tiny(knn=KnnConfig(k=7, temperature=0.07))
    result = knn(subject, probe)
    assert result.note == "k 7, T 0.07" and result.protocol["k"] == 7 and 0 <= result.metrics["top1"] <= 100
    with pytest.raises(InputError, match=r"knn\.k 73 is more than the 72"):
        knn(subject, dataclasses.replace(probe, knn=KnnConfig(k=73)))


def test_accuracies_by_hand() -> None:
    scores = torch.eye(7)[[0, 1, 2, 3]]
    scores[3, 5] = 2.0
    assert accuracies(scores, torch.tensor([0, 1, 2, 3])) == {"top1": 75.0, "top5": 100.0}
    assert accuracies(torch.eye(2), torch.tensor([0, 0])) == {"top1": 50.0}


def test_average_precision_is_scikit_learns() -> None:
    """Query by query, with similarities that occur several times."""
    generator = torch.Generator().manual_seed(3)
    gallery = torch.randint(0, 3, (90, 3), generator=generator).float() + 0.1
    classes = torch.randint(0, 4, (90,), generator=generator)
    queries, labels = gallery[:40] + 0.0, classes[:40]
    found, curve, used = score_retrieval(queries, labels, gallery, classes, config=RetrievalConfig(ranks=[1], chunk=7))
    similarity = (normalize(queries, dim=1) @ normalize(gallery, dim=1).T).numpy()
    assert len(np.unique(similarity[0])) < 90
    expected = [
        average_precision_score((classes == label).numpy(), row) for label, row in zip(labels, similarity, strict=True)
    ]
    assert found["map"] == pytest.approx(np.mean(expected), abs=1e-9) and used == 40
    assert curve == sorted(curve, reverse=True) and len(curve) == 21


def test_retrieval_by_hand_and_leaving_the_query_out() -> None:
    """Images on a line by their angle; classes 0 0 1 0."""
    angles = torch.tensor([0.0, 0.1, 0.15, 0.4])
    images = torch.stack([angles.cos(), angles.sin()], dim=1)
    classes = torch.tensor([0, 0, 1, 0])
    config = RetrievalConfig(gallery="leave_one_out", ranks=[1, 2], points=3)
    metrics, curve, used = score_retrieval(images, classes, images, classes, config=config)
    # query 0 ranks 1, 2, 3 as hit, miss, hit; query 1: miss, hit, hit; query 3: miss (image 2), hit, hit; 2 has no hit
    precisions = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2]
    assert used == 3 and metrics["map"] == pytest.approx(np.mean(precisions))
    assert metrics["p_at_1"] == pytest.approx(1 / 3) and metrics["p_at_2"] == pytest.approx(1 / 2)
    assert curve == pytest.approx([(1 + 2 / 3 + 2 / 3) / 3, (1 + 2 / 3 + 2 / 3) / 3, 2 / 3])


def test_retrieval_refuses_what_has_no_answer(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, probe = open_tiny()
    clean = retrieval(subject, probe).metrics
    corrupted = dataclasses.replace(probe, retrieval=RetrievalConfig(corruption="contrast", severity=5))
    pytest.importorskip("imagecorruptions")
    assert retrieval(subject, corrupted).metrics["map"] != clean["map"]
    for options, words in (
        (RetrievalConfig(ranks=[73]), "ranks"),
        (RetrievalConfig(corruption="rain"), "rain"),
        (RetrievalConfig(corruption="fog", severity=6), "1 to 5"),
    ):
        with pytest.raises(InputError, match=words):
            retrieval(subject, dataclasses.replace(probe, retrieval=options))
    read = ShardImages.read
    monkeypatch.setattr(ShardImages, "read", lambda self, number: (read(self, number)[0], 0))
    with pytest.raises(InputError, match="one class only"):
        retrieval(dataclasses.replace(subject, cache=None), probe)


def test_views_are_used_in_turn() -> None:
    """Views that all equal the centre crop change nothing; a view of noise does."""
    features, labels = clusters(200)
    config = LinearConfig(epochs=6, rates=[0.1], batch_size=50, views=2)
    plain = fit_head(features, labels, num_classes=5, config=config, seed=0)
    same = fit_head(features, labels, num_classes=5, config=config, seed=0, view=lambda epoch: features)
    assert torch.equal(plain.weights, same.weights)
    asked: list[int] = []

    def view(epoch: int) -> torch.Tensor:
        asked.append(epoch)
        return features if epoch % 2 == 0 else torch.zeros_like(features)

    other = fit_head(features, labels, num_classes=5, config=config, seed=0, view=view)
    assert not torch.allclose(plain.weights, other.weights) and asked == [0, 1, 2, 3, 4, 5]


def test_linear_probe_with_augmented_views_and_a_floor(open_tiny: Open) -> None:
    subject, probe = open_tiny(linear=LinearConfig(epochs=4, rates=[0.1], views=2, random_init=True))
    result = linear_probe(subject, probe)
    assert result.protocol["views"] == 2 and {"top1", "random_init_top1"} <= result.metrics.keys()
    assert subject.cache is not None and len(list(subject.cache.iterdir())) == 2 * (1 + 2 + 1 + 1)
    spare = dataclasses.replace(probe, linear=dataclasses.replace(probe.linear, cache_views=False))
    elsewhere = dataclasses.replace(subject, cache=subject.cache / "elsewhere")
    assert linear_probe(elsewhere, spare).metrics == result.metrics
    assert len(list((subject.cache / "elsewhere").iterdir())) == 2 * (1 + 1 + 1)
