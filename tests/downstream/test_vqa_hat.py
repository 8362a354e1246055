"""A run of question answering from files to human attention, and the comparison's arithmetic."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import ot
import pytest
import torch
from scipy.stats import spearmanr

from downstream.config import DataConfig, DownstreamConfig, ImageConfig, VqaConfig
from downstream.hat_config import HatConfig
from downstream.human_attention import compare, evaluate_run, human_files, read_human_map, read_stage_config
from downstream.pipeline import run_pipeline
from downstream.protocol import Attended, AttentionModel, Inputs
from downstream.stage import best_weights, stage_folder
from downstream.tasks.questions import QuestionExamples
from downstream.tasks.registry import open_task
from engine.errors import InputError
from engine.runs import RunFolder
from engine.settings import LoopConfig, OptimConfig
from tests.downstream.vqa_files import write_human_maps, write_vqa


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DownstreamConfig:
    """A finished table of three arms over both modalities."""
    root = tmp_path_factory.mktemp("vqa")
    config = DownstreamConfig(
        run="v",
        runs=root / "runs",
        task="vqa",
        arm="baseline,mse,adversarial",
        epochs=10,
        retrain_epochs=3,
        data=DataConfig(path=write_vqa(root / "data", train=60, test=12), batch_size=9),
        image=ImageConfig(size=32, channels=16, num_masks=10, mask_scale=2),
        vqa=VqaConfig(embedding=16, lstm=16, width=16, hidden=32, dropout=0.0, num_answers=6),
        optim=OptimConfig(name="adamw", lr=0.01, lr_scaling="none", warmup_epochs=0),
        loop=LoopConfig(num_workers=0, tracker="none", log_every=5),
    )
    run_pipeline(config)
    return config


def test_the_pipeline_learns_with_both_modalities(config: DownstreamConfig) -> None:
    metrics = {a: summary_of(config, a)["metrics"] for a in ("baseline", "mse", "adversarial")}
    assert metrics["baseline"]["test/accuracy"] > 60, "colours are easy"
    for arm in ("mse", "adversarial"):
        assert metrics[arm]["weight/image"] > 0 and metrics[arm]["weight/text"] > 0
    page = (config.runs / "v" / "report" / "index.html").read_text()
    assert "Words, shaded by attention" in page and "Where the network looks" in page


def summary_of(config: DownstreamConfig, arm: str) -> dict[str, dict[str, float]]:
    return json.loads((stage_folder(config, arm=arm, seed=0).path / "summary.json").read_text())


def test_a_finished_run_is_compared_with_people(config: DownstreamConfig, tmp_path: Path) -> None:
    maps = write_human_maps(tmp_path / "maps", [9000, 9001, 9030, 5])
    write_human_maps(maps, [9040], people=1, size=(14, 14))
    (maps / "9030_1.png").write_bytes(b"damaged")
    cv2.imwrite(str(maps / "9001_1.png"), np.full((20, 30), 7, dtype=np.uint8))
    cv2.imwrite(str(maps / "notes.png"), np.zeros((2, 2), dtype=np.uint8))
    run = stage_folder(config, arm="mse", seed=0)
    found = evaluate_run(HatConfig(run=run.path, maps=maps))
    assert found.num_questions == 4 and found.num_maps == 2 + 1 + 1 + 1
    assert found.skipped == {
        "of no test question": 2,
        "odd file name": 1,
        "unreadable map": 1,
        "constant map": 1,
    }
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["metrics"]["hat/rank_correlation"] == pytest.approx(found.correlation)
    assert summary["metrics"]["hat/emd"] == pytest.approx(found.distance) and summary["hat"]["grid"] == 14
    assert "test/accuracy" in summary["metrics"], "what the run had measured is still there"
    expected = by_hand(config, run, maps, {9000: (1, 2), 9001: (2,), 9030: (2,), 9040: (1,)})
    assert (found.correlation, found.distance) == pytest.approx(expected, abs=1e-4)


def by_hand(config: DownstreamConfig, run: RunFolder, maps: Path, usable: dict[int, tuple[int, ...]]) -> list[float]:
    """The same means with scipy and POT."""
    task = open_task(config)
    model = task.build_model()
    model.load_state_dict(best_weights(run))
    centres = (np.stack(np.meshgrid(np.arange(14), np.arange(14), indexing="ij"), -1).reshape(-1, 2) + 0.5) / 14
    ground = ot.dist(centres, centres, metric="euclidean")
    scores = []
    for question, people in usable.items():
        row = list(task.test.keys).index(f"val2014/{question}")
        with torch.inference_mode():
            ours = model.eval()(task.test.inputs(np.array([row]))).maps["image"][:, None].double()
        ours = torch.nn.functional.interpolate(ours, size=(14, 14), mode="bilinear", antialias=True).flatten().numpy()
        own = []
        for person in people:
            theirs = read_human_map(maps / f"{question}_{person}.png", grid=14).double().flatten().numpy()
            pair = (ours / ours.sum(), theirs / theirs.sum())
            own.append((spearmanr(ours, theirs).statistic, ot.emd2(*pair, ground)))
        scores.append(np.mean(own, axis=0))
    return [float(value) for value in np.mean(scores, axis=0)]


def test_the_comparison_refuses_what_it_cannot_use(config: DownstreamConfig, tmp_path: Path) -> None:
    run = stage_folder(config, arm="baseline", seed=0).path
    with pytest.raises(InputError, match="is no folder"):
        evaluate_run(HatConfig(run=run, maps=tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no run in"):
        evaluate_run(HatConfig(run=tmp_path, maps=tmp_path))
    foreign = write_human_maps(tmp_path / "foreign", [5])
    with pytest.raises(InputError, match=r"has no .*of the run's test questions"):
        evaluate_run(HatConfig(run=run, maps=foreign))
    flat = tmp_path / "flat"
    flat.mkdir()
    cv2.imwrite(str(flat / "9000_1.png"), np.zeros((5, 5), dtype=np.uint8))
    with pytest.raises(InputError, match=r"none of the 1 human maps can be used: \{'constant map': 1\}"):
        evaluate_run(HatConfig(run=run, maps=flat))
    (tmp_path / "config.yaml").write_text("arm: contrastive\nmodel: {backbone: resnet18}\n")
    with pytest.raises(InputError, match="is no fine-tune's config"):
        read_stage_config(RunFolder(tmp_path))


class Fixed(AttentionModel):
    """Attention that is given, by row of its inputs."""

    def encode(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        return {"image": inputs["features"].float().permute(0, 2, 3, 1)}

    def attend(self, features: dict[str, torch.Tensor], inputs: Inputs) -> Attended:
        return Attended(torch.zeros(len(inputs["tokens"]), 2), {"image": features["image"][..., 0]})


def test_a_model_that_looks_where_people_look_agrees_fully(tmp_path: Path) -> None:
    write_human_maps(tmp_path, [1, 2], people=1, size=(14, 14))
    own = torch.stack([read_human_map(tmp_path / f"{q}_1.png", grid=14) for q in (1, 2)])
    files, skipped = human_files(tmp_path, {"1", "2"})
    assert compare_fixed(own, files) == pytest.approx((1.0, 0.0), abs=1e-5) and not skipped
    negative = own.amax((1, 2), keepdim=True) - own
    correlation, distance = compare_fixed(negative, files)
    assert correlation == pytest.approx(-1, abs=1e-5) and distance > 0.1


def compare_fixed(maps: torch.Tensor, files: dict[str, list[Path]]) -> tuple[float, float]:
    class Given:
        def __init__(self) -> None:
            self.places = {1: 0, 2: 1}

        def inputs(self, rows: np.ndarray) -> Inputs:
            return {"features": maps[torch.from_numpy(rows), None]}

    tokens, rows = torch.ones(2, 1, dtype=torch.int64), np.arange(2)
    examples = QuestionExamples(["val2014/1", "val2014/2"], [["a"], ["a"]], tokens, Given(), rows, torch.zeros(2))
    found = compare(Fixed(), examples, files)
    return found.correlation, found.distance


def test_a_map_of_any_size_keeps_its_place(tmp_path: Path) -> None:
    for height, width in ((300, 200), (14, 14), (5, 9)):
        spot = np.zeros((height, width), dtype=np.uint8)
        spot[: height // 2, width // 2 :] = 255
        cv2.imwrite(str(tmp_path / "1_1.png"), spot)
        density = read_human_map(tmp_path / "1_1.png", grid=14)
        assert density.shape == (14, 14) and float(density.sum()) == pytest.approx(1, abs=1e-5)
        assert float(density[:7, 7:].sum()) > 0.8, (height, width)


def test_one_modality_alone(config: DownstreamConfig) -> None:
    supervision = replace(config.supervision, modalities=["text"])
    results = run_pipeline(replace(config, run="text", arm="mse", epochs=1, retrain_epochs=2, supervision=supervision))
    assert "weight/text" in results["mse", 0] and "weight/image" not in results["mse", 0]
