"""Every recipe: its values, and 20 steps of every arm on the generated sample under DDP and ZeRO 2."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine.chain import read_chain
from engine.optim import build_schedule
from engine.program import config_to_dict, parse_config
from engine.runs import flatten
from pretrain.config import Config
from pretrain.evaluators.online import online_probe
from pretrain.trainer import check, train
from shards.controls import write_control
from shards.reader import ShardSet
from tests.conftest import TinySample
from tests.tools import REPOSITORY, accelerate

RECIPES = {path.stem: path for path in sorted((REPOSITORY / "configs" / "pretrain").glob("*.yaml"))}
SLIM_RESNET = "{channels: [16, 32, 64, 128], output_stride: 8}"
SLIM_DEMO = "{channels: [16, 16, 32, 32], stem_width: 8, output_stride: 8}"
SLIM_VIT = "{embed_dim: 64, depth: 2, num_heads: 2}"
# The full-size recipes that stand for an arm of their own; the backbones are theirs, made narrow.
LARGE = {
    "imagenet_attention": SLIM_RESNET,  # ResNet-50
    "imagenet_resnet18": SLIM_RESNET,
    "imagenet_vit_s16": SLIM_VIT,
    "cifar10": "{channels: [16, 32, 64, 128]}",
}
STEPS = 20


def read(name: str) -> Config:
    return parse_config(Config, argv=["--config", str(RECIPES[name])])[0]


def test_simclr_recipes_hold_the_official_values() -> None:
    """google-research/simclr: LARS, 0.3 * 4096 / 256 after ten epochs, decay 1e-4, temperature 0.1."""
    names = [
        name for name in RECIPES if name.startswith("imagenet_") and "supervised" not in name and "vit" not in name
    ]
    assert len(names) == 8
    for name in names:
        config = read(name)
        optim, views = config.optim, config.views
        assert (optim.name, optim.momentum, optim.weight_decay, config.temperature) == ("lars", 0.9, 1e-4, 0.1)
        assert (views.min_area, views.jitter, views.grey, views.blur) == (0.08, 1.0, 0.2, 0.5)
        schedule = build_schedule(optim, batch_size=config.data.batch_size, steps_per_epoch=312.75, total_steps=62550)
        assert schedule.peak == pytest.approx(4.8) and schedule.warmup_steps == 3128
        assert schedule(3127) == pytest.approx(4.8) and schedule(62549) < 1e-6


def test_the_cifar_recipe_holds_the_official_values() -> None:
    config = read("cifar10")
    assert (config.data.batch_size, config.epochs, config.temperature, config.views.jitter) == (512, 1000, 0.5, 0.5)
    assert config.views.blur == 0 and config.model.backbone == "resnet18" and config.model.cifar_stem
    assert build_schedule(config.optim, batch_size=512, steps_per_epoch=97.6, total_steps=97656).peak == 1.0


def test_the_arms_differ_in_what_they_are_about_and_in_nothing_else() -> None:
    """A control must be a control: each recipe of a family equals the one with a teacher but for these values."""
    differs = {
        "contrastive": {"arm", "data.labels", "attention.weight", "online.evaluators", "online.gaze"},
        "shuffled": {"data.control"},
        "centre_bias": {"data.control"},
        "co_train": {"arm", "data.labels", "data.gaze", "data.gaze_batch_size"},
        "kld": {"attention.nss"},
        "nss": {"attention.nss", "attention.kld"},
    }
    pairs = [("imagenet_attention", f"imagenet_{name}", allowed) for name, allowed in differs.items()]
    pairs += [("demo", f"demo_{name}", allowed) for name, allowed in differs.items()]
    supervised = differs["contrastive"]
    pairs += [(f"{family}_supervised_attention", f"{family}_supervised", supervised) for family in ("imagenet", "demo")]
    for base, other, allowed in pairs:
        found = {key for key, pair in compare(read(base), read(other)).items() if pair[0] != pair[1]}
        assert found - {"run"} <= allowed and found & allowed, f"{other}: {found}"
        assert ("arm" in found) == ("arm" in allowed), f"{other}: {found}"


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("demo")])
def test_recipes_watch_the_encoder_on_held_out_sets(name: str) -> None:
    """Nearest neighbours and linear probe in each; alignment where the arm learns from people, on gaze held out."""
    config = read(name)
    online = config.online
    assert {"knn", "linear_probe"} <= set(online.evaluators.split(","))
    assert ("alignment" in online.evaluators) == config.has_heads == (online.gaze is not None)
    probe = online_probe(config)  # refuses an option that a probe does not have
    assert probe.train == config.data.shards and online.val == probe.val and probe.keep_cache is False
    assert probe.val.parent == probe.train.parent and probe.val.name in ("val", "test") and probe.train.name == "train"
    assert online.gaze is None or (online.gaze.name == "val" and online.gaze != config.data.gaze)
    assert config.epochs / online.every_epochs >= 5
    sampled = [online.max_train, online.max_val, online.max_gaze]
    assert all(0 < number <= 50_000 for number in sampled)


def test_the_first_run_gives_every_path_of_its_recipe() -> None:
    """A chain with its data elsewhere reads none from where the recipe has them."""
    steps = read_chain(REPOSITORY / "configs" / "chain" / "first_run.yaml")
    students = [step.command({"data": "D", "runs": "R"}) for step in steps if step.program == "pretrain/main.py"]
    assert len(students) == 2
    for command in students:
        config, _ = parse_config(Config, argv=[text for text in command if text.startswith("--") and "=" in text])
        paths = [config.data.shards, config.data.labels, config.online.val, config.online.gaze]
        assert all(str(path).startswith("D/") for path in paths), paths


def compare(one: Config, other: Config) -> dict[str, tuple[object, object]]:
    first, second = flatten(config_to_dict(one)), flatten(config_to_dict(other))
    return {key: (first.get(key), second.get(key)) for key in first.keys() | second.keys()}


def arguments(name: str, sample: TinySample, runs: Path, *, zero: bool) -> list[str]:
    """Options that bring a recipe to the tiny sample: data, sizes and what the launcher and the device do not have."""
    config = read(name)
    slim = LARGE.get(name, SLIM_DEMO)
    given = {
        "config": RECIPES[name],
        "run": name,
        "runs": runs,
        "max_steps": STEPS,
        "sync_batch_norm": "false",  # no GPU
        "data.shards": sample.train,
        "data.batch_size": 12,
        "data.image_size": 32,
        "model.backbone_options": slim,
        "model.projector_hidden": 32,
        "attention.channels": 16,
        "online.evaluators": "",  # their sets are not here; test_plug runs evaluators during training
        "loop.num_workers": 0,
        "loop.tracker": "none",
        "loop.log_every": 1,
        "loop.checkpoint_every": 1000,
    }
    if config.attends:
        given["data.labels"] = sample.root / "controls"
    if config.co_trains:
        given |= {"data.gaze": sample.gaze, "data.gaze_batch_size": 6}
    if zero and config.optim.name == "lars":
        given |= {"optim.name": "sgd", "optim.lr_scaling": "none", "optim.lr": 0.05}
    return [text for key, value in given.items() for text in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def controlled(tiny_sample: TinySample) -> TinySample:
    """The tiny sample with shuffled and centre-bias labels beside the teacher's, in `root/controls`."""
    images = ShardSet(tiny_sample.train)
    labels = next(path.parent for path in tiny_sample.labels.glob("*/manifest.json"))
    root = tiny_sample.root / "controls"
    for kind in ("shuffled", "centre_bias"):
        write_control(kind, images, labels, root)
    (root / labels.name).symlink_to(labels)
    return tiny_sample


def losses(run: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["train/loss"] for line in lines])


@pytest.mark.parametrize(
    ("precision", "left_out"), [("no", "sync_batch_norm"), ("fp16", "sync_batch_norm and precision fp16")]
)
def test_a_login_node_without_a_gpu_checks_a_recipe_that_needs_one(
    controlled: TinySample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, left_out: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    argv = arguments("imagenet_attention", controlled, tmp_path / "runs", zero=False)
    place = argv.index("--sync_batch_norm")
    config = parse_config(Config, argv=[*argv[:place], *argv[place + 2 :], "--precision", precision])[0]
    assert config.sync_batch_norm and config.precision == precision
    lines = check(config)
    assert lines[-1] == f"no GPU here: {left_out} left out of this check; training stops without one"
    assert len(lines) == 7 and "resnet50" in lines[3] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("launcher", ["cpu2_ddp", "cpu2_zero2"])
def test_all_arms_run_20_steps_on_two_ranks(controlled: TinySample, tmp_path: Path, launcher: str) -> None:
    """One launch for all; and co-training without batch statistics agrees with one process to 1e-4."""
    runs, zero = tmp_path / "runs", launcher == "cpu2_zero2"
    names = [name for name in RECIPES if name.startswith("demo")] + list(LARGE)
    jobs = [arguments(name, controlled, runs, zero=zero) for name in names]
    exact = ("--model.backbone", "test_vit", "--model.backbone_options", "{}", "--model.head_norm", "none")
    precise = ("--precision", "no", "--channels_last", "false", "--ema", "0.9")
    alike = [*arguments("demo_co_train", controlled, runs, zero=zero), *exact, *precise]
    jobs.append([*alike, "--run", "co-train-exact", "--loop.stop_after", "10"])
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = accelerate(launcher, REPOSITORY / "tests" / "pretrain" / "run_recipes.py", file)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    for name in names:
        curve = losses(runs / name)
        assert len(curve) == STEPS and np.isfinite(curve).all(), name
        assert (runs / name / "encoder" / "model.safetensors").is_file()
    # the same run, one process for the whole and for the second half
    train(parse_config(Config, argv=[*alike, "--run", "one"])[0])
    train(parse_config(Config, argv=[*alike, "--run", "co-train-exact"])[0])
    np.testing.assert_allclose(losses(runs / "co-train-exact"), losses(runs / "one"), atol=1e-4)
