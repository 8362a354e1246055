"""Alignment with gaze: the rows agree with the rooms that define them, and Grad-CAM with its closed form."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

from attention.baselines import ROWS, leave_image_out
from attention.maps import fixation_density, to_density
from attention.metrics import cc, emd, spearman
from engine.errors import InputError
from pretrain.config import AttentionConfig
from pretrain.data import find_label_set
from pretrain.evaluators.alignment import alignment, gaze_set
from pretrain.evaluators.attention_maps import feature_norm, grad_cam
from pretrain.evaluators.base import Result, Subject
from pretrain.evaluators.gaze_rows import GazeRows, means
from pretrain.evaluators.linear_probe import LinearHead
from pretrain.evaluators.offline import probe_run
from pretrain.evaluators.robust_gaze import robust_gaze
from pretrain.evaluators.sources import ShardImages, train_images
from pretrain.probe_config import CorruptionConfig, GazeConfig, ProbeConfig
from shards.gaze import GazeTarget, centre_bias_scores, score_densities
from shards.manifest import read_manifest
from tests.attention.reference import as_fixations, import_pysaliency, stored_model
from tests.conftest import TinySample

Open = Callable[..., tuple[Subject, ProbeConfig]]


def test_rows_agree_with_the_rooms_that_define_them(open_tiny: Open) -> None:
    subject, probe = open_tiny(gaze_options=GazeConfig(stride=2))
    result = alignment(subject, probe)
    _, targets = gaze_set(probe)
    expected = score_densities(targets, [result.maps[target.key] for target in targets], stride=2)
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value, abs=1e-5), name
    centre = centre_bias_scores(targets, stride=2)
    for name in ("nss", "kld", "cc", "sim", "auc_judd"):
        assert result.metrics[f"centre_bias/{name}"] == pytest.approx(centre[name], abs=1e-5), name
    rows = {name.split("/")[0] for name in result.metrics if "/" in name}
    assert rows == {"feature_norm", "grad_cam", "uniform", "centre_bias", "one_human", "split_half"}
    for name in ("auc_borji", "auc_shuffled", "information_gain", "spearman", "emd"):
        assert np.isfinite(result.metrics[name]) and f"grad_cam/{name}" in result.metrics
    grid = targets[0].grid(2)
    human = torch.stack([torch.from_numpy(target.density(grid)) for target in targets])
    maps = torch.stack([torch.from_numpy(on_grid(result.maps[target.key], grid)) for target in targets]).float()
    flat, others = torch.full_like(human, 1 / human[0].numel()), leave_image_out(human)
    for row, each in {"": maps, "uniform/": flat, "centre_bias/": others}.items():
        assert result.metrics[f"{row}emd"] == pytest.approx(emd(each, human).mean().item(), abs=1e-5), row
        assert result.metrics[f"{row}spearman"] == pytest.approx(spearman(each, human).mean().item(), abs=1e-5), row
    assert result.protocol["grad_cam_learning_rate"] == 0.1 and result.protocol["train"]["samples"] == 72
    assert 0 < result.metrics["split_half/emd"] < result.metrics["uniform/emd"]
    assert result.metrics["centre_bias/information_gain"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["uniform/nss"] == 0
    assert len(result.tables["by_image"]["nss"]) == len(targets) == result.metrics["num_images"]


def test_the_numbers_are_pysaliencys(open_tiny: Open) -> None:
    """Of the maps and fixations alone: NSS, AUC-Judd, CC, KLD, SIM and information gain over the centre bias."""
    try:
        pysaliency = import_pysaliency()
    except ImportError as error:
        pytest.skip(f"pysaliency is not installed: {error}")
    subject, probe = open_tiny(gaze_options=GazeConfig(stride=2, rows=[]))
    result = alignment(subject, probe)
    _, targets = gaze_set(probe)
    grid = targets[0].grid(2)
    assert all(target.size == targets[0].size for target in targets) and len(targets) > 2
    maps = [on_grid(result.maps[target.key], grid) for target in targets]
    human = np.stack([target.density(grid).astype(np.float64) for target in targets])
    centre = (human.sum(0) - human) / (len(human) - 1)
    height, width = targets[0].size
    inside = [t.points[((t.points >= 0) & (t.points < (width, height))).all(1)] for t in targets]
    fixations = as_fixations(pysaliency, [points * (grid[1] / width, grid[0] / height) for points in inside])
    stimuli = pysaliency.Stimuli([np.full((*grid, 3), number, dtype=np.uint8) for number in range(len(maps))])
    model = stored_model(pysaliency, stimuli, maps)
    densities, base = (
        pysaliency.models.SaliencyMapNormalizingModel(stored_model(pysaliency, stimuli, each), minimum_value=0)
        for each in (maps, list(centre))
    )

    def mean(values: np.ndarray) -> float:
        return float(np.mean([values[fixations.n == number].mean() for number in range(len(maps))]))

    expected = {
        "nss": mean(model.NSSs(stimuli, fixations)),
        "information_gain": mean(densities.information_gains(stimuli, fixations, baseline_model=base)),
        "auc_judd": np.mean(model.AUC_per_image(stimuli, fixations, nonfixations="unfixated", thresholds="fixations")),
    }
    for name, reference in (("kld", "MIT_KLDiv"), ("cc", "CC"), ("sim", "SIM")):
        function = getattr(pysaliency.metrics, reference)
        expected[name] = np.mean([function(p.copy(), q.copy()) for p, q in zip(maps, human, strict=True)])
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(float(value), abs=2e-5), name


def on_grid(density: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A coarse map on a finer grid, bilinear with half-pixel centres, as float64."""
    fine = torch.nn.functional.interpolate(
        torch.from_numpy(density)[None, None].double(), size=grid, mode="bilinear", align_corners=False
    )[0, 0]
    assert density.shape[0] <= grid[0] and density.shape[1] <= grid[1]
    return fine.numpy()


def test_humans_scored_as_a_model_equal_the_human_map(open_tiny: Open) -> None:
    _, probe = open_tiny()
    _, targets = gaze_set(probe)
    rows = GazeRows(targets, stride=4, negatives=100, seed=0)
    scores = rows.score_each([target.density(target.grid(4)) for target in targets])
    assert scores["kld"] == pytest.approx(0, abs=1e-5) and scores["cc"] == pytest.approx(1, abs=1e-5)
    assert (scores["information_gain"] > 0).all() and scores["emd"] == pytest.approx(0, abs=1e-5)


def test_the_slow_metrics_compare_the_same_maps(open_tiny: Open) -> None:
    """CC, computed as the slow metrics are, is that of the room that draws the halves and takes the observers apart."""
    _, probe = open_tiny()
    _, targets = gaze_set(probe)
    rows = GazeRows(targets, stride=4, negatives=100, seed=3)
    rows.slow = {"slow_cc": cc}
    found = rows.baselines(None, digest="")
    assert found["split_half"]["cc"] < 1
    for row in ROWS:
        assert found[row]["slow_cc"] == pytest.approx(found[row]["cc"], abs=1e-6), row


def test_one_humans_rank_correlation_and_earth_movers_distance_are_scipys_and_pots() -> None:
    """The others' map against each observer's, means over observers and then over images; where there are both."""
    ot = pytest.importorskip("ot")
    rng, size, grid = np.random.default_rng(0), (48, 64), (6, 8)
    gaze = [[rng.uniform(4, 44, (4, 2)) for _ in range(count)] for count in (3, 2, 1, 4)]
    gaze[3][1] += 100  # outside the image
    targets = [
        GazeTarget(f"{i}", size, np.concatenate(each), np.repeat(range(len(each)), 4), 6.0, shard=0, row=i)
        for i, each in enumerate(gaze)
    ]
    found = GazeRows(targets, stride=8, negatives=10, seed=0).baselines(None, digest="")["one_human"]
    cells = np.stack(np.meshgrid((np.arange(6) + 0.5) / 6, (np.arange(8) + 0.5) / 8, indexing="ij"), -1).reshape(-1, 2)
    ground, ranks, distances = cdist(cells, cells), [], []
    for observers in (gaze[0], gaze[1], [gaze[3][i] for i in (0, 2, 3)]):
        maps = [
            [fixation_density(np.concatenate(points), size=size, sigma=6.0, grid=grid).ravel() for points in pair]
            for pair in ((observers[:i] + observers[i + 1 :], [observers[i]]) for i in range(len(observers)))
        ]
        ranks.append(np.mean([spearmanr(*pair).statistic for pair in maps]))
        normalised = [[each.astype(float) / each.sum(dtype=float) for each in pair] for pair in maps]
        distances.append(np.mean([ot.emd2(*pair, ground) for pair in normalised]))
    assert found["spearman"] == pytest.approx(np.mean(ranks), abs=1e-6)
    assert found["emd"] == pytest.approx(np.mean(distances), abs=1e-6)


def test_unreadable_images_are_no_uniform_maps(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the images damaged: the means are those of the others, and the loss is told."""
    subject, probe = open_tiny(gaze_options=GazeConfig(rows=["feature_norm", "baselines"], negatives=100))
    lines: list[str] = []
    subject = dataclasses.replace(subject, report=lines.append, cache=None)
    whole = alignment(subject, probe)
    read, broken = ShardImages.read, set(range(0, 20, 2))

    def damaged(self: ShardImages, number: int) -> tuple[np.ndarray, int]:
        if number in broken:
            raise ValueError("damaged")
        return read(self, number)

    monkeypatch.setattr(ShardImages, "read", damaged)
    _, targets = gaze_set(probe)
    assert len(targets) == 20
    kept = targets[1::2]
    result = alignment(subject, probe)
    assert (result.metrics["num_images"], result.metrics["num_skipped"]) == (10, 10)
    assert any("10 of 20 images" in line and "unreadable" in line for line in lines)
    rows = GazeRows(kept, stride=4, negatives=100, seed=0)
    expected = means(rows.score_each([whole.maps[target.key] for target in kept]))
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert result.metrics["uniform/kld"] == rows.baselines(None, digest="")["uniform"]["kld"]
    assert list(result.maps) == [target.key for target in kept] and len(result.tables["by_image"]["nss"]) == 10
    assert result.protocol["gaze"]["scored"] == 10 and "feature_norm/nss" in result.metrics
    broken.update(range(20))
    with pytest.raises(InputError, match="none of the 20 images with gaze can be read"):
        alignment(subject, probe)


def test_without_pot_emd_is_left_out_with_a_reason(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, probe = open_tiny(gaze_options=GazeConfig(rows=[]))
    assert "POT" in alignment(subject, probe).protocol["emd"]
    monkeypatch.setattr("pretrain.evaluators.gaze_rows.find_spec", lambda name: None)
    result = alignment(subject, probe)
    assert "emd" not in result.metrics and "spearman" in result.metrics
    assert result.protocol["emd"] == "left out: POT is not installed"


def test_grad_cam_is_the_class_activation_map(open_tiny: Open) -> None:
    """Behind a global average and a linear classifier: relu(sum_k w_k A_k), up to its scale (Selvaraju et al.)."""
    subject, _ = open_tiny()
    width = subject.backbone.num_features
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(width + 1, 3, generator=generator)
    head = LinearHead(torch.zeros(width), torch.full((width,), 2.0), weights, 0.1)
    images = torch.randn(4, 3, 96, 96, generator=generator)
    with torch.no_grad():
        maps = subject.backbone.forward_features(images)
        chosen = head.scores(subject.backbone.forward_head(maps, pre_logits=True)).argmax(1)
    expected = to_density(torch.relu(torch.einsum("bkhw,kb->bhw", maps, weights[:-1][:, chosen])))
    found = grad_cam(subject, head)(images)
    assert found.shape[1] > 1 and torch.allclose(found, expected, atol=1e-6)
    norms = feature_norm(subject)(images)
    assert torch.allclose(norms, to_density(maps.norm(dim=1)), atol=1e-6)


def test_a_student_without_heads_gets_a_read_out(open_tiny: Open) -> None:
    """Trained on the frozen encoder for as many steps as asked, the same every time."""
    options = GazeConfig(readout_steps=3, rows=[])
    subject, probe = open_tiny(gaze_options=options)
    bare = dataclasses.replace(subject, heads={}, cache=None)
    before = {name: value.clone() for name, value in subject.backbone.state_dict().items()}
    first, second = alignment(bare, probe), alignment(bare, probe)
    assert first.metrics == second.metrics and "3 steps" in first.protocol["map"]
    assert all(torch.equal(value, before[name]) for name, value in subject.backbone.state_dict().items())
    config = dataclasses.replace(bare.config, data=dataclasses.replace(bare.config.data, labels=None))
    with pytest.raises(InputError, match="--labels"):
        alignment(dataclasses.replace(bare, config=config), probe)


@pytest.mark.parametrize("evaluate", [alignment, robust_gaze])
def test_protocols_tell_how_a_read_out_was_trained(
    open_tiny: Open, tiny_sample: TinySample, evaluate: Callable[[Subject, ProbeConfig], Result]
) -> None:
    if evaluate is robust_gaze:
        pytest.importorskip("imagecorruptions")
    options = GazeConfig(readout_steps=1, readout_lr=0.02, rows=[])
    subject, probe = open_tiny(
        gaze_options=options, corruptions=CorruptionConfig(names=["contrast"], severities=[1]), max_val=10
    )
    protocol = evaluate(dataclasses.replace(subject, heads={}), probe).protocol
    assert (protocol["readout_steps"], protocol["readout_learning_rate"]) == (1, 0.02)
    assert protocol["readout_labels"] == read_manifest(find_label_set(tiny_sample.labels), kind="labels").digest
    assert protocol["readout_images"] == train_images(probe).digest
    assert not any(name.startswith("readout") for name in evaluate(subject, probe).protocol)


def test_a_missing_stage_is_named(open_tiny: Open) -> None:
    subject, probe = open_tiny()
    config = dataclasses.replace(subject.config, attention=AttentionConfig(stages=[7]))
    with pytest.raises(InputError, match=r"stages \[7\]"):
        alignment(dataclasses.replace(subject, config=config), probe)


def test_without_classes_grad_cam_is_left_out_with_a_reason(open_tiny: Open) -> None:
    subject, probe = open_tiny(gaze_options=GazeConfig(rows=["grad_cam"]))
    result = alignment(subject, dataclasses.replace(probe, train=probe.gaze))
    assert not any(name.startswith("grad_cam") for name in result.metrics)
    assert "left out" in result.protocol["grad_cam"]


def test_baselines_are_computed_once_per_set(
    probe: Callable[..., ProbeConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = probe(evaluators="alignment", gaze_options=GazeConfig(rows=["baselines"]))
    probe_run(config)
    first = (tmp_path / "out" / "summary.json").read_text()
    monkeypatch.setattr("pretrain.evaluators.gaze_rows.human_baselines", None)  # may not be called again
    probe_run(config)
    assert (tmp_path / "out" / "summary.json").read_text() == first
    maps = load_file(tmp_path / "out" / "probe" / "alignment.safetensors")
    assert all(each.sum() == pytest.approx(1, abs=1e-4) for each in maps.values())
