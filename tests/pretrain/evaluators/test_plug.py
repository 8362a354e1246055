"""The plug: another package's evaluator, offline and inside training, which never notices the evaluators."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InputError
from engine.files import sha256_of
from engine.loop import Training
from engine.program import parse_config
from pretrain.config import Config
from pretrain.evaluators.base import Result
from pretrain.evaluators.offline import check_probe, probe_run
from pretrain.evaluators.online import Records, online_hooks, online_probe
from pretrain.evaluators.registry import OWN, known_names, pick
from pretrain.evaluators.sources import ShardImages
from pretrain.probe_config import KnnConfig, OnlineConfig, ProbeConfig
from pretrain.trainer import train
from shards.reader import ShardSet
from tests.conftest import TinySample
from tests.pretrain.runs import pretrain
from tests.tools import REPOSITORY, run_python

MAIN = REPOSITORY / "pretrain" / "main.py"

PACKAGE = '''
"""How bright the features are: a third party's evaluator."""
from pretrain.evaluators.base import Evaluator, Result
from pretrain.evaluators.features import pooled_features
from pretrain.evaluators.sources import val_images

def brightness(subject, probe):
    features, labels = pooled_features(subject, probe, val_images(probe))
    scale = probe.options.get("brightness", {}).get("scale", 1.0)
    return Result({"mean": scale * float(features.mean())}, {"samples": len(labels), "scale": scale})

evaluator = Evaluator("brightness", needs=("val",), run=brightness)
'''


SETUP = """
[metadata]
name = bright
version = 1.0
[options]
py_modules = bright_features
[options.entry_points]
saccade.evaluators =
    brightness = bright_features:evaluator
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed by pip from its folder, without network."""
    pytest.importorskip("setuptools")
    folder, site = tmp_path_factory.mktemp("bright"), tmp_path_factory.mktemp("site")
    (folder / "bright_features.py").write_text(PACKAGE)
    (folder / "setup.cfg").write_text(SETUP)
    (folder / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
    )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(site), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip")
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def third_party(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the installed package on the path of this process and of those it starts."""
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "bright_features", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{site}:{REPOSITORY}")
    return site


def test_another_packages_evaluator_runs_by_name(
    third_party: Path, probe: Callable[..., ProbeConfig], tmp_path: Path
) -> None:
    assert len(PACKAGE.strip().splitlines()) == 11 and known_names() == sorted([*OWN, "brightness"])
    config = probe(evaluators="knn,brightness", options={"brightness": {"scale": 2.0}})
    assert any("40 samples" in line for line in check_probe(config))
    probe_run(config)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["metrics"]["brightness/mean"] > 0 and summary["protocols"]["brightness"]["scale"] == 2.0


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("linear_prob", "did you mean 'linear_probe'"),
        ("knn,imagenetc", "did you mean 'imagenet_c'"),
        ("zzz", "take from alignment"),
        (" , ", "none named"),
    ],
)
def test_an_unknown_evaluator_gets_the_nearest_name(names: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        pick(names)


@pytest.mark.parametrize(
    ("content", "words"), [("import nothing_of_the_kind", "cannot be loaded"), ("evaluator = 3", "gives int")]
)
def test_a_broken_package_is_named_in_one_line(third_party: Path, content: str, words: str) -> None:
    (third_party / "bright_features.py").write_text(content)
    with pytest.raises(InputError, match=f"'brightness'.*{words}"):
        pick("brightness")


def test_a_metric_that_is_no_number_is_refused(third_party: Path, probe: Callable[..., ProbeConfig]) -> None:
    with pytest.raises(InputError, match="'brightness' gave mean = nan"):
        probe_run(probe(evaluators="brightness", options={"brightness": {"scale": float("nan")}}))


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_is_bit_equal_with_and_without_evaluators(
    third_party: Path, student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path
) -> None:
    """Batch norm, weights, optimiser and every generator end as if nobody had looked."""
    common = {"max_steps": 4, "model__backbone_options": {"drop_rate": 0.3}}
    names = ["knn", "linear_probe", "alignment", "brightness", "retrieval", "finetune"]
    names += ["imagenet_c", "robust_gaze"] if find_spec("imagecorruptions") else []
    plain = student_config(run="plain", **common)
    watched = student_config(
        run="watched",
        online__evaluators=",".join(names),
        online__every_steps=2,
        online__val=str(tiny_sample.val),
        online__gaze=str(tiny_sample.gaze),
        online__max_val=20,
        online__options={
            "knn.k": 5,
            "linear.epochs": 3,
            "linear.rates": [0.1],
            "gaze_options.stride": 8,
            "corruptions.names": ["contrast"],
            "corruptions.severities": [1],
            "finetune.fractions": [0.2],
            "finetune.epochs": 1,
        },
        **common,
    )
    for config in (plain, watched):
        done = run_python(MAIN, "--config", config)
        assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs"
    losses = [{k: v for k, v in line.items() if k.startswith("train/")} for line in lines_of(runs / "plain")]
    found = [line for line in lines_of(runs / "watched") if "train/loss" in line]
    assert [{k: v for k, v in line.items() if k.startswith("train/")} for line in found] == losses
    for name in ("model.safetensors", "heads.safetensors"):
        assert sha256_of(runs / "plain" / "encoder" / name) == sha256_of(runs / "watched" / "encoder" / name)
    online = [line for line in lines_of(runs / "watched") if any(key.startswith("online/") for key in line)]
    assert {line["step"] for line in online} == {2, 4}
    logged = {key for line in online for key in line}
    assert {evaluator.label for evaluator in pick(",".join(names))} <= {
        key.split("/")[1] for key in logged if "/" in key
    }
    records = [json.loads(line) for line in (runs / "watched" / "probe" / "online.jsonl").read_text().splitlines()]
    assert [(each["step"], each["evaluator"]) for each in records] == [(s, name) for s in (2, 4) for name in names]
    assert records[0]["encoder"] != records[-1]["encoder"] and all(each["commit"] for each in records)
    assert records[0]["protocol"].items() >= {"k": 5, "temperature": 0.1, "image_size": 32, "seed": 0}.items()
    assert records[0]["protocol"]["val"]["samples"] == 20 and "learning_rate" in records[1]["protocol"]
    assert {f"online/knn/{name}": value for name, value in records[0]["metrics"].items()}.items() <= next(
        line for line in online if "online/knn/top1" in line
    ).items()
    probe_run(ProbeConfig(run=runs / "watched", evaluators="brightness", val=tiny_sample.val, max_val=20))
    last = next(line for line in reversed(online) if "online/brightness/mean" in line)
    metrics = json.loads((runs / "watched" / "summary.json").read_text())["metrics"]
    assert metrics["brightness/mean"] == pytest.approx(last["online/brightness/mean"], rel=1e-5)


ONE_TIME = """
from pathlib import Path
from pretrain.evaluators.base import Evaluator, Result

def run(subject, probe):
    Path(probe.train, "manifest.json").unlink(missing_ok=True)
    return Result({"one": 1.0}, {})

evaluator = Evaluator("brightness", needs=("train",), run=run)
"""


def test_the_training_set_is_not_opened_again_to_say_what_was_measured(
    third_party: Path, student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path
) -> None:
    """An evaluator that takes the set's manifest away: the records say how many classes max_train leaves out."""
    (third_party / "bright_features.py").write_text(ONE_TIME)
    images = ShardImages(ShardSet(shutil.copytree(tiny_sample.train, tmp_path / "train")), limit=9)
    unseen = 10 - len({images.read(number)[1] for number in range(9)})
    online = {"evaluators": "brightness", "every_steps": 2, "train": str(tmp_path / "train"), "max_train": 9}
    train(parse_config(Config, argv=["--config", str(student_config(max_steps=4, online=online))])[0])
    records = [json.loads(line) for line in (tmp_path / "runs/student/probe/online.jsonl").read_text().splitlines()]
    protocol = {"image_size": 32, "classes_without_training_images": unseen}
    assert [(each["step"], each["protocol"]) for each in records] == [(2, protocol), (4, protocol)] and unseen > 0


def test_what_numbers_in_training_were_measured_on_survives_a_resume_and_a_full_disk(tmp_path: Path) -> None:
    """Steps that are made again are not doubled; what cannot be written waits, and ends no training."""
    file, lines = tmp_path / "probe" / "online.jsonl", list[str]()
    evaluator, result = pick("knn")[0], Result({"top1": 50.0, "odd": float("nan")}, {"k": 5})

    def records(*, after: int) -> Callable[[int], None]:
        made = Records(file, after=after, report=lines.append)
        return lambda step: made.add(step, evaluator, result, encoder="ab", protocol={"k": 5, "path": tmp_path})

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in file.read_text().splitlines()]

    file.parent.write_text("a file in the folder's place")
    add = records(after=0)
    add(2)
    assert len(lines) == 1 and "cannot be written" in lines[0]
    file.parent.unlink()
    add(4)
    add(6)
    assert steps() == [2, 4, 6] and len(lines) == 1
    with file.open("a") as torn:
        torn.write('{"step": 8, "eval')
    again = records(after=4)
    again(6)
    again(8)
    assert steps() == [2, 4, 6, 8]
    assert json.loads(file.read_text().splitlines()[0])["metrics"] == {"top1": 50.0, "odd": "nan"}


@pytest.mark.parametrize(("zero", "ema"), [(3, 0.0), (2, 0.9)])
def test_on_ranks_that_hold_parts_of_the_weights_the_encoder_is_the_one_that_is_written(
    student_config: Callable[..., Path], tiny_sample: TinySample, tmp_path: Path, zero: int, ema: float
) -> None:
    """DeepSpeed on two ranks: what is seen after the last step is what the encoder file, or its average, gives."""
    config = student_config(
        run="parts",
        max_steps=4,
        ema=ema,
        attention__stages=[1],  # the last has one cell, whose map is the same whatever the weights
        optim__lr=0.01,
        online__evaluators="knn,alignment",
        online__every_steps=4,
        online__val=str(tiny_sample.val),
        online__gaze=str(tiny_sample.gaze),
        online__options={"knn.k": 5},
    )
    pretrain(config, world_size=2, zero=zero)
    run = tmp_path / "runs" / "parts"
    online = next(line for line in lines_of(run) if "online/knn/top1" in line) | next(
        line for line in lines_of(run) if "online/attention/nss" in line
    )
    sets = {"train": tiny_sample.train, "val": tiny_sample.val, "gaze": tiny_sample.gaze}
    probe_run(ProbeConfig(run=run, evaluators="knn,alignment", knn=KnnConfig(k=5), num_workers=0, **sets))
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    for name in ("knn/top1", "attention/nss", "attention/kld"):
        assert metrics[name] == pytest.approx(online[f"online/{name}"], rel=1e-5), name


@pytest.mark.parametrize(
    ("online", "words"),
    [
        (OnlineConfig(evaluators="knn"), "online.val is needed by evaluator 'knn'"),
        (OnlineConfig(evaluators="kn"), "did you mean 'knn'"),
        (OnlineConfig(evaluators="knn", val=Path("absent")), "absent"),
        (OnlineConfig(evaluators="knn", options={"knn.kk": 3}), "no option 'knn.kk'"),
        (OnlineConfig(evaluators="knn", options={"knn.k": "many"}), "is no int"),
    ],
)
def test_mistakes_are_found_before_the_first_step(
    tiny_sample: TinySample, monkeypatch: pytest.MonkeyPatch, online: OnlineConfig, words: str
) -> None:
    config = Config(online=online)
    config.data.shards = tiny_sample.train
    training: Training = None  # type: ignore[assignment]  # not reached
    with pytest.raises(InputError, match=words):
        online_hooks(training, config, None)


def test_options_reach_the_probe() -> None:
    config = Config(online=OnlineConfig(evaluators="knn", options={"knn.k": 3, "crop": 1, "linear.rates": [0.5]}))
    probe = online_probe(config)
    assert (probe.knn.k, probe.crop, probe.linear.rates, probe.keep_cache) == (3, 1.0, [0.5], False)
    assert online_hooks(None, Config(), None) == []  # type: ignore[arg-type]
