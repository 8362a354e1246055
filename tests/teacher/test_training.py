"""Training as a program: what it writes, that it goes on where it stopped to the bit, and what it refuses."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file as numpy_load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from engine.errors import InputError, Requeue
from engine.files import sha256_of
from engine.program import parse_config
from engine.runs import RunFolder
from shards.pack import pack
from teacher.config import DEFAULT_CONFIG, Config
from teacher.data import GazeBatch
from teacher.report import GAP, WIDTH
from teacher.saved import load_teacher
from teacher.trainer import GazeObjective, check, train
from teacher.validation import Validation
from tests.teacher.conftest import SIZE, BlobSource, arguments_of, run_here, training_options
from tests.tools import REPOSITORY, accelerate, run_python

MAIN = REPOSITORY / "teacher" / "main.py"


def config_of(data: Path, runs: Path, **options: object) -> Config:
    arguments = arguments_of(training_options(data, runs, **options))
    config, _ = parse_config(Config, argv=arguments, default_config=DEFAULT_CONFIG)
    return config


def test_a_run_leaves_a_teacher_named_by_its_weights_and_a_summary(trained: Path) -> None:
    best = trained / "best"
    teacher = load_teacher(trained)
    assert teacher.hash == sha256_of(best / "model.safetensors")
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["teacher"]["hash"] == teacher.hash and summary["step"] == 3
    for name in ("nss", "kld", "cc", "sim", "auc_judd"):
        assert summary["metrics"][f"attention/{name}"] == teacher.facts["metrics"][name]
        assert f"centre_bias/{name}" in summary["metrics"]
    assert summary["metrics"]["attention/num_images"] == 9
    validated = [line for line in RunFolder(trained).metrics() if "val/kld" in line]
    assert len(validated) == 2 and min(line["val/kld"] for line in validated) == teacher.facts["metrics"]["kld"]
    assert teacher.facts["gaze"] == {"edition": "simulated", "sigma": 4.0}
    maps = numpy_load_file(trained / "maps.safetensors")
    assert len(maps) == 9 and all(m.sum() == pytest.approx(1, abs=1e-4) for m in maps.values())
    page = (trained / "report" / "index.html").read_text()
    # nine images in three pictures each, and two curves
    assert page.count("data:image/jpeg") == 27 and page.count("data:image/svg") == 2 and "one human" in page
    density = teacher.model(torch.zeros(1, 32, 48, 3, dtype=torch.uint8)).exp()
    assert density.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    options = {"ema": 0.9, "augment__min_area": 0.5, "augment__jitter": 0.2, "model__centre_prior": True}
    train(config_of(data, tmp_path, run="whole", **options))
    with pytest.raises(Requeue, match="after step 1 of 3"):
        train(config_of(data, tmp_path, run="parts", loop__stop_after=1, **options))
    # the rest in a process that has drawn no number before
    done = run_python(MAIN, *arguments_of(training_options(data, tmp_path, run="parts", **options)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, parts = ((tmp_path / name / "checkpoints" / "step-000000003" / "model.pt") for name in ("whole", "parts"))
    first, second = (torch.load(path, weights_only=True) for path in (whole, parts))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    trained = sum(1 for name in first if name.startswith("average.weights."))
    assert trained > 5 and int(first["average._extra_state"]) == 3
    digests = {sha256_of(tmp_path / name / "best" / "model.safetensors") for name in ("whole", "parts")}
    assert len(digests) == 1


def test_a_run_without_progress_stops_early_and_stays_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = dict.fromkeys(("nss", "kld", "cc", "sim", "auc_judd", "num_images", "num_skipped"), 1.0)
    monkeypatch.setattr(Validation, "score", lambda self, model: scores)
    config = config_of(data, tmp_path, max_steps=30, patience=2, validate_every=0.16)
    train(config)
    assert "stopped early" in capsys.readouterr().out
    assert json.loads((tmp_path / "tiny" / "summary.json").read_text())["step"] == 3
    assert load_teacher(tmp_path / "tiny").facts["step"] == 1, "the first of equals is kept"
    train(config)
    again = capsys.readouterr().out
    assert "resumed" in again and "step 04" not in again


@pytest.mark.parametrize(("metric", "step"), [("kld", 1), ("nss", 2), ("cc", 3)])
def test_the_best_by_the_chosen_metric_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, step: int
) -> None:
    found = iter([(1.0, 1.0, 0.1), (2.0, 3.0, 0.2), (3.0, 2.0, 0.3)])

    def score(self: Validation, model: object) -> dict[str, float]:
        kld, nss, cc = next(found)
        others = dict.fromkeys(("sim", "auc_judd", "num_images", "num_skipped"), 1.0)
        return {"kld": kld, "nss": nss, "cc": cc} | others

    monkeypatch.setattr(Validation, "score", score)
    train(config_of(data, tmp_path, best_by=metric, validate_every=0.16))
    assert load_teacher(tmp_path / "tiny").facts["step"] == step


def test_every_loss_of_the_config_is_learnt_from(data: Path, tmp_path: Path) -> None:
    weights = {"loss__kld": 0.5, "loss__nss": 0.2, "loss__cc": 0.3, "loss__mse": 0.01}
    run = train(config_of(data, tmp_path, max_steps=1, **weights))
    first = next(line for line in run.metrics() if "train/loss" in line)
    expected = 0.5 * first["train/kld"] - 0.2 * first["train/nss"] - 0.3 * first["train/cc"] + 0.01 * first["train/mse"]
    assert first["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_validations_without_a_number_leave_no_teacher(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = dict.fromkeys(("nss", "kld", "cc", "sim", "auc_judd"), float("nan")) | {"num_images": 9.0}
    monkeypatch.setattr(Validation, "score", lambda self, model: scores)
    with pytest.raises(FloatingPointError, match=r"gave a kld.*lower optim\.lr"):
        train(config_of(data, tmp_path))


def test_mixed_precision_computes_in_bf16_and_keeps_fp32(data: Path, tmp_path: Path) -> None:
    kinds: set[torch.dtype] = set()

    def watch(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, nn.Conv2d) and isinstance(output, torch.Tensor):
            kinds.add(output.dtype)

    with register_module_forward_hook(watch):
        train(config_of(data, tmp_path, precision="bf16", max_steps=2))
    # the readout, which a softmax over thousands of cells follows, stays in fp32
    assert kinds == {torch.bfloat16, torch.float32}
    state = load_teacher(tmp_path / "tiny").model.state_dict()
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())


def test_wandb_gets_predicted_maps_beside_human_ones(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config_of(data, tmp_path, loop__tracker="wandb", max_steps=2, validate_every=0.16))
    files = sorted((tmp_path / "tiny" / "wandb").glob("offline-run-*/files/media/images/val/maps_*.png"))
    assert len(files) == 2 * 9, "every validation sends the nine images of its set"
    height, width = WIDTH * SIZE[0] // SIZE[1], 3 * WIDTH + 2 * GAP
    for path in files:
        picture = cv2.imread(str(path)).astype(float)
        assert picture.shape == (height, width, 3)
        image, human, ours = (picture[:, at * (WIDTH + GAP) :][:, :WIDTH] for at in range(3))
        # the human map is brightest at the image's blob, where the first observer looked
        blob, peak = (
            np.unravel_index(cv2.blur(part.mean(-1), (25, 25)).argmax(), part.shape[:2]) for part in (image, human)
        )
        assert np.abs(np.subtract(blob, peak)).max() < 30
        assert np.abs(image - human).mean() > 1 and np.abs(human - ours).mean() > 1


def test_an_image_without_fixations_counts_nothing(data: Path, tmp_path: Path) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.linspace(0, 1, 12).view(3, 4))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.logits.flatten().log_softmax(0).view(1, 3, 4).expand(len(images), 3, 4)

    def gradient(valid: list[bool]) -> torch.Tensor:
        module = Constant()
        number = len(valid)
        maps = torch.softmax(torch.arange(12.0 * number).sin().view(number, 12), 1).view(number, 3, 4)
        batch = GazeBatch(torch.zeros(number, 4, 4, 3, dtype=torch.uint8), maps, maps, torch.tensor(valid), [])
        objective = GazeObjective(module, config_of(data, tmp_path), torch.device("cpu"))
        objective(batch, step=0, backward=lambda loss: loss.backward())  # type: ignore[arg-type, return-value]
        assert module.logits.grad is not None
        return module.logits.grad

    torch.testing.assert_close(gradient([True, False]), gradient([True]) / 2)
    assert not gradient([False, False]).any()


@pytest.mark.parametrize("launcher", ["cpu2_ddp", "cpu2_zero2"])
def test_two_ranks_score_every_sample_once(launcher: str, data: Path, tmp_path: Path) -> None:
    """Nine validation images over two ranks: five and four, the means over all nine."""
    arguments = arguments_of(training_options(data, tmp_path, max_steps=2, validate_every=1, ema=0.9))
    done = accelerate(launcher, MAIN, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["metrics"]["attention/num_images"] == 9 and summary["metrics"]["attention/num_skipped"] == 0
    state = torch.load(tmp_path / "tiny" / "checkpoints" / "step-000000002" / "model.pt", weights_only=True)
    kept = numpy_load_file(tmp_path / "tiny" / "best" / "model.safetensors")["readout.weight"]
    averages = [value for name, value in state.items() if name.startswith("average.weights.")]
    assert not np.array_equal(kept, state["model.readout.weight"]), "the best is the average, not the latest weights"
    assert any(np.array_equal(kept, average) for average in averages)


def test_check_trains_nothing(data: Path, tmp_path: Path) -> None:
    lines = "\n".join(check(config_of(data, tmp_path)))
    assert "24 images, 48 fixations" in lines and not (tmp_path / "tiny").exists()


BAD: dict[str, tuple[dict[str, object], str]] = {
    "missing shards": ({"data__train": "DATA/nowhere"}, "nowhere: no such folder"),
    "no gaze": ({"data__train": "DATA/images"}, "hold no gaze"),
    "no fixation": ({"data__val": "DATA/unlooked"}, "not one of 4 samples has a fixation"),
    "no fixation to train on": ({"data__train": "DATA/unlooked"}, "not one of 4 samples has a fixation"),
    "other edition": ({"data__val": "DATA/mouse"}, "edition 'mouse'"),
    "unknown backbone": ({"model__backbone": "resnet_x"}, "is no timm model"),
    "batch too large": ({"data__batch_size": 99}, "data.batch_size 99"),
    "no whole step": ({"max_steps": "null", "epochs": 0.01}, "less than one step"),
    "nothing to learn": ({"loss__kld": 0, "loss__nss": 0}, "nothing to learn"),
    "average that never moves": ({"ema": 1.0}, "ema 1.0"),
    "no first weights": ({"model__pretrained": "DATA/none"}, "no such weights"),
    "no run name": ({"run": "../x"}, "run name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(data: Path, tmp_path: Path, case: str) -> None:
    options, message = BAD[case]
    given = {key: str(value).replace("DATA", str(data)) for key, value in options.items()}
    config = config_of(data, tmp_path, **given)
    with pytest.raises(InputError, match=message) as error:
        train(config)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_bad_input_ends_the_program_with_one_line_and_code_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_here(MAIN, *arguments_of(training_options(data, tmp_path, data__val=data / "images")))
    error = capsys.readouterr().err.strip()
    assert code == 2 and "hold no gaze" in error and "\n" not in error


def test_an_unknown_key_is_answered_with_the_nearest_known_one(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Did you mean 'model.backbone'\?"):
        config_of(data, tmp_path, model__bakbone="resnet18")


def test_too_many_unreadable_images_stop_the_run(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train", tmp_path / "train")
    tar = tmp_path / "train" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"IDAT", b"IDOT"))
    with pytest.raises(InputError, match="samples could not be read"):
        train(config_of(data, tmp_path / "runs", data__train=tmp_path / "train", max_steps=12))


def test_another_config_or_other_data_in_the_same_run_is_refused(data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "tiny")
    with pytest.raises(InputError, match="belongs to another config: seed"):
        train(config_of(data, tmp_path, seed=1))
    pack(BlobSource(24, seed=9), tmp_path / "other", shard_samples=10)
    with pytest.raises(InputError, match="was trained on other train"):
        train(config_of(data, tmp_path, data__train=tmp_path / "other"))


RECIPES = sorted((REPOSITORY / "configs" / "teacher").glob("*.yaml"))


# the others are of the programs that write labels
@pytest.mark.parametrize(
    "path", [path for path in RECIPES if not path.stem.startswith(("label", "objects"))], ids=lambda path: path.stem
)
def test_shipped_recipes_are_valid(path: Path) -> None:
    config, _ = parse_config(Config, argv=["--config", str(path)])
    assert yaml.safe_load(path.read_text())["run"] == config.run
