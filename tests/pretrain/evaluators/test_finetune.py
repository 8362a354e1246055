"""Fine-tuning: its arms, and that they are the same whoever trains them, and trained once through kills."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

from engine.errors import InputError
from pretrain.evaluators import finetune as finetune_module
from pretrain.evaluators.base import Subject
from pretrain.evaluators.classes import class_labels
from pretrain.evaluators.finetune import finetune, plan_arms, read_list, stratified
from pretrain.evaluators.sources import ShardImages, train_images
from pretrain.evaluators.subjects import untrained
from pretrain.probe_config import FinetuneConfig, ProbeConfig

Open = Callable[..., tuple[Subject, ProbeConfig]]


def test_a_share_is_stratified_nested_and_seeded() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    tenth, fifth = (stratified(labels, share=share, seed=4) for share in (0.1, 0.2))
    assert np.bincount(labels[tenth]).tolist() == [10, 5, 1] and np.bincount(labels[fifth]).tolist() == [20, 10, 1]
    assert set(tenth) <= set(fifth) and tenth == stratified(labels, share=0.1, seed=4)
    assert tenth != stratified(labels, share=0.1, seed=5)


def test_lists_name_images_by_key_or_file_name(open_tiny: Open, tmp_path: Path) -> None:
    _, probe = open_tiny()
    images = train_images(probe)
    keys = [key for shard in range(3) for key in images.shards.keys(shard)]
    labels = class_labels(images.shards)[images.numbers]
    file = tmp_path / "one_percent.txt"
    file.write_text(f"{keys[5]}\n{keys[3]}.jpg\n\n")
    assert read_list(file, images) == [3, 5]
    with pytest.raises(InputError, match=rf"'one_percent'.* class '.*' \({10 - len(set(labels[[3, 5]]))} of 10"):
        plan_arms(FinetuneConfig(lists=[file]), images, seed=0)
    file.write_text("\n".join(keys[np.flatnonzero(labels == label)[0]] for label in range(10)))
    arms = plan_arms(FinetuneConfig(lists=[file]), images, seed=0)
    assert [(arm.name, arm.scratch) for arm in arms] == [("one_percent", False), ("scratch/one_percent", True)]
    assert labels.tolist() == [images.read(number)[1] for number in range(72)]
    for content, words in (("absent_name\n", "absent_name"), ("", "no names")):
        file.write_text(content)
        with pytest.raises(InputError, match=words):
            read_list(file, images)


def test_fine_tuning_learns_its_images(open_tiny: Open) -> None:
    """Measured on the images that it was tuned on; the subject itself stays as it was."""
    subject, probe = open_tiny()
    frozen = {name: value.clone() for name, value in subject.backbone.state_dict().items()}

    def tuned(lr: float) -> float:
        config = FinetuneConfig(fractions=[0.9], epochs=25, batch_size=16, lr=lr, head_lr=1.0, scratch=False)
        result = finetune(subject, dataclasses.replace(probe, val=probe.train, finetune=config))
        assert result.protocol["images"] == {"90%": 62}
        return result.metrics["90%/top1"]

    assert tuned(1.0) > max(40, tuned(1e-6) + 15)
    assert all(torch.equal(value, frozen[name]) for name, value in subject.backbone.state_dict().items())


def test_scratch_arms_start_from_other_weights(open_tiny: Open) -> None:
    """The arms agree when the subject is itself untrained with that seed, and differ when it is not."""
    subject, probe = open_tiny(finetune=FinetuneConfig(fractions=[0.5], epochs=1, lr=1e-9))
    metrics = finetune(dataclasses.replace(subject, backbone=untrained(subject, seed=0).backbone), probe).metrics
    assert metrics["50%/top1"] == metrics["scratch/50%/top1"]
    start = untrained(subject, seed=1)
    assert start.hash != subject.hash and start.hash == untrained(subject, seed=1).hash


def test_a_share_reaches_from_above_nothing_to_the_whole_set(open_tiny: Open) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FinetuneConfig, "finetune")
    config = parser.instantiate_classes(parser.parse_args(["--finetune.fractions", "[0.1, 1]"])).finetune
    with pytest.raises(ArgumentError, match=r"fractions"):
        parser.parse_args(["--finetune.fractions", "[1.1]"])
    _, probe = open_tiny()
    images = train_images(probe)
    arms = {arm.name: arm.numbers for arm in plan_arms(config, images, seed=0)}
    assert list(arms) == ["10%", "100%", "scratch/10%", "scratch/100%"] and arms["100%"] == tuple(range(72))
    with pytest.raises(InputError, match="above 0"):
        plan_arms(FinetuneConfig(fractions=[0.5, 0.0]), images, seed=0)
    with pytest.raises(InputError, match=r"no training image of class .* of 10 classes"):
        plan_arms(FinetuneConfig(fractions=[0.5]), train_images(dataclasses.replace(probe, max_train=4)), seed=0)


def counted(monkeypatch: pytest.MonkeyPatch, *, kill_at: int = 10**6) -> list[str]:
    """Names of the arms that are trained from now on; the process is killed in training number `kill_at`."""
    names: list[str] = []
    train = finetune_module._train

    def counting(model: Any, arm: finetune_module.Arm, *rest: Any) -> None:
        if len(names) == kill_at:
            raise KeyboardInterrupt
        names.append(arm.name)
        train(model, arm, *rest)

    monkeypatch.setattr(finetune_module, "_train", counting)
    return names


def test_a_finished_arm_is_not_trained_again(open_tiny: Open) -> None:
    """Killed in the third of four arms; another encoder of the architecture shares those from random weights."""
    subject, probe = open_tiny(finetune=FinetuneConfig(fractions=[0.2, 1.0], epochs=1))
    names = ["20%", "100%", "scratch/20%", "scratch/100%"]

    def trained(subject: Subject = subject, probe: ProbeConfig = probe) -> tuple[dict[str, float], list[str]]:
        with pytest.MonkeyPatch.context() as patch:
            arms = counted(patch)
            return finetune(subject, probe).metrics, arms

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, kill_at=2)
        finetune(subject, probe)
    whole, arms = trained()
    assert arms == names[2:] and {name.removesuffix("/top1") for name in whole if name.endswith("top1")} == set(names)
    assert trained(dataclasses.replace(subject, cache=None)) == (whole, names)
    assert trained() == (whole, [])
    assert subject.cache is not None
    files = {json.loads(file.read_bytes())["arm"]: file for file in subject.cache.glob("finetune-*.json")}
    files["100%"].write_bytes(files["100%"].read_bytes()[:-9])
    assert trained() == (whole, ["100%"])
    assert trained(dataclasses.replace(subject, hash="0" * 64)) == (whole, names[:2])
    longer = dataclasses.replace(probe, finetune=FinetuneConfig(fractions=[0.2], epochs=2))
    assert trained(probe=longer)[1] == ["20%", "scratch/20%"]


def test_dropout_draws_from_the_probes_seed(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was drawn before, on whichever rank; and nothing that comes after notices."""
    subject, probe = open_tiny(finetune=FinetuneConfig(fractions=[0.2], epochs=1, scratch=False))
    subject = dataclasses.replace(subject, cache=None)
    found: list[torch.Tensor] = []
    accuracies = finetune_module.accuracies

    def spied(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        found.append(scores)
        return accuracies(scores, labels)

    monkeypatch.setattr(finetune_module, "accuracies", spied)
    finetune(subject, probe)
    subject.backbone.drop_rate = 0.5
    for global_seed, seed in ((1, 0), (2, 0), (2, 3)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        finetune(subject, dataclasses.replace(probe, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    plain, first, second, other = found
    assert torch.equal(first, second) and not torch.equal(first, plain) and not torch.equal(first, other)


def test_progress_is_shown_while_an_arm_trains(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.progress.PLAIN_INTERVAL_S", 0.0)
    subject, probe = open_tiny(finetune=FinetuneConfig(fractions=[0.5], epochs=3, batch_size=16, scratch=False))
    finetune(subject, probe)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune 50%: ")]
    assert lines[3].startswith("finetune 50%: 4/6 (") and "epoch 2/3 loss " in lines[3] and "ETA" in lines[3]


def test_unreadable_validation_images_are_left_out_and_counted(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, probe = open_tiny(finetune=FinetuneConfig(fractions=[0.2], epochs=1, scratch=False))
    lines: list[str] = []
    subject = dataclasses.replace(subject, report=lines.append, cache=None)
    read, broken = ShardImages.read, {3, 5}

    def damaged(self: ShardImages, number: int) -> tuple[np.ndarray, int]:
        if self.name == str(probe.val) and number in broken:
            raise ValueError("damaged")
        return read(self, number)

    monkeypatch.setattr(ShardImages, "read", damaged)
    finetune(subject, probe)
    assert any("2 of 40 samples unreadable" in line for line in lines)
    broken.update(range(40))
    with pytest.raises(InputError, match="no labelled sample can be read"):
        finetune(subject, probe)
