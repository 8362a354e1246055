"""Baselines: hand-made gaze with known answers, and OSIE's published figures."""

import numpy as np
import pytest
import torch

from attention.baselines import ROWS, MapShape, human_baselines, leave_image_out, uniform
from attention.fixations import pad_fixations
from attention.metrics import auc_borji, cc, evaluate_maps, kld, nss, sim

SHAPE = MapShape(size=(60, 80), sigma=4.0, grid=(15, 20))


def made_up_gaze(num_images: int = 4, num_observers: int = 5) -> list[list[np.ndarray]]:
    """All observers of an image look near one spot, another in every image."""
    rng = np.random.default_rng(0)
    spots = rng.uniform([20, 15], [60, 45], size=(num_images, 2))
    return [[spot + rng.normal(0, 3, (6, 2)) for _ in range(num_observers)] for spot in spots]


def test_leave_image_out_is_the_mean_of_the_others():
    densities = torch.rand(4, 3, 5)
    densities /= densities.sum(dim=(1, 2), keepdim=True)
    expected = torch.stack([densities[[j for j in range(4) if j != i]].mean(dim=0) for i in range(4)])
    torch.testing.assert_close(leave_image_out(densities), expected)


def test_leave_image_out_needs_another_image():
    with pytest.raises(ValueError, match="at least 2 images"):
        leave_image_out(torch.rand(1, 3, 5))


def test_every_row_has_every_metric():
    table = human_baselines(made_up_gaze(), shape=SHAPE)
    assert tuple(table) == ROWS
    for row in table.values():
        assert row.keys() == table["uniform"].keys()
        assert all(values.shape == (4,) and torch.isfinite(values).all() for values in row.values())


def test_humans_beat_the_centre_which_beats_nothing():
    table = human_baselines(made_up_gaze(), shape=SHAPE)
    score = {row: {name: values.mean().item() for name, values in metrics.items()} for row, metrics in table.items()}
    assert score["uniform"]["nss"] == 0 and score["uniform"]["auc_judd"] == pytest.approx(0.5)
    assert score["uniform"]["nss"] < score["centre_bias"]["nss"] < score["one_human"]["nss"]
    assert score["one_human"]["information_gain"] > 0.5 and score["centre_bias"]["information_gain"] == pytest.approx(0)
    assert score["split_half"]["cc"] > score["one_human"]["cc"] > score["centre_bias"]["cc"]
    assert score["one_human"]["num_fixations"] == pytest.approx(6)


def test_one_human_is_the_map_of_the_others_against_each():
    gaze = made_up_gaze(2, 3)
    table = human_baselines(gaze, shape=SHAPE)
    scores = []
    for observer in range(3):
        rest = np.concatenate([gaze[0][other] for other in range(3) if other != observer])
        points, valid = SHAPE.pad([gaze[0][observer]])
        target = SHAPE.density(gaze[0][observer])[None]
        scores.append(evaluate_maps(SHAPE.density(rest)[None], target=target, fixations=points, valid=valid))
    for name in ("nss", "cc", "kld", "sim", "auc_judd"):
        expected = torch.cat([each[name] for each in scores]).double().mean()
        torch.testing.assert_close(table["one_human"][name][0], expected, atol=1e-4, rtol=0)


def test_a_subset_can_be_scored_and_repeats():
    gaze = made_up_gaze()
    first, again = (human_baselines(gaze, shape=SHAPE, evaluated=[2, 0], seed=3) for _ in range(2))
    everything = human_baselines(gaze, shape=SHAPE)
    assert first["centre_bias"]["nss"].tolist() == everything["centre_bias"]["nss"][[2, 0]].tolist()
    for row in ROWS:
        assert torch.equal(first[row]["auc_shuffled"], again[row]["auc_shuffled"])


def test_observers_without_a_fixation_are_left_out():
    gaze = made_up_gaze()
    outside = np.array([[500.0, 500.0], [np.nan, 2.0]])
    padded = [[*observers, np.zeros((0, 2)), outside] for observers in gaze]
    for row in ("uniform", "centre_bias", "one_human"):
        expected, got = (human_baselines(each, shape=SHAPE)[row]["nss"] for each in (gaze, padded))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_an_image_that_one_human_saw_has_no_human_rows():
    gaze = made_up_gaze()
    gaze[1] = gaze[1][:1]
    gaze[2] = [np.zeros((0, 2))]
    table = human_baselines(gaze, shape=SHAPE)
    for row in ("one_human", "split_half"):
        assert table[row]["nss"].isnan().tolist() == [False, True, True, False]
    assert table["centre_bias"]["nss"][1].isfinite() and table["centre_bias"]["num_fixations"][2] == 0


def test_osie_centre_bias(osie):
    """Facts: NSS 0.880, AUC 0.742, CC 0.312, SIM 0.373, KLD 1.308 over all 700 images."""
    shape = MapShape(size=(600, 800), sigma=24, grid=(150, 200))
    together = [np.concatenate(observers) for observers in osie]
    human = torch.stack([shape.density(points) for points in together])
    points, valid = pad_fixations(together, size=shape.size, grid=shape.grid)
    center = leave_image_out(human)
    got = {
        "nss": nss(center, points, valid), "auc": auc_borji(center, points, valid, num_splits=None),
        "cc": cc(center, human), "sim": sim(center, human), "kld": kld(center, human),
    }  # fmt: skip
    expected = {"nss": 0.880, "auc": 0.742, "cc": 0.312, "sim": 0.373, "kld": 1.308}
    means = {name: values.double().mean().item() for name, values in got.items()}
    assert means == pytest.approx(expected, abs=0.001)
    assert nss(uniform(shape.grid).expand_as(center), points, valid).abs().max() == 0


def test_osie_humans(osie):
    """Facts, here on every third image: one against the rest NSS 3.676, AUC 0.933; halves CC 0.878, NSS 3.558."""
    shape = MapShape(size=(600, 800), sigma=24, grid=(150, 200))
    table = human_baselines(osie, shape=shape, evaluated=range(0, 700, 3))
    one, half = ({name: x.mean().item() for name, x in table[row].items()} for row in ("one_human", "split_half"))
    assert one["nss"] == pytest.approx(3.676, abs=0.02)
    assert one["auc_borji"] == pytest.approx(0.933, abs=0.003)
    assert half["nss"] == pytest.approx(3.558, abs=0.08)
    assert half["cc"] == pytest.approx(0.878, abs=0.008)
