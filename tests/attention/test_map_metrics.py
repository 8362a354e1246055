"""Metrics: agreement with pysaliency, scipy, POT and numpy on random and on OSIE maps; degenerate input."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from attention import metrics
from attention.fixations import fixation_counts, fixations_from_maps, pad_fixations, shuffled_negatives
from attention.maps import fixation_density
from tests.attention.reference import as_fixations, stored_model

GRID = (30, 40)
TOLERANCE = {"atol": 1e-6, "rtol": 0.0}


class Case:
    """Maps, human maps and fixations of a few images, as tensors and as pysaliency's objects."""

    def __init__(self, pysaliency, *, prediction: np.ndarray, target: np.ndarray, points: list[np.ndarray]) -> None:
        self.prediction, self.target = torch.from_numpy(prediction), torch.from_numpy(target)
        self.points, self.valid = pad_fixations(points)
        self.negatives, self.negatives_valid = shuffled_negatives(self.points, self.valid)
        rng = np.random.default_rng(9)
        size = (*prediction.shape[1:], 3)
        self.stimuli = pysaliency.Stimuli([rng.integers(0, 255, size, dtype=np.uint8) for _ in prediction])
        self.fixations = as_fixations(pysaliency, points)
        self.model = self.as_model(pysaliency, prediction)

    def as_model(self, pysaliency, maps: np.ndarray):
        return stored_model(pysaliency, self.stimuli, maps)


@pytest.fixture(scope="module", params=["random", "ties", "osie"])
def case(request, pysaliency) -> Case:
    rng = np.random.default_rng(5)
    if request.param == "osie":
        gaze = [np.concatenate(image) / 4 for image in request.getfixturevalue("osie")[:4]]
        maps = np.stack([fixation_density(p, size=(150, 200), sigma=6, grid=(150, 200)) for p in gaze]).astype(float)
        return Case(pysaliency, prediction=np.roll(maps, 1, axis=0), target=maps, points=gaze)
    prediction = rng.random((4, *GRID))
    if request.param == "ties":
        prediction = np.floor(prediction * 6)
    points = [rng.uniform(0, 1, (n, 2)) * [GRID[1], GRID[0]] for n in (1, 7, 40, 300)]
    return Case(pysaliency, prediction=prediction, target=rng.random((4, *GRID)) ** 3, points=points)


def per_image(case: Case, values: np.ndarray) -> torch.Tensor:
    return torch.tensor([values[case.fixations.n == n].mean() for n in range(len(case.stimuli))])


def test_nss(case):
    expected = per_image(case, case.model.NSSs(case.stimuli, case.fixations))
    torch.testing.assert_close(metrics.nss(case.prediction, case.points, case.valid), expected, **TOLERANCE)


def test_nss_with_ddof_1(case):
    maps = case.prediction.numpy()
    z = [(m - m.mean()) / m.std(ddof=1) for m in maps]
    real = [points[valid].long().T for points, valid in zip(case.points, case.valid, strict=True)]
    expected = [each[y, x].mean() for each, (x, y) in zip(z, real, strict=True)]
    got = metrics.nss(case.prediction, case.points, case.valid, ddof=1)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), **TOLERANCE)


@pytest.mark.parametrize("name", ["kld", "cc", "sim"])
def test_map_metrics(case, pysaliency, name):
    reference: Callable[..., float] = getattr(pysaliency.metrics, {"kld": "MIT_KLDiv", "cc": "CC", "sim": "SIM"}[name])
    pairs = zip(case.prediction.numpy(), case.target.numpy(), strict=True)
    expected = torch.tensor([float(reference(p.copy(), q.copy())) for p, q in pairs], dtype=torch.float64)
    torch.testing.assert_close(getattr(metrics, name)(case.prediction, case.target), expected, **TOLERANCE)


def test_sim_with_minmax(case):
    scaled = [(m - m.min()) / (m.max() - m.min()) for m in (*case.prediction.numpy(), *case.target.numpy())]
    density = [m / m.sum() for m in scaled]
    expected = [np.minimum(p, q).sum() for p, q in zip(density[:4], density[4:], strict=True)]
    got = metrics.sim(case.prediction, case.target, minmax=True)
    torch.testing.assert_close(got, torch.tensor(expected), **TOLERANCE)


def test_auc_judd(case):
    expected = case.model.AUC_per_image(case.stimuli, case.fixations, nonfixations="unfixated", thresholds="fixations")
    got = metrics.auc_judd(case.prediction, case.points, case.valid)
    torch.testing.assert_close(got, torch.tensor(expected), **TOLERANCE)


def test_auc_judd_of_a_binary_fixation_map(case):
    """`unique` counts pixels as the MATLAB reference does: the answer does not change when fixations are repeated."""
    once = metrics.auc_judd(case.prediction, case.points, case.valid, unique=True)
    twice = (torch.cat([case.points, case.points[:, :5]], dim=1), torch.cat([case.valid, case.valid[:, :5]], dim=1))
    torch.testing.assert_close(metrics.auc_judd(case.prediction, *twice, unique=True), once, **TOLERANCE)
    expected = []
    for saliency, points, valid in zip(case.prediction.numpy(), case.points, case.valid, strict=True):
        binary = np.zeros_like(saliency, dtype=bool)
        binary[points[valid][:, 1].long(), points[valid][:, 0].long()] = True
        thresholds = np.unique(saliency[binary])[::-1]
        hits = [(saliency[binary] >= t).mean() for t in thresholds]
        false_alarms = [(saliency[~binary] >= t).mean() for t in thresholds]
        expected.append(np.trapezoid([0, *hits, 1], [0, *false_alarms, 1]))
    torch.testing.assert_close(once, torch.tensor(expected, dtype=torch.float64), **TOLERANCE)


def test_auc_borji_expected_over_all_draws(case):
    expected = case.model.AUC_per_image(case.stimuli, case.fixations, nonfixations="uniform")
    exact = metrics.auc_borji(case.prediction, case.points, case.valid, num_splits=None)
    torch.testing.assert_close(exact, torch.tensor(expected), **TOLERANCE)
    sampled = metrics.auc_borji(case.prediction, case.points, case.valid, num_splits=2000)
    torch.testing.assert_close(sampled, exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("step", [None, 0.1])
def test_auc_borji_is_the_mean_over_splits(case, pysaliency, step):
    num_splits = 5
    options = {"num_splits": num_splits, "step": step, "generator": torch.Generator().manual_seed(4)}
    got = metrics.auc_borji(case.prediction, case.points, case.valid, **options)
    num_pixels, width = case.prediction[0].numel(), case.points.shape[1]
    draws = torch.randint(num_pixels, (4, num_splits * width), generator=torch.Generator().manual_seed(4))
    for i, saliency in enumerate(case.prediction.numpy()):
        real = case.valid[i].numpy()
        saliency = (saliency - saliency.min()) / (saliency.max() - saliency.min())
        x, y = case.points[i][case.valid[i]].long().numpy().T
        areas = []
        for split in draws[i].view(num_splits, width).numpy():
            positives, negatives = saliency[y, x], saliency.ravel()[split[real]]
            if step is None:
                areas.append(pysaliency.roc.general_roc(positives, negatives)[0])
                continue
            thresholds = np.arange(11)[::-1] * step
            rates = [[(values >= t).mean() for t in thresholds] for values in (positives, negatives)]
            areas.append(np.trapezoid([0, *rates[0], 1], [0, *rates[1], 1]))
        assert abs(np.mean(areas) - got[i].item()) < 1e-6


def test_auc_shuffled(case):
    expected = case.model.AUC_per_image(case.stimuli, case.fixations, nonfixations="shuffled")
    options = {"negatives": case.negatives, "negatives_valid": case.negatives_valid}
    got = metrics.auc_shuffled(case.prediction, case.points, case.valid, **options)
    torch.testing.assert_close(got, torch.tensor(expected), **TOLERANCE)


def test_information_gain(case, pysaliency):
    prediction, target = case.prediction + 1e-3, case.target + 1e-3
    own, base = (
        pysaliency.models.SaliencyMapNormalizingModel(case.as_model(pysaliency, maps.numpy()), minimum_value=0)
        for maps in (prediction, target)
    )
    expected = per_image(case, own.information_gains(case.stimuli, case.fixations, baseline_model=base))
    got = metrics.information_gain(prediction, target, case.points, case.valid)
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_one_baseline_serves_all_maps(case):
    single = metrics.information_gain(case.prediction + 1, case.target[0] + 1, case.points, case.valid)
    repeated = metrics.information_gain(
        case.prediction + 1, case.target[:1].expand(4, -1, -1) + 1, case.points, case.valid
    )
    torch.testing.assert_close(single, repeated)


def test_spearman(case):
    pairs = list(zip(case.prediction.numpy(), case.target.numpy(), strict=True))
    expected = [spearmanr(p.ravel(), q.ravel()).statistic for p, q in pairs]
    got = metrics.spearman(case.prediction, case.target)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), **TOLERANCE)


def test_emd_is_pots(case):
    ot = pytest.importorskip("ot")
    prediction, target = case.prediction[:2, :6, :5], case.target[:2, :6, :5]
    rows, columns = np.mgrid[0:6, 0:5]
    centres = np.stack([(rows.ravel() + 0.5) / 6, (columns.ravel() + 0.5) / 5], axis=1)
    ground = ot.dist(centres, centres, metric="euclidean")
    expected = []
    for p, q in zip(prediction.numpy(), target.numpy(), strict=True):
        p, q = (m.ravel() / m.sum() if m.sum() else np.full(m.size, 1 / m.size) for m in (p, q))
        expected.append(float(ot.emd2(p, q, ground)))
    got = metrics.emd(prediction, target)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), **TOLERANCE)


def test_emd_of_two_points_is_their_distance():
    pytest.importorskip("ot")
    maps = torch.zeros(2, 28, 28, dtype=torch.float64)
    maps[0, :2, :2], maps[1, 6:8, 8:10] = 1, 1
    distance = metrics.emd(maps, maps.flip(0))
    torch.testing.assert_close(distance, torch.full((2,), 5 / 14, dtype=torch.float64))
    torch.testing.assert_close(metrics.emd(maps, maps), torch.zeros(2, dtype=torch.float64), **TOLERANCE)


def test_emd_of_larger_maps_is_pots_on_their_averages():
    ot = pytest.importorskip("ot")
    maps = torch.rand(2, 1, 28, 42, dtype=torch.float64) ** 4
    small = maps.view(2, 14, 2, 14, 3).mean(dim=(2, 4)).numpy()
    rows, columns = np.mgrid[0:14, 0:14]
    centres = np.stack([(rows.ravel() + 0.5) / 14, (columns.ravel() + 0.5) / 14], axis=1)
    p, q = (each.ravel() / each.sum() for each in small)
    expected = float(ot.emd2(p, q, ot.dist(centres, centres, metric="euclidean")))
    assert metrics.emd(maps[0], maps[1]).item() == pytest.approx(expected, abs=1e-6)


def test_emd_without_pot_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[metrics\]'"):
        metrics.emd(torch.rand(1, 4, 4), torch.rand(1, 4, 4))


def test_evaluate_maps_gives_what_the_functions_give(case):
    given = {"negatives": case.negatives, "negatives_valid": case.negatives_valid, "baseline": case.target + 1e-3}
    got = metrics.evaluate_maps(case.prediction, target=case.target, fixations=case.points, valid=case.valid, **given)
    fixed = (case.points, case.valid)
    shuffled = {"negatives": case.negatives, "negatives_valid": case.negatives_valid}
    expected = {
        "kld": metrics.kld(case.prediction, case.target),
        "cc": metrics.cc(case.prediction, case.target),
        "sim": metrics.sim(case.prediction, case.target),
        "nss": metrics.nss(case.prediction, *fixed),
        "auc_judd": metrics.auc_judd(case.prediction, *fixed),
        "auc_borji": metrics.auc_borji(case.prediction, *fixed),
        "auc_shuffled": metrics.auc_shuffled(case.prediction, *fixed, **shuffled),
        "information_gain": metrics.information_gain(case.prediction, case.target + 1e-3, *fixed),
        "num_fixations": case.valid.sum(dim=1),
    }
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(got[name], values, msg=name)


def test_fixations_as_maps_score_as_points_do(case):
    counts = fixation_counts(case.points, case.valid, tuple(case.prediction.shape[1:]))
    given = {"negatives": case.negatives, "negatives_valid": case.negatives_valid, "baseline": case.target + 1e-3}
    points, valid = fixations_from_maps(counts)
    got = metrics.evaluate_maps(case.prediction, fixations=points, valid=valid, **given)
    expected = metrics.evaluate_maps(case.prediction, fixations=case.points, valid=case.valid, **given)
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(got[name], values, msg=name)


def test_evaluate_maps_names_its_variants():
    maps, points = torch.rand(2, 5, 5), torch.rand(2, 3, 2) * 5
    got = metrics.evaluate_maps(maps, target=maps, fixations=points, nss_ddof=1, sim_minmax=True)
    assert "nss_ddof1" in got and "sim_minmax" in got and "nss" not in got and "sim" not in got
    assert metrics.evaluate_maps(maps, target=maps).keys() == {"kld", "cc", "sim"}
    with pytest.raises(ValueError, match="target maps or fixations"):
        metrics.evaluate_maps(maps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_results_have_the_type_of_the_maps(dtype):
    maps, points = torch.rand(2, 6, 7).to(dtype), torch.rand(2, 9, 2) * 6
    options = {"fixations": points, "baseline": maps, "negatives": points[0]}
    got = metrics.evaluate_maps(maps, target=maps, **options) | {"spearman": metrics.spearman(maps, maps)}
    assert {values.dtype for name, values in got.items() if name != "num_fixations"} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }


CHANCE = {
    "nss": 0.0,
    "auc_judd": 0.5,
    "auc_borji": 0.5,
    "auc_shuffled": 0.5,
    "information_gain": 0.0,
    "cc": 0.0,
    "spearman": 0.0,
}


def everything(prediction: torch.Tensor, target: torch.Tensor, points: torch.Tensor, valid: torch.Tensor | None = None):
    others = torch.rand(len(prediction), 20, 2) * torch.tensor([prediction.shape[2], prediction.shape[1]])
    uniform = torch.ones_like(prediction)
    options = {"fixations": points, "valid": valid, "negatives": others, "baseline": uniform}
    results = metrics.evaluate_maps(prediction, target=target, **options)
    return results | {"spearman": metrics.spearman(prediction, target)}


@pytest.mark.parametrize("value", [0.0, 0.1, -2.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9)])
def test_a_constant_map_scores_chance(value, shape):
    points = torch.rand(2, 6, 2) * torch.tensor([shape[1], shape[0]])
    got = everything(torch.full((2, *shape), value), torch.rand(2, *shape), points)
    for name, chance in CHANCE.items():
        torch.testing.assert_close(got[name], torch.full((2,), chance), msg=f"{name} {got[name]}", atol=1e-6, rtol=0)
    assert (got["sim"] > 0.5).all() and torch.isfinite(got["kld"]).all()
    both = everything(torch.full((2, *shape), value), torch.full((2, *shape), 3.0), points)
    assert (both["cc"] == 0).all() and (both["spearman"] == 0).all()
    torch.testing.assert_close(both["sim"], torch.ones(2))
    torch.testing.assert_close(both["kld"], torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["no columns", "all padding", "all outside", "nan points"])
def test_no_fixation_scores_chance_and_is_told(kind):
    points, valid = torch.rand(2, 6, 2) * 5, torch.ones(2, 6, dtype=torch.bool)
    if kind == "no columns":
        points, valid = points[:, :0], valid[:, :0]
    elif kind == "all padding":
        valid[:] = False
    else:
        points[:] = torch.nan if kind == "nan points" else 99.0
    got = everything(torch.rand(2, 5, 5), torch.rand(2, 5, 5), points, valid)
    assert got["num_fixations"].tolist() == [0, 0]
    for name in ("nss", "auc_judd", "auc_borji", "auc_shuffled", "information_gain"):
        assert got[name].tolist() == [CHANCE[name]] * 2, name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_map_is_nan_and_spoils_no_other(value):
    prediction, target, points = torch.rand(3, 5, 6), torch.rand(3, 5, 6), torch.rand(3, 8, 2) * 5
    broken = prediction.clone()
    broken[1, 2, 3] = value
    torch.manual_seed(0)
    got = everything(broken, target, points)
    torch.manual_seed(0)
    clean = everything(prediction, target, points)
    for name in set(got) - {"num_fixations"}:
        assert got[name][1].isnan(), name
        assert torch.equal(got[name][::2], clean[name][::2]), name
    for name in ("kld", "cc", "sim"):
        assert getattr(metrics, name)(target, broken)[1].isnan(), name
    assert metrics.spearman(target, broken)[1].isnan()


def test_emd_of_degenerate_maps():
    pytest.importorskip("ot")
    maps = torch.rand(3, 6, 6)
    maps[0], maps[1, 2, 2] = 0, torch.nan
    got = metrics.emd(maps, torch.ones(3, 6, 6))
    assert got[0].abs() < 1e-6 and got[1].isnan() and got[2] > 0
    assert metrics.emd(torch.full((1, 1, 1), 5.0), torch.full((1, 1, 1), 2.0)) == 0


def test_every_pixel_fixated_leaves_nothing_to_tell_apart():
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    points = torch.stack([columns.flatten(), rows.flatten()], dim=1)[None]
    assert metrics.auc_judd(torch.rand(1, 3, 4), points) == 0.5


def test_perfect_and_inverted_maps():
    maps = torch.zeros(1, 10, 10)
    maps[0, 3, 4] = 1
    points = torch.tensor([[[4.2, 3.7]]])
    assert metrics.auc_judd(maps, points) == 1
    assert metrics.auc_borji(maps, points) > 0.99 and metrics.auc_borji(-maps, points) < 0.01
    torch.testing.assert_close(metrics.nss(maps, points), torch.tensor([99**0.5]), atol=1e-4, rtol=0)


def test_maps_of_different_shapes_are_refused():
    for name in ("kld", "cc", "sim", "spearman", "emd"):
        with pytest.raises(ValueError, match="one shape"):
            getattr(metrics, name)(torch.rand(1, 4, 4), torch.rand(1, 5, 4))


def test_scores_do_not_depend_on_the_batch():
    maps, target, points = torch.rand(21, 8, 9), torch.rand(21, 8, 9), torch.rand(21, 12, 2) * 8
    valid = torch.rand(21, 12) < 0.7
    shared = {"baseline": torch.rand(8, 9), "negatives": torch.rand(30, 2) * 8}
    together = metrics.evaluate_maps(maps, target=target, fixations=points, valid=valid, **shared)
    for i in range(21):
        row = slice(i, i + 1)
        alone = metrics.evaluate_maps(maps[row], target=target[row], fixations=points[row], valid=valid[row], **shared)
        for name, values in alone.items():
            torch.testing.assert_close(together[name][row], values, msg=name)


def test_an_empty_batch_has_empty_results():
    got = metrics.evaluate_maps(torch.rand(0, 4, 5), target=torch.rand(0, 4, 5), fixations=torch.rand(0, 3, 2))
    assert all(values.shape == (0,) for values in got.values())


def by_torch(name: str, *maps: torch.Tensor, **options) -> torch.Tensor:
    """The same metric in float64 and as torch operators over the whole batch, as for a gradient."""
    doubled = [each.double().requires_grad_() for each in maps]
    return getattr(metrics, name)(*doubled, **options).detach()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(1, 3), (64, 128), (64, 129), (300, 400)])
def test_sums_over_many_blocks_are_the_whole(threads, size):
    torch.set_num_threads(threads)
    maps, target = torch.rand(2, *size, dtype=torch.float64) - 0.1, torch.rand(2, *size, dtype=torch.float64)
    for name in ("kld", "cc", "sim"):
        blocks = getattr(metrics, name)(maps, target)
        torch.testing.assert_close(blocks, by_torch(name, maps, target), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["offset", "negative", "tiny", "huge", "zeros", "sharp"])
def test_float32_maps_of_any_range_keep_their_digits(kind):
    maps, target = torch.rand(2, 150, 200), torch.rand(2, 150, 200)
    points = torch.rand(2, 30, 2) * 150
    if kind == "offset":
        maps, target = 100 + 0.01 * maps, 1000 + target
    elif kind == "negative":
        maps, target = maps - 50, target - 0.5
    elif kind in ("tiny", "huge"):
        factor = 1e-25 if kind == "tiny" else 1e25
        maps, target = maps * factor, target / factor
    elif kind == "zeros":
        maps, target = maps * (maps > 0.9), target * (target > 0.9)
    else:
        maps, target = maps**30, target**40
    for name in ("kld", "cc", "sim"):
        got = getattr(metrics, name)(maps, target).double()
        torch.testing.assert_close(got, by_torch(name, maps, target), atol=2e-6, rtol=1e-6, msg=f"{name} {got}")
    got = metrics.sim(maps, target, minmax=True).double()
    torch.testing.assert_close(got, by_torch("sim", maps, target, minmax=True), atol=2e-6, rtol=0)
    got = metrics.nss(maps, points).double()
    torch.testing.assert_close(got, metrics.nss(maps.double(), points), atol=2e-6, rtol=0)
    got = metrics.auc_judd(maps, points).double()
    torch.testing.assert_close(got, metrics.auc_judd(maps.double(), points), atol=1e-6, rtol=0)


def test_full_size_float32_maps_of_osie(pysaliency, osie):
    """As the field measures: 800x600 maps in float32; every metric of `evaluate_maps` against pysaliency."""
    gaze = [np.concatenate(image) for image in osie[:3]]
    human = np.stack([fixation_density(points, size=(600, 800), sigma=24, grid=(600, 800)) for points in gaze])
    human = (human + 1e-9).astype(np.float32)
    case = Case(pysaliency, prediction=np.roll(human, 1, axis=0) ** np.float32(0.5), target=human, points=gaze)
    got = metrics.evaluate_maps(
        case.prediction, target=case.target, fixations=case.points, valid=case.valid,
        negatives=case.negatives, negatives_valid=case.negatives_valid, baseline=case.target[0],
    )  # fmt: skip
    model, stimuli, fixations = case.model, case.stimuli, case.fixations
    pairs = list(zip(case.prediction.double().numpy(), case.target.double().numpy(), strict=True))
    judd = {"nonfixations": "unfixated", "thresholds": "fixations"}
    normal = pysaliency.models.SaliencyMapNormalizingModel
    base = normal(case.as_model(pysaliency, np.repeat(human[:1], 3, axis=0).astype(float)), minimum_value=0)
    own = normal(case.as_model(pysaliency, case.prediction.double().numpy()), minimum_value=0)
    expected = {
        "nss": per_image(case, model.NSSs(stimuli, fixations)),
        "kld": [float(pysaliency.metrics.MIT_KLDiv(p, q)) for p, q in pairs],
        "cc": [float(pysaliency.metrics.CC(p, q)) for p, q in pairs],
        "sim": [float(pysaliency.metrics.SIM(p, q)) for p, q in pairs],
        "auc_judd": model.AUC_per_image(stimuli, fixations, **judd),
        "auc_borji": model.AUC_per_image(stimuli, fixations, nonfixations="uniform"),
        "auc_shuffled": model.AUC_per_image(stimuli, fixations, nonfixations="shuffled"),
        "information_gain": per_image(case, own.information_gains(stimuli, fixations, baseline_model=base)),
    }
    for name, values in expected.items():
        values = torch.as_tensor(np.array(values), dtype=torch.float64)
        torch.testing.assert_close(got[name].double(), values, msg=f"{name} {got[name]} {values}", **TOLERANCE)


@pytest.mark.parametrize("name", ["kld", "cc", "sim", "nss", "information_gain"])
def test_metrics_can_be_differentiated(name):
    maps = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    target, points = torch.rand(2, 4, 5, dtype=torch.float64), torch.rand(2, 6, 2) * 4
    arguments = {"nss": (points,), "information_gain": (target, points)}.get(name, (target,))
    assert torch.autograd.gradcheck(lambda x: getattr(metrics, name)(x, *arguments), maps)


def test_threads_share_the_maps_and_change_nothing() -> None:
    """Every map is looked at by one thread with working arrays of its own: the same bits on one thread and on three."""
    generator = torch.Generator().manual_seed(0)
    maps, human = (torch.rand((7, 90, 120), generator=generator) for _ in range(2))
    fixations = torch.rand((7, 30, 2), generator=generator) * torch.tensor([119.0, 89.0])
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            given = {"target": human, "fixations": fixations, "negatives": fixations.flatten(0, 1)}
            found.append(metrics.evaluate_maps(maps, **given))
    finally:
        torch.set_num_threads(before)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
