"""Semi-supervised fine-tuning: the whole encoder on a few labelled images, beside the same from random weights."""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.errors import InputError
from engine.files import write_json
from engine.loading import make_loader
from pretrain.encoder import feature_width
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.cache import key_digest
from pretrain.evaluators.classes import class_labels, unseen_classes
from pretrain.evaluators.features import open_bar
from pretrain.evaluators.linear_probe import accuracies, pair_protocol
from pretrain.evaluators.prepare import CentreCrop, RandomView
from pretrain.evaluators.reading import READ_AHEAD, Order, Prepared, to_inputs
from pretrain.evaluators.sources import ShardImages, labelled_pair
from pretrain.evaluators.subjects import untrained
from pretrain.probe_config import FinetuneConfig, ProbeConfig
from shards.keys import make_key

MOMENTUM = 0.9


Scores = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """One training: from which weights, on which images (numbers in the training set)."""

    name: str
    scratch: bool
    numbers: tuple[int, ...]


def finetune(subject: Subject, probe: ProbeConfig) -> Result:
    """Fine-tune all weights on a share of the training images and measure on the validation images.

    Metrics, percent: `<share>/top1`, with more than five classes `<share>/top5`, and `scratch/<share>/top1` of the same
    training from random weights; a share is `1%`, `100%` or the name of a list. Each arm is trained by one rank under
    the probe's seed, so the result does not depend on their number. A finished arm is kept in the cache and not trained
    again; one from random weights serves all encoders of its architecture.

    SimCLR (appendix B.5) fine-tunes with Nesterov momentum, learning rate 0.05 * batch / 256, crop and flip, no weight
    decay, 60 epochs for 1 % and 30 for 10 %; the new classifier's higher rate is our choice.

    Raises:
        InputError: shares or lists that leave a class without an image, a list that names unknown images.
    """
    config = probe.finetune
    train, val = labelled_pair(probe)
    arms = plan_arms(config, train, seed=probe.seed)
    found = _scores(arms, subject, probe, train, val)
    metrics = {f"{arm.name}/{name}": value for arm in arms for name, value in found[arm.name].items()}
    protocol = pair_protocol(probe, train, val) | {
        "images": {arm.name: len(arm.numbers) for arm in arms},
        "lists": [path.name for path in config.lists],
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "learning_rate": config.lr,
        "head_learning_rate": config.lr * config.head_lr,
    }
    return Result(metrics, protocol, note=f"lr {config.lr:g}, {config.epochs} epochs")


def plan_arms(config: FinetuneConfig, train: ShardImages, *, seed: int) -> list[Arm]:
    """The trainings that the options ask for, fine-tuned ones first.

    Raises:
        InputError: see `finetune`.
    """
    if config.lists:
        chosen = {path.stem: read_list(path, train) for path in config.lists}
    else:
        if 0 in config.fractions:
            raise InputError("finetune.fractions: 0 is no share of the training set: give shares above 0, 1 for all")
        labels = class_labels(train.shards)[train.numbers]
        chosen = {f"{100 * share:g}%": stratified(labels, share=share, seed=seed) for share in config.fractions}
    if not chosen:
        raise InputError("finetune: neither fractions nor lists are given")
    for name, numbers in chosen.items():
        _check_classes(train, numbers, where=f"finetune.lists '{name}'" if config.lists else train.name)
    arms = [Arm(name, False, tuple(numbers)) for name, numbers in chosen.items()]
    return arms + ([Arm(f"scratch/{arm.name}", True, arm.numbers) for arm in arms] if config.scratch else [])


def stratified(labels: np.ndarray, *, share: float, seed: int) -> list[int]:
    """`share` of each class's images, rounded, at least one; a smaller share under the same seed is a part of a larger.

    Args:
        labels: `(num_images,)`, -1 for none.
    """
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in np.unique(labels[labels >= 0]):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen += members[: max(1, round(share * len(members)))].tolist()
    return sorted(chosen)


def _check_classes(train: ShardImages, numbers: list[int], *, where: str) -> None:
    empty = unseen_classes(train.shards, train.numbers[numbers])
    if empty:
        count = f"{len(empty)} of {len(train.classes)}"
        raise InputError(
            f"{where}: no training image of class '{empty[0]}' ({count} classes have none): give "
            "at least one of each (a longer list, a larger max_train, or a whole set)"
        )


def read_list(path: Path, images: ShardImages) -> list[int]:
    """Numbers of the images that a list names: a key or file name a line, with or without its folder.

    Raises:
        InputError: no such list, an empty one, a name that is unknown or stands for several images.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"finetune.lists {path}: cannot be read ({error}): give a text file") from error
    keys = [key for shard in range(len(images.shards.shard_sizes)) for key in images.shards.keys(shard)]
    used = {int(position): number for number, position in enumerate(images.numbers)}
    numbers: dict[str, list[int]] = {}
    for position, number in used.items():
        key = keys[position]
        for name in {key, key.rsplit("/", 1)[-1]}:
            numbers.setdefault(name, []).append(number)
    chosen = []
    for line in lines:
        key = make_key(line)
        found = numbers.get(line) or numbers.get(key) or numbers.get(key.rsplit("/", 1)[-1]) or []
        if len(found) != 1:
            why = "is no training image" if not found else f"names {len(found)} training images"
            raise InputError(f"finetune.lists {path}: '{line}' {why}: give keys of the training set, one a line")
        chosen.append(found[0])
    if not chosen:
        raise InputError(f"finetune.lists {path}: no names in it")
    return sorted(set(chosen))


def _scores(
    arms: list[Arm], subject: Subject, probe: ProbeConfig, train: ShardImages, val: ShardImages
) -> dict[str, Scores]:
    """The numbers of every arm by its name, kept or trained for; as many arms at a time as there are ranks."""
    ranks = subject.ranks
    floor = untrained(subject, seed=probe.seed) if any(arm.scratch for arm in arms) else subject
    starts = {arm.name: floor if arm.scratch else subject for arm in arms}
    files = {arm.name: _file(arm, starts[arm.name], probe, train, val) for arm in arms} if subject.cache else {}
    # rank 0 says what is left to do: jobs of an array write at any time, and the ranks must do the same
    found: dict[str, Scores] = ranks.broadcast({name: kept for name, path in files.items() if (kept := _read(path))})
    missing = [arm for arm in arms if arm.name not in found]
    for turn in range(0, len(missing), ranks.world_size):
        own: dict[str, Scores] = {}
        for arm in missing[turn:][ranks.rank : ranks.rank + 1]:
            # dropout and stochastic depth draw from the global generators, which differ from rank to rank
            with torch.random.fork_rng([subject.device] if subject.device.type == "cuda" else []):
                torch.manual_seed(probe.seed)
                own[arm.name] = _run_arm(arm, starts[arm.name], probe, train, val)
            if files:
                write_json(files[arm.name], {"arm": arm.name, "images": len(arm.numbers), "metrics": own[arm.name]})
        for part in ranks.gather(own):
            found |= part
        for arm in missing[turn : turn + ranks.world_size]:
            subject.report(f"finetune: {arm.name}, {len(arm.numbers)} images: top1 {found[arm.name]['top1']:.2f}")
    return found


def _file(arm: Arm, start: Subject, probe: ProbeConfig, train: ShardImages, val: ShardImages) -> Path:
    """Where the numbers of an arm are kept; its name tells all that decides them."""
    assert start.cache is not None
    start.cache.mkdir(parents=True, exist_ok=True)
    config, model = probe.finetune, start.config.model
    key = {
        "encoder": start.hash,
        # weights alone do not tell of dropout and strides
        "architecture": [model.backbone, model.backbone_options, model.cifar_stem],
        "train": train.digest,
        "val": val.digest,
        "images": key_digest(arm.numbers),
        "training": [config.epochs, config.batch_size, config.lr, config.head_lr],
        "options": [probe.crop, probe.seed, start.image_size, start.statistics],
    }
    return start.cache / f"finetune-{key_digest(key)[:32]}.json"


def _read(path: Path) -> Scores:
    """The kept numbers of an arm; empty where they are absent or damaged."""
    try:
        found = {str(name): float(value) for name, value in json.loads(path.read_bytes())["metrics"].items()}
        return found if "top1" in found else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _run_arm(arm: Arm, subject: Subject, probe: ProbeConfig, train: ShardImages, val: ShardImages) -> Scores:
    model = _Classifier(copy.deepcopy(subject.backbone), len(train.classes)).to(subject.device)
    with torch.enable_grad():
        _train(model, arm, subject, probe, train)
    model.eval()
    dataset = Prepared(val, CentreCrop(subject.image_size, probe.crop), size=subject.image_size)
    size = min(probe.batch_size, READ_AHEAD)
    orders = [Order(list(range(i, min(i + size, len(val))))) for i in range(0, len(val), size)]
    scores, labels = [], []
    with torch.no_grad():
        for pixels, answers in make_loader(dataset, orders, num_workers=min(probe.num_workers, len(orders))):
            scores.append(model(to_inputs(pixels, subject)).cpu()[answers >= 0])
            labels.append(answers[answers >= 0])
    usable = torch.cat(labels)
    if not len(usable):
        raise InputError(f"{val.name}: no labelled sample can be read; fine-tuning is measured on images with classes")
    if len(usable) < len(val):
        subject.report(f"{val.name}: {len(val) - len(usable)} of {len(val)} samples unreadable or unlabelled, left out")
    return accuracies(torch.cat(scores), usable)


def _train(model: nn.Module, arm: Arm, subject: Subject, probe: ProbeConfig, train: ShardImages) -> None:
    config = probe.finetune
    size = min(config.batch_size, len(arm.numbers))
    per_epoch = max(1, len(arm.numbers) // size)
    total = config.epochs * per_epoch
    rate = config.lr * size / 256
    groups = [
        {"params": model.backbone.parameters(), "scale": 1.0},  # type: ignore[union-attr]
        {"params": model.classifier.parameters(), "scale": config.head_lr},  # type: ignore[union-attr]
    ]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)
    # one loader for all epochs: each view is drawn from its order's seed, epoch and image
    prepare = [RandomView(subject.image_size, probe.seed, epoch) for epoch in range(config.epochs)]
    rng = np.random.default_rng(probe.seed)
    orders = []
    for view in prepare:
        order = rng.permutation(arm.numbers)
        orders += [Order(order[i * size : (i + 1) * size].tolist(), view) for i in range(per_epoch)]
    dataset = Prepared(train, prepare[0], size=subject.image_size)
    loader = make_loader(dataset, orders, num_workers=min(probe.num_workers, total))
    shown: dict[str, str] = {}
    with open_bar(total, f"finetune {arm.name}", shown=subject.ranks.is_main) as bar:
        for step, (pixels, labels) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"] * 0.5 * (1 + math.cos(math.pi * step / total))
            targets = labels.clamp(min=-1).to(subject.device, non_blocking=True)
            loss = functional.cross_entropy(model(to_inputs(pixels, subject)), targets, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % per_epoch == 0:
                shown = {"epoch": f"{(step + 1) // per_epoch}/{config.epochs}", "loss": f"{loss.item():.4f}"}
            bar.update(1, **shown)


class _Classifier(nn.Module):
    """A backbone in training mode with a linear classifier that starts at zero, so that no draw decides its start."""

    def __init__(self, backbone: Any, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(True).train()
        self.classifier = nn.Linear(feature_width(backbone), num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores `(batch, num_classes)`."""
        features = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
        return self.classifier(features)


evaluator = Evaluator("finetune", needs=("train", "val"), run=finetune)
