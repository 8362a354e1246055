"""Captioning at its door: runs, table, page, resume, a folder of one's own images, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.captioning.caption import main as caption_main
from downstream.captioning.config import CaptionConfig
from downstream.captioning.data import CaptionTask
from downstream.captioning.folder_config import FolderConfig
from downstream.captioning.table import PAPER, tabulate
from downstream.captioning.trainer import run_captioning
from downstream.captioning.vocabulary import words_of
from downstream.config import DataConfig, DownstreamConfig, ImageConfig
from downstream.main import check, main
from downstream.stage import best_weights, stage_folder
from engine.errors import InputError, Requeue
from engine.program import parse_config
from engine.settings import LoopConfig, OptimConfig
from tests.downstream.captioning.files import CLASSES, SIDE, detections, write_coco, write_flickr8k
from tests.downstream.launched import finetune, leave_java_out
from tests.tools import REPOSITORY, run_distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flickr8k(tmp_path_factory.mktemp("flickr8k"), 40)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_java_out(monkeypatch)


@pytest.fixture
def config(root: Path, cache: Path, tmp_path: Path) -> DownstreamConfig:
    return DownstreamConfig(
        run="t",
        runs=tmp_path / "runs",
        task="caption",
        arm="baseline,ica",
        epochs=6,
        data=DataConfig(path=root, batch_size=8),
        image=ImageConfig(encoder=Path("timm:test_resnet"), size=SIDE),
        caption=CaptionConfig(
            objects=root / "detections.json",
            cache=cache,
            min_count=2,
            max_words=10,
            embedding=16,
            attention=16,
            decoder=32,
            heads=2,
            dropout=0.0,
            beam=3,
        ),
        optim=OptimConfig(name="adamw", lr=0.01, lr_scaling="none", warmup_epochs=0),
        loop=LoopConfig(num_workers=0, tracker="none", checkpoint_every=7, log_every=3),
    )


def test_it_learns_writes_its_table_and_captions_a_folder(config: DownstreamConfig, root: Path, tmp_path: Path) -> None:
    config = replace(config, seeds=2, epochs=12)
    main(config)
    folder = config.runs / "t"
    summary = json.loads((folder / "summary.json").read_text())
    gains = []
    for seed in (0, 1):
        runs = {arm: stage_folder(config, arm=arm, seed=seed) for arm in ("baseline", "ica")}
        found = {arm: run.read_summary() for arm, run in runs.items()}
        assert found["ica"]["metrics"]["test/bleu1"] > 0.6, "a caption tells class and side of the square"
        iou = {arm: one["metrics"]["attention/iou"] for arm, one in found.items()}
        assert iou["ica"] > 0.9 and iou["ica"] > iou["baseline"] + 0.3, "attention learnt the masks"
        assert found["ica"]["metrics"]["attention/words"] == 8 and found["ica"]["metrics"]["attention/mass"] > 0
        assert found["ica"]["data"]["matched_objects_per_caption"] == {"train": 1.0, "val": 1.0, "test": 1.0}
        assert set(found["ica"]["unavailable"]) == {"meteor", "spice", "ptb_tokenizer"}
        gains.append(found["ica"]["metrics"]["test/bleu4"] - found["baseline"]["metrics"]["test/bleu4"])
        written = json.loads((runs["ica"].path / "captions.json").read_text())
        assert len(written) == 4 and all(len(one["references"]) == 2 for one in written)
    assert summary["metrics"]["ica/test/bleu4/gain"] == pytest.approx(np.mean(gains))
    page = (folder / "report" / "index.html").read_text()
    for text in ("Word by word", "mask of", "0.2453", "Matched objects per caption: 1.00", "simple (lower-case"):
        assert text in page, text
    assert "| ica, gain (p) |" in (folder / "report" / "summary.md").read_text()

    mine = tmp_path / "mine"
    mine.mkdir()
    for number in (0, 1):
        shutil.copy(root / "images" / f"{number:04d}.jpg", mine)
    (mine / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    run = stage_folder(config, arm="ica", seed=0).path
    caption_main(FolderConfig(run=run, images=mine, output=tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert [one["image"] for one in content["images"]] == ["0000.jpg", "0001.jpg"]
    assert set(content["skipped"]) == {"broken.jpg"}
    known = {one["image"]: one["caption"] for one in json.loads((run / "captions.json").read_text())}
    for one in content["images"]:
        assert one["caption"] == " ".join(word["word"] for word in one["words"]) and one["score"] < 0
        assert np.allclose([np.sum(word["map"]) for word in one["words"]], 1, atol=1e-3)
        assert known.get(one["image"], one["caption"]) == one["caption"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "where it looked for" in page and content["images"][1]["caption"] in page

    (run / "best.safetensors").unlink()  # a finished run whose weights were cleared away still has its numbers
    main(config)
    assert "No maps: best.safetensors of ica, seed 0" in (folder / "report" / "index.html").read_text()


def test_a_folder_s_captions_are_those_of_the_test(config: DownstreamConfig, root: Path, tmp_path: Path) -> None:
    config = replace(config, arm="ica", epochs=1, caption=replace(config.caption, model="transformer"))
    run_captioning(config)
    run = stage_folder(config, arm="ica", seed=0).path
    caption_main(FolderConfig(run=run, images=root / "images", output=tmp_path / "out", batch_size=7, max_shown=3))
    content = json.loads((tmp_path / "out" / "captions.json").read_text())
    mine = {one["image"]: one["caption"] for one in content["images"]}
    tested = json.loads((run / "captions.json").read_text())
    assert len(mine) == 40 and all(mine[one["image"]] == one["caption"] for one in tested)
    assert "The first 3 of 40 images" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize("arm", ["ica", "kld"])
def test_stopped_anywhere_it_ends_in_the_same_bits(config: DownstreamConfig, arm: str) -> None:
    config = replace(config, arm=arm, epochs=2, caption=replace(config.caption, dropout=0.5))
    whole, parts = (replace(config, run=name) for name in ("whole", "parts"))
    run_captioning(whole)
    for step in (3, 11):
        with pytest.raises(Requeue):
            run_captioning(replace(parts, loop=replace(parts.loop, stop_after=step)))
    run_captioning(parts)
    ours, theirs = (best_weights(stage_folder(c, arm=arm, seed=0)) for c in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_ranks_learn_what_one_learns_under_ddp_and_zero(config: DownstreamConfig) -> None:
    """Losses, captions, and ZeRO's weights against DDP's; ZeRO 3 is refused."""
    config = replace(config, arm="ica", epochs=2)
    run_captioning(config)
    with pytest.raises(AssertionError, match=r"InputError: captioning needs whole weights on every rank, and ZeRO 3"):
        run_distributed(finetune, 2, config, [0, 2, 3])
    runs = [stage_folder(replace(config, run=name), arm="ica", seed=0) for name in ("t", "zero0", "zero2")]
    one, ddp, zero = ([line["train/words"] for line in run.metrics() if "train/words" in line] for run in runs)
    assert len(one) == 6 and one == pytest.approx(ddp, rel=1e-3) and ddp == pytest.approx(zero, rel=1e-5)
    weights, others = best_weights(runs[1]), best_weights(runs[2])
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-5, msg=name)
    written = [json.loads((run.path / "captions.json").read_text()) for run in runs]
    names = [[each["image"] for each in captions] for captions in written]
    assert names[0] == names[1] and len(set(names[0])) == len(names[0]) == 4, "each image on one rank"
    assert written[1] == written[2]


def test_an_encoder_can_learn_along(config: DownstreamConfig) -> None:
    config = replace(config, arm="baseline", epochs=0.5, image=replace(config.image, frozen=False))
    run_captioning(config)
    weights = best_weights(stage_folder(config, arm="baseline", seed=0))
    with pytest.raises(InputError, match=r"caption\.weight is .* there and 7"):  # finished, but of another config
        run_captioning(replace(config, caption=replace(config.caption, weight=7.0)))
    task = CaptionTask(config)
    before = task.build_model().state_dict()
    changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert "trunk.backbone.conv1.0.weight" in changed or any(name.startswith("trunk.backbone") for name in changed)
    assert not any("running_mean" in name for name in changed), "batch statistics stay"


def test_the_vocabulary_is_learnt_from_train_alone(config: DownstreamConfig, root: Path, tmp_path: Path) -> None:
    task = CaptionTask(config)
    copy = shutil.copytree(root, tmp_path / "copy")
    with (copy / "captions.txt").open("a") as file:
        for image in (*task.val.images, *task.test.images):
            file.write(f"{image.name},zyzzyva zyzzyva zyzzyva\n")
        file.write(f"{task.train.images[0].name},quokka quokka\n")
    words = CaptionTask(replace(config, data=replace(config.data, path=copy))).vocabulary.words
    assert "zyzzyva" not in words and set(words) == {*task.vocabulary.words, "quokka"}


def test_a_class_outside_the_vocabulary_is_counted(config: DownstreamConfig) -> None:
    """ "car" stands in fewer captions than `min_count`, so no word is left whose attention could be supervised."""
    task = CaptionTask(config)
    counts = {
        name: sum(words_of(name)[-1] in words for words in task.train.captions.words) for name in CLASSES.values()
    }
    rare = min(counts, key=lambda name: counts[name])
    fewer = CaptionTask(replace(config, caption=replace(config.caption, min_count=counts[rare] + 1)))
    lost = fewer.facts["names_outside_vocabulary"]
    assert rare in lost and fewer.facts["matched_objects_per_caption"]["train"] < 1
    assert (
        int((fewer.train.captions.positions >= 0).sum())
        + lost[rare]
        + sum(count for name, count in lost.items() if name != rare)
        + int((fewer.val.captions.positions >= 0).sum() + (fewer.test.captions.positions >= 0).sum())
        == 80
    )


def test_damaged_images_are_left_out_up_to_a_share(config: DownstreamConfig, root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "images" / "0003.jpg").write_bytes(b"\xff\xd8\xff no image")
    damaged = replace(config, data=replace(config.data, path=copy))
    with pytest.raises(InputError, match=r"1 of 40 images cannot be used \(1 that cannot be decoded\)"):
        CaptionTask(damaged)
    task = CaptionTask(replace(damaged, caption=replace(config.caption, max_skipped=0.1)))
    assert sum(part["images"] for part in task.facts["sizes"].values()) == 39
    assert task.facts["skipped_images"] == {"that cannot be decoded": 1}


def test_bad_masks_above_a_share_stop_it(config: DownstreamConfig, tmp_path: Path) -> None:
    content = detections([f"{i:04d}.jpg" for i in range(40)])
    content["annotations"][5]["segmentation"] = {"size": [SIDE, SIDE], "counts": "????"}
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"1 of 40 images with object masks cannot be used \(1 damaged .*, the first 0005.jpg"
    ):
        CaptionTask(replace(config, caption=replace(config.caption, objects=file)))


def test_objects_that_two_images_would_share_are_refused(config: DownstreamConfig, root: Path, tmp_path: Path) -> None:
    """By `--check` and in training, also where the limit leaves one of the two images out."""
    copy = shutil.copytree(root, tmp_path / "copy")
    for folder in ("first", "second"):
        shutil.copytree(root / "images", copy / "images" / folder)
    lines = [line.split(",", 1) for line in (root / "captions.txt").read_text().splitlines()[1:]]
    written = [f"{folder}/{name},{text}" for folder in ("first", "second") for name, text in lines]
    (copy / "captions.txt").write_text("\n".join(["image,caption", *written]) + "\n")
    shared = replace(config, data=replace(config.data, path=copy, limit=1))
    for door in (check, CaptionTask):
        with pytest.raises(InputError, match=r"first/(.*) and second/\1 would both get the objects of '\d{4}'"):
            door(shared)


def test_refusals(config: DownstreamConfig) -> None:
    with pytest.raises(InputError, match=r"'icca'.* not known; take from all, baseline, ica"):
        run_captioning(replace(config, arm="icca"))
    without = replace(config, caption=replace(config.caption, objects=None))
    with pytest.raises(InputError, match=r"needs object masks: set caption.objects"):
        run_captioning(without)
    with pytest.raises(InputError, match=r"no encoder: set image\.encoder"):
        run_captioning(replace(config, image=replace(config.image, encoder=None)))
    with pytest.raises(InputError, match=r"caption.embedding 15 must be a multiple of caption.heads 2"):
        run_captioning(replace(config, caption=replace(config.caption, model="transformer", embedding=15)))
    with pytest.raises(InputError, match="no run in"):
        caption_main(FolderConfig(run=config.runs / "none", images=config.data.path / "images"))
    with pytest.raises(InputError, match="is no folder"):
        caption_main(FolderConfig(run=config.runs, images=config.data.path / "gone"))


def test_a_baseline_needs_no_masks(config: DownstreamConfig) -> None:
    alone = replace(config, arm="baseline", epochs=0.3, caption=replace(config.caption, objects=None, choose_by="loss"))
    found = run_captioning(alone)["baseline", 0]
    assert "attention/mass" not in found and found["held_out/loss"] > 0
    assert "neither supervised nor measured" in (config.runs / "t" / "report" / "index.html").read_text()


def test_the_table_pairs_seeds_and_keeps_the_papers_values() -> None:
    results = {
        (arm, seed): {"test/bleu4": value}
        for arm, values in {"baseline": (0.10, 0.20, 0.30), "ica": (0.12, 0.23, 0.31)}.items()
        for seed, value in enumerate(values)
    }
    rows = tabulate(results)
    cell = rows["ica"]["test/bleu4"]
    assert cell.gain == pytest.approx(0.02) and cell.p_value == pytest.approx(0.0742, abs=1e-3)
    assert rows["baseline"]["test/bleu4"].gain is None and cell.deviation == pytest.approx(
        np.std([12, 23, 31], ddof=1) / 100
    )
    assert PAPER["Flickr8k"]["ica"]["test/bleu4"] == 0.2453 and PAPER["MSCOCO"]["baseline"]["test/cider"] == 0.9378


@pytest.mark.parametrize("name", ["flickr8k", "coco"])
def test_the_recipes_are_read_and_check_says_what_they_found(name: str, root: Path, tmp_path: Path) -> None:
    recipe = str(REPOSITORY / "configs" / "downstream" / f"caption_{name}.yaml")
    data = root if name == "flickr8k" else write_coco(tmp_path, 20)
    objects = data / ("detections.json" if name == "flickr8k" else "instances.json")
    argv = ["--config", recipe, "--data.path", str(data), "--caption.objects", str(objects), "--image.size", "64"]
    config, _ = parse_config(DownstreamConfig, argv=[*argv, "--caption.weights", "null"])
    assert config.caption.weight == 0.1 and config.caption.layout == name and config.arm == "all"
    lines = check(config)
    assert lines[0] == "arms: baseline, ica, ica_middle, kld" and "320 channels on 2x2 places" in lines[2]
    assert lines[3] == f"objects: 3 classes, for {40 if name == 'flickr8k' else 20} of the images with captions"
    for threshold in ("0", "1", "-0.1"):
        with pytest.raises(InputError, match="min_score"):
            parse_config(DownstreamConfig, argv=[*argv, "--caption.min_score", threshold])
