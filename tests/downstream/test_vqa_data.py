"""Question answering from files in the official layouts: what is read, what is skipped, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from downstream.config import DataConfig, DownstreamConfig, ImageConfig, VqaConfig
from downstream.tasks import features as feature_cache
from downstream.tasks.features import encoder_features
from downstream.tasks.questions import QuestionExamples, QuestionTask
from downstream.tasks.registry import open_task
from engine.errors import InputError
from engine.program import parse_config
from engine.settings import LoopConfig
from tests.downstream.vqa_files import annotation, change, colour_image, write, write_easy, write_vqa
from tests.tools import REPOSITORY

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"


def config_of(path: Path, **vqa: object) -> DownstreamConfig:
    settings = VqaConfig(embedding=8, lstm=8, width=8, hidden=8, num_answers=5, cache=path / "cache", max_skipped=0.2)
    return DownstreamConfig(
        task="vqa",
        data=DataConfig(path=path, batch_size=4),
        image=ImageConfig(size=32, channels=8, num_masks=6, mask_scale=2),
        vqa=replace(settings, **vqa),  # type: ignore[arg-type]
        loop=LoopConfig(num_workers=0, tracker="none"),
    )


def opened(config: DownstreamConfig) -> QuestionTask:
    task = open_task(config)
    assert isinstance(task, QuestionTask)
    return task


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_official_files_are_read(tmp_path: Path, version: str) -> None:
    task = opened(config_of(write_vqa(tmp_path, version=version), version=version))
    assert task.facts["sizes"] == {"train": 36, "held_out": 4, "test": 16}
    assert set(task.classes) == {"maybe", "no", "yes", "blue", "green", "red"} - {min_class(task)}
    assert task.test.keys[:2] == ["val2014/9000", "val2014/9001"]
    train = task.train
    assert isinstance(train, QuestionExamples)
    images = {key: int(key.split("/")[1]) // 10 for key in [*train.keys, *task.held_out.keys]}
    assert not {images[k] for k in train.keys} & {images[k] for k in task.held_out.keys}, "no image in both"
    inputs = train.inputs(np.array([3, 0]))
    assert inputs["images"].shape == (2, 32, 32, 3) and inputs["images"].dtype == torch.uint8
    assert inputs["tokens"].shape == (2, 5) and train.words[0] == ["what", "colour", "is", "the", "square"]
    shares = train.targets[torch.arange(len(train))]
    assert shares.shape == (36, 5) and {round(float(share), 6) for share in shares.unique()} <= {0.0, 0.1, 0.9}
    assert task.modalities == {"image": (4, 4), "text": (5,)}
    assert task.masks("image", inputs).shape == (7, 4, 4)
    one = {name: value[:1] for name, value in inputs.items()}
    length = int((one["tokens"] != 0).sum())
    assert task.masks("text", one).shape == (1 + length * (length - 1) // 2, 5)
    assert train.images[0].shape == (32, 32, 3)
    assert {words[0]: kind for words, kind in zip(train.words, train.kinds, strict=True)} == {
        "what": "other",
        "is": "yes/no",
    }
    found = task.build_model()(inputs)
    assert found.logits.shape == (2, 5) and found.maps["image"].shape == (2, 4, 4)


def min_class(task: QuestionTask) -> str:
    (left_out,) = {"maybe", "no", "yes", "blue", "green", "red"} - set(task.classes)
    return left_out


def test_what_cannot_be_asked_is_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_vqa(tmp_path)
    questions, annotations = (root / name.format("train2014") for name in (QUESTIONS, ANNOTATIONS))
    change(questions, "questions", 0, question=" ?! ")
    change(annotations, "annotations", 3, **{"answers": annotation(1, 1, ["yes"] * 9)["answers"]})
    (root / "train2014" / "COCO_train2014_000000000105.jpg").unlink()
    task = opened(config_of(root))
    assert task.facts["skipped"]["train"] == {"empty_text": 1, "no_image": 2}
    assert task.facts["without_ten_answers"] == {"train2014": 1, "val2014": 0}
    assert sum(task.facts["sizes"][part] for part in ("train", "held_out")) == 40 - 4
    told = capsys.readouterr().out
    assert "3 of 39 questions skipped (1 empty_text, 2 no_image)" in told and "fewer than 10 answers" in told
    strict = config_of(root, max_skipped=0.0)
    with pytest.raises(InputError, match=r"1 of 40 questions of train2014 cannot be used \(1 fewer than 10 answers\)"):
        open_task(strict)


def test_unknown_words_and_answers_of_the_test_questions(tmp_path: Path) -> None:
    root = write_vqa(tmp_path)
    questions, annotations = (root / name.format("val2014") for name in (QUESTIONS, ANNOTATIONS))
    change(questions, "questions", 0, question="Zyx wvu?")
    change(questions, "questions", 2, question="is " * 30)
    change(annotations, "annotations", 1, **{"answers": annotation(1, 1, ["purple"] * 10)["answers"]})
    task = opened(config_of(root))
    assert isinstance(task.test, QuestionExamples)
    assert task.test.tokens[0].tolist() == [1, 1, 0, 0, 0], "kept, and read as unknown words"
    assert (task.test.tokens[2] > 1).all() and task.facts["test_texts_cut"] == 1
    assert task.facts["test_without_class"] >= 1 and float(task.test.targets[torch.tensor([1])].sum()) == 0
    model = task.build_model().eval()
    found = model(task.test.inputs(np.arange(3)))
    assert torch.isfinite(found.logits).all() and torch.isfinite(found.maps["text"]).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / QUESTIONS.format("val2014")).unlink(), "val2014_questions.json is missing"),
        (lambda root: (root / ANNOTATIONS.format("train2014")).write_text("{"), "annotations.json is no JSON"),
        (lambda root: write(root / QUESTIONS.format("val2014"), {"annotations": []}), "has no list 'questions'"),
        (
            lambda root: change(root / QUESTIONS.format("train2014"), "questions", 2, image_id="7"),
            "entry 2 of 'questions': 'image_id' is missing or of the wrong type",
        ),
        (
            lambda root: change(root / QUESTIONS.format("train2014"), "questions", 2, question_id=1000),
            "question 1000 stands there twice",
        ),
    ],
)
def test_files_that_are_not_official_are_named(tmp_path: Path, damage: object, message: str) -> None:
    root = write_vqa(tmp_path)
    damage(root)  # type: ignore[operator]
    with pytest.raises(InputError, match=message) as caught:
        open_task(config_of(root))
    assert "\n" not in str(caught.value)


def test_ready_features_are_read_by_row_from_the_disk(tmp_path: Path) -> None:
    root = write_vqa(tmp_path / "vqa")
    folder = tmp_path / "maps"
    folder.mkdir()
    stored: dict[int, np.ndarray] = {}
    for subset, first, count in (("train2014", 100, 20), ("val2014", 900, 8)):
        ids = np.arange(first, first + count)[::-1]
        maps = np.random.default_rng(first).random((count, 6, 3, 4)).astype(np.float16)
        np.save(folder / f"{subset}.npy", maps)
        np.save(folder / f"{subset}.ids.npy", ids)
        stored |= dict(zip(ids.tolist(), maps, strict=True))
    config = config_of(root, features=folder)
    task = opened(config)
    rows = np.array([5, 0, 30])
    found = task.train.inputs(rows)
    for row, maps in zip(rows, found["features"], strict=True):
        assert np.array_equal(maps.numpy(), stored[int(task.train.keys[row].split("/")[1]) // 10])
    assert isinstance(task.train, QuestionExamples) and isinstance(task.train.pictures.parts[0], np.memmap)  # type: ignore[attr-defined]
    assert task.modalities["image"] == (3, 4) and not hasattr(task.test, "images")
    assert task.build_model()(found).maps["image"].shape == (3, 3, 4)
    np.save(folder / "val2014.npy", np.zeros((8, 6, 4, 4), dtype=np.float16))
    with pytest.raises(InputError, match=r"feature maps of the training images are \(6, 3, 4\), of the test images"):
        open_task(config)
    np.save(folder / "val2014.ids.npy", np.arange(3))
    with pytest.raises(InputError, match="must hold 8 image numbers"):
        open_task(config)
    (folder / "val2014.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match="is no array that numpy can map"):
        open_task(config)


def test_encoder_features_are_computed_once_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "PART", 3)
    monkeypatch.setattr(feature_cache, "BATCH", 2)
    files = {number: tmp_path / f"{number}.png" for number in (11, 4, 30, 7, 2)}
    for number, path in files.items():
        colour_image(path, ("red", "green", "blue")[number % 3], size=40)
    files[30].write_bytes(b"damaged")
    encoder = write_encoder(tmp_path / "encoder")
    config = config_of(tmp_path)
    config = replace(config, image=replace(config.image, encoder=encoder))
    found = encoder_features(files, subset="train", config=config)
    assert sorted(found.places) == [2, 4, 7, 11], "the damaged image has no row"
    assert [len(part) for part in found.parts] == [3, 2] and found.parts[0].dtype == np.float16
    model = timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(encoder / "model.safetensors")).eval()
    pixels = cv2.imread(str(files[7]))
    assert pixels is not None
    image = cv2.resize(pixels[..., ::-1], (32, 32), interpolation=cv2.INTER_AREA)
    normal = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25
    with torch.inference_mode():
        expected = model.forward_features(normal)[0]  # type: ignore[operator]
    maps = found.inputs(np.array([found.places[7]]))["features"][0].float()
    assert torch.allclose(maps, expected, atol=2e-3, rtol=2e-3) and float(maps.abs().max()) > 0.01
    (folder,) = (config.vqa.cache).iterdir()
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "part-00001.npy").unlink()
    again = encoder_features(files, subset="train", config=config)
    assert np.array_equal(again.parts[1], found.parts[1]), "a missing part is computed again, to the same bits"
    assert (folder / "part-00000.npy").stat().st_mtime_ns == stamps["part-00000.npy"], "the other one is not"
    other = replace(config, image=replace(config.image, size=64))
    assert encoder_features(files, subset="train", config=other).shape != found.shape
    assert len(list(config.vqa.cache.iterdir())) == 2, "another size has its own folder"
    with pytest.raises(InputError, match=r"image\.frozen is false"):
        encoder_features(files, subset="train", config=replace(config, image=replace(config.image, frozen=False)))


def write_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    given = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3}
    settings = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": given}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_task_on_an_encoder_and_on_a_timm_backbone(tmp_path: Path) -> None:
    config = config_of(write_vqa(tmp_path / "vqa", train=6, test=3))
    for encoder in (write_encoder(tmp_path / "encoder"), Path("timm:test_resnet")):
        task = opened(replace(config, image=replace(config.image, encoder=encoder)))
        inputs = task.test.inputs(np.arange(3))
        assert inputs["features"].dtype == torch.float16
        assert task.build_model()(inputs).maps["image"].shape == (3, *task.modalities["image"])


def easy_config(path: Path) -> DownstreamConfig:
    return replace(config_of(path), task="easy_vqa")


def test_easy_vqa_in_its_own_layout(tmp_path: Path) -> None:
    root = write_easy(tmp_path)
    task = opened(easy_config(root))
    assert task.facts["sizes"] == {"train": 22, "held_out": 2, "test": 9}
    assert task.classes == {"red": 0, "green": 1, "blue": 2, "yes": 3, "no": 4}
    assert task.test.targets[torch.arange(4)].tolist() == [2, 1, 0, 2], "blue, green, red, in turn"
    limited = opened(replace(easy_config(root), data=DataConfig(path=root, batch_size=4, limit=10)))
    assert limited.facts["sizes"] == {"train": 9, "held_out": 1, "test": 9}
    rows = json.loads((root / "train" / "questions.json").read_text())
    write(root / "train" / "questions.json", [*rows[:3], ["what is it?", "mauve", 3]])
    with pytest.raises(InputError, match="entry 3: answer 'mauve' is not listed in"):
        open_task(easy_config(root))
    write(root / "train" / "questions.json", [*rows[:3], ["what is it?", "red"]])
    with pytest.raises(InputError, match=r"entry 3: .* is no .question, answer, image number"):
        open_task(easy_config(root))
    write(root / "train" / "questions.json", rows)
    for image in range(5):
        (root / "train" / "images" / f"{image}.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"5 of 24 questions of train cannot be used \(5 no_image\)"):
        open_task(easy_config(root))
    with pytest.raises(InputError, match="is no folder: give easy-VQA's data, or easy_vqa"):
        open_task(easy_config(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["easy_vqa", "vqa"])
def test_the_recipes_are_of_the_papers_masks(name: str) -> None:
    file = REPOSITORY / "configs" / "downstream" / f"{name}.yaml"
    config, _ = parse_config(DownstreamConfig, argv=["--config", str(file)])
    assert config.task == config.run == name and config.image.num_masks == 500
    assert config.image.mask_scale == {"easy_vqa": 2, "vqa": 6}[name]


def test_the_packages_own_data() -> None:
    pytest.importorskip("easy_vqa", reason="package easy-vqa is not installed")
    config = replace(easy_config(Path("easy_vqa")), data=DataConfig(path=Path("easy_vqa"), batch_size=4, limit=60))
    task = opened(config)
    assert len(task.classes) == 13 and task.facts["sizes"]["test"] == 9673
    assert task.facts["sizes"]["train"] + task.facts["sizes"]["held_out"] == 60
    assert task.facts["skipped"]["test"] == {"empty_text": 0, "no_image": 0}
    inputs = task.test.inputs(np.arange(2))
    assert int((inputs["tokens"][0] > 1).sum()) > 2, "words of the test questions are known from training"
