"""Labelling: idempotent, safe in races, complete after a kill, byte-identical however it came about."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import InputError
from shards.gaze import resize_density
from shards.reader import BadSample, ShardSet
from teacher.data import load_image
from teacher.label_config import LabelConfig
from teacher.labeller import check, label, shards_of_task
from teacher.saved import load_teacher
from tests.teacher.conftest import SIZE, run_here
from tests.tools import REPOSITORY, clean_environment

LABEL = REPOSITORY / "teacher" / "label.py"


def config_of(trained: Path, data: Path, output: Path, **more: object) -> LabelConfig:
    settings = {"run": trained, "shards": data / "images", "output": output, "batch_size": 2, "num_workers": 0}
    return LabelConfig(**settings | more)  # type: ignore[arg-type]


def arguments_of(config: LabelConfig) -> list[object]:
    names = ("run", "shards", "output", "batch_size", "num_workers")
    return [LABEL, *(f"--{name}={getattr(config, name)}" for name in names)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def labels(trained: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished label set."""
    return label(config_of(trained, data, tmp_path_factory.mktemp("labels")))


def test_labels_are_the_teachers_maps_and_say_whose_they_are(labels: Path, trained: Path, data: Path) -> None:
    teacher = load_teacher(trained)
    shards = ShardSet(data / "images", labels=labels, teacher_hash=teacher.hash)
    assert labels.name == teacher.hash[:16]
    sample = shards.read(4, 1)
    image = torch.from_numpy(load_image(sample.image, None, stored=SIZE, size=teacher.model.image_size))
    expected = resize_density(teacher.model(image[None]).exp(), (56, 56))[0].numpy()
    assert sample.map is not None and sample.map.shape == (56, 56)
    # even codes of eight bits, companded by a square root: half a step of 127 is the most a stored map is off
    error = np.abs(np.sqrt(sample.map / sample.map.max()) - np.sqrt(expected / expected.max()))
    assert error.max() < 0.6 / 127
    about = json.loads((labels / "manifest.json").read_text())["teacher"]
    assert about["hash"] == teacher.hash and about["backbone"] == "test_resnet"
    assert about["metrics"] == teacher.facts["metrics"] and about["data"] == teacher.facts["data"]
    assert [one["name"] for one in about["sources"]] == ["train"] and set(about["software"]) >= {"torch", "timm"}


def test_labelling_again_changes_nothing(labels: Path, trained: Path, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in labels.glob("shard-*")}
    old = contents(labels)
    label(config_of(trained, data, labels.parent))
    assert contents(labels) == old
    assert {path: path.stat().st_mtime_ns for path in labels.glob("shard-*")} == before, "shards were written anew"


def test_tasks_in_any_order_make_the_same_set(labels: Path, trained: Path, data: Path, tmp_path: Path) -> None:
    for task in (2, 0, 1):
        assert not (tmp_path / labels.name / "manifest.json").exists()
        label(config_of(trained, data, tmp_path, task=task, num_tasks=3, num_workers=1 if task else 0))
    assert contents(tmp_path / labels.name) == contents(labels)


def test_two_tasks_may_race_for_the_same_shards(labels: Path, trained: Path, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, *map(str, arguments_of(config_of(trained, data, tmp_path)))]
    racers = [subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [racer.communicate(timeout=120)[1] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], errors
    assert contents(tmp_path / labels.name) == contents(labels)


def test_a_killed_task_is_completed_by_the_same_line(labels: Path, trained: Path, data: Path, tmp_path: Path) -> None:
    """Killed as soon as its first shard is there, so that others are missing or half-written."""
    config = config_of(trained, data, tmp_path)
    command = [sys.executable, *map(str, arguments_of(config))]
    process = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    directory = tmp_path / labels.name
    deadline = time.monotonic() + 120
    while not list(directory.glob("shard-*.index")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(directory.glob("shard-*.index"))
    # what a kill between tar and index leaves, whether or not this one happened to
    shutil.copy(labels / "shard-000004.tar", directory / "shard-000004.tar")
    (directory / "shard-000004.index").unlink(missing_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    label(config)
    kept = {name: data for name, data in contents(directory).items() if not name.endswith(".tmp")}
    assert kept == contents(labels)


def test_images_that_cannot_be_decoded_are_named_and_left_out(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "images", tmp_path / "images")
    tar = tmp_path / "images" / "shard-000001.tar"
    damaged = bytearray(tar.read_bytes())
    at = damaged.index(b"IDAT")
    damaged[at : at + 4] = b"IDOT"
    tar.write_bytes(damaged)
    directory = label(config_of(trained, data, tmp_path / "labels", shards=tmp_path / "images"))
    out = capsys.readouterr().out
    assert "1 images without a label" in out and "no label: shard-000001.tar" in out
    shards = ShardSet(data / "images", labels=directory)
    assert shards.read(1, 1).map is not None
    with pytest.raises(BadSample, match="label map: none was written"):
        shards.read(1, 0)


def test_controls_are_written_beside_a_finished_set(trained: Path, data: Path, tmp_path: Path) -> None:
    directory = label(config_of(trained, data, tmp_path, controls="shuffled, centre_bias"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {directory.name, f"{directory.name}-shuffled-0", f"{directory.name}-centre_bias"}
    real, control = (ShardSet(data / "images", labels=tmp_path / name) for name in (directory.name, max(names)))
    assert not np.array_equal(real.read(0, 0).map, control.read(0, 0).map)


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, {}, [0, 1, 2, 3, 4]),
        ({}, {"first_shard": 1, "num_shards": 3}, [1, 2, 3]),
        ({}, {"task": 1, "num_tasks": 2}, [2, 3, 4]),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "5"}, {}, [1]),
        ({"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "10",
          "SLURM_ARRAY_TASK_STEP": "2"}, {}, [3, 4]),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"}, {"num_tasks": 5}, [3]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, {"task": 0, "num_tasks": 2}, [1]),
        ({}, {"task": 5, "num_tasks": 9}, [2]),
    ],
)  # fmt: skip
def test_a_task_takes_its_part(
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    options: dict[str, int],
    expected: list[int],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    images = ShardSet(data / "images")
    assert list(shards_of_task(config_of(Path(), data, Path(), **options), images)) == expected


def test_the_parts_of_all_tasks_are_the_whole(data: Path) -> None:
    images = ShardSet(data / "images")
    for count in (1, 2, 3, 5, 9):
        parts = [shards_of_task(config_of(Path(), data, Path(), task=t, num_tasks=count), images) for t in range(count)]
        assert [shard for part in parts for shard in part] == [0, 1, 2, 3, 4]


def test_a_teacher_of_an_earlier_version_still_labels(labels: Path, trained: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "best" / "config.json"
    facts = json.loads(path.read_text())
    del facts["sources"], facts["step"], facts["model"]["stride"]
    path.write_text(json.dumps(facts))
    found = contents(label(config_of(tmp_path / "run", data, tmp_path / "labels")))
    about = json.loads(found.pop("manifest.json"))["teacher"]
    assert found == {name: data for name, data in contents(labels).items() if name != "manifest.json"}
    assert not {"sources", "step"} & about.keys() and about["data"] == facts["data"]


def spoil(run: Path, what: str) -> None:
    """Make a run unusable in one way."""
    best = run / "best"
    facts = json.loads((best / "config.json").read_text())
    if what == "no run":
        shutil.rmtree(run)
    elif what == "no best":
        shutil.rmtree(best)
    elif what == "changed weights":
        state = load_file(best / "model.safetensors")
        save_file({name: value + 1 for name, value in state.items()}, best / "model.safetensors")
    elif what == "other architecture":
        facts["model"]["backbone"] = "resnet18"
    elif what == "unknown option":
        facts["model"]["depth"] = 3
    elif what == "other schema":
        facts["schema"] = 99
    elif what == "no json":
        (best / "config.json").write_text("{")
        return
    if best.exists():
        (best / "config.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no run", "no run in"),
        ("no best", "no teacher in"),
        ("changed weights", "is not what config.json beside it names"),
        ("other architecture", "is of another architecture"),
        ("unknown option", "model has the keys"),
        ("other schema", "schema 99"),
        ("no json", "describes no teacher"),
    ],
)
def test_a_run_without_a_sound_teacher_is_refused(
    trained: Path, data: Path, tmp_path: Path, what: str, message: str
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    spoil(tmp_path / "run", what)
    with pytest.raises(InputError, match=message) as error:
        label(config_of(tmp_path / "run", data, tmp_path / "labels"))
    assert "\n" not in str(error.value) and not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hash": "0123456789abcdef"}, "but teacher 0123456789ab is asked for"),
        ({"first_shard": 5}, "has shards 0 to 4"),
        ({"num_shards": 6}, "has shards 0 to 4"),
        ({"task": 2, "num_tasks": 2}, "give at most 1"),
        ({"controls": "shufled"}, "unknown control 'shufled'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    trained: Path, data: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    config = config_of(trained, data, tmp_path / "labels", **options)
    for program in (label, check):
        with pytest.raises(InputError, match=message):
            program(config)
    assert not (tmp_path / "labels").exists()


def test_a_folder_with_other_labels_is_refused(labels: Path, trained: Path, data: Path) -> None:
    before = contents(labels)
    with pytest.raises(InputError, match="labels of other size"):
        label(config_of(trained, data, labels.parent, map_size=(28, 28)))
    with pytest.raises(InputError, match="labels of other images"):
        label(config_of(trained, data, labels.parent, shards=data / "train"))
    assert contents(labels) == before


@pytest.mark.parametrize("found", ["", "{", "[]", "null", '{"images": 5}', "[" * 100_000])
def test_a_damaged_note_of_the_settings_is_refused(labels: Path, trained: Path, data: Path, found: str) -> None:
    note = labels / ".settings.json"
    sound = note.read_text()
    try:
        note.write_text(found)
        with pytest.raises(InputError, match="another --output"):
            label(config_of(trained, data, labels.parent))
    finally:
        note.write_text(sound)


def test_an_output_that_no_folder_can_be_made_in_is_refused(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / load_teacher(trained).hash[:16] / ".settings.json").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    unusable = ("file", "loop/labels", "n" * 300, "zero\0", "/proc/labels", "/dev/null/labels", ".")
    for output in unusable:
        with pytest.raises(InputError, match=r"cannot be written .* choose another --output"):
            label(config_of(trained, data, Path(output)))
    with pytest.raises(InputError, match="only be written to a local"):
        label(config_of(trained, data, Path("s3://bucket/labels")))
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_ends_the_program_with_one_line_and_code_2(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_here(*arguments_of(config_of(trained / "nowhere", data, tmp_path / "labels")))
    error = capsys.readouterr().err.strip()
    assert code == 2 and "no run in" in error and "teacher/main.py" in error and "\n" not in error
