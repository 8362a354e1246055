"""Train captioners, one run per arm and seed: epoch chosen on held-out images, test captions written and scored."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from downstream.arms import named_arms
from downstream.captioning.beam import search
from downstream.captioning.building import map_of
from downstream.captioning.correctness import Correctness
from downstream.captioning.data import CaptionTask
from downstream.captioning.examples import Part
from downstream.captioning.layouts import read_captions
from downstream.captioning.metrics import check_installed, simple_scores
from downstream.captioning.models.base import Captioner
from downstream.captioning.objective import ARMS, BASELINE, CaptionObjective, word_losses
from downstream.captioning.objects import known_images, open_objects
from downstream.captioning.scoring import WORDS, finish_scores, needs_scores, write_captions
from downstream.captioning.table import write_caption_table
from downstream.config import DownstreamConfig
from downstream.data import ExampleDataset, rows_of_rank, training_batches
from downstream.stage import BEST, best_weights, check_finished, stage_folder, stage_plan
from downstream.tasks.features import open_encoder
from engine.environment import environment
from engine.errors import InputError
from engine.files import atomic_write
from engine.launch import build_accelerator, refuse_zero3
from engine.loop import Training, fit, start_training
from engine.program import config_to_dict
from engine.ranks import Ranks
from engine.runs import RunFolder, check_run_name
from engine.state import unwrap

IMAGES_AT_ONCE = 64
CAPTIONS_AT_ONCE = 128
IDENTITY = ("sha256", "sizes", "objects", "encoder_sha256")  # facts that say what a run was trained on
# A finished run may be scored where files lie elsewhere; what is in them is in the facts.
FREE_PATHS = frozenset(
    {"image.encoder", "caption.max_skipped"}
    | {f"caption.{name}" for name in ("captions", "images", "split", "objects", "object_names", "object_images")}
    | {f"caption.{name}" for name in ("synonyms", "weights", "cache")}
)


def run_captioning(config: DownstreamConfig) -> dict[tuple[str, int], dict[str, float]]:
    """Run every arm and seed of `config` and write their table; what is complete on disk is taken from there.

    Returns:
        Metrics by (arm, seed).

    Raises:
        InputError: DeepSpeed ZeRO 3; see also `arms_of`, `CaptionTask` and `train_captioner`.
    """
    check_run_name(config.run)
    check_installed()
    arms = arms_of(config)
    accelerator = build_accelerator(precision=config.precision, seed=config.seed)
    refuse_zero3(accelerator, what="captioning")
    ranks = Ranks()
    task = CaptionTask(config)
    results: dict[tuple[str, int], dict[str, float]] = {}
    for seed in range(config.seed, config.seed + config.seeds):
        for arm in arms:
            run = train_captioner(task, config, arm=arm, seed=seed, ranks=ranks)
            results[arm, seed] = run.read_summary()["metrics"]
    ranks.on_main(lambda: write_caption_table(config, task, results))
    return results


def check_captioning(config: DownstreamConfig) -> list[str]:
    """What `--check` prints: arms, images and captions, encoder and object masks, without computing a feature.

    Raises:
        InputError: see `arms_of` and `CaptionTask`.
    """
    check_installed()
    lines = [f"arms: {', '.join(arms_of(config))}"]
    found = read_captions(config.caption, config.data.path)
    parts = ", ".join(f"{len(images)} {part}" for part, images in found.parts.items())
    skipped = sum(found.skipped_images.values()), sum(found.skipped_captions.values())
    lines.append(f"images: {parts}; left out: {skipped[0]} images, {skipped[1]} captions ({found.facts['split']})")
    subject = open_encoder(config.image, weights=config.caption.weights, ranks=Ranks())
    channels, grid = map_of(subject, size=config.image.size)
    lines.append(f"encoder: {subject.name}, {channels} channels on {grid[0]}x{grid[1]} places")
    if config.caption.objects is not None:
        source = open_objects(config.caption, remote=config.data.remote)
        known = known_images(source, [image for images in found.parts.values() for image in images])
        lines.append(f"objects: {len(source.categories)} classes, for {len(known)} of the images with captions")
    return lines


def arms_of(config: DownstreamConfig) -> list[str]:
    """The arms that `config.arm` names.

    Raises:
        InputError: an arm that does not exist, or one that needs object masks where none are given.
    """
    chosen = named_arms(config, ARMS)
    if config.caption.objects is None and chosen != [BASELINE]:
        raise InputError(f"arm '{config.arm}' needs object masks: set caption.objects, or take arm {BASELINE} alone")
    return chosen


def train_captioner(task: CaptionTask, config: DownstreamConfig, *, arm: str, seed: int, ranks: Ranks) -> RunFolder:
    """Train one run, or go on with it; a finished one is left as it is, but for scores that could not be computed then.

    Raises:
        InputError: see `start_training` and `check_finished`; Requeue: stopped on request with a checkpoint.
    """
    run = stage_folder(config, arm=arm, seed=seed)
    if ranks.broadcast(bool(run.read_summary())):
        resolved = _resolved(config, arm=arm, seed=seed)
        ranks.on_main(lambda: check_finished(run, resolved, task.facts, names=IDENTITY, free=FREE_PATHS))
        if ranks.broadcast(needs_scores(run)):
            ranks.on_main(lambda: finish_scores(run))
        return run
    accelerator = build_accelerator(precision=config.precision, seed=seed)
    model = task.build_model()
    num_samples = len(task.train.captions)
    plan = stage_plan(config, epochs=config.epochs, num_samples=num_samples, world_size=ranks.world_size)
    training = start_training(
        model,
        accelerator=accelerator,
        ranks=ranks,
        run=run,
        config=config,
        resolved=_resolved(config, arm=arm, seed=seed),
        batch_size=config.data.batch_size,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
        identity={"data": str([task.facts[name] for name in IDENTITY])},
    )
    with training:
        ranks.on_main(lambda: task.vocabulary.write(run.path / WORDS))
        _learn(training, task, config, arm=arm, seed=seed, every=math.ceil(plan.steps_per_epoch))
        _finish(training, task, config, arm=arm, seed=seed)
    return run


def _learn(training: Training, task: CaptionTask, config: DownstreamConfig, *, arm: str, seed: int, every: int) -> None:
    start, ranks, device = training.resume(), training.ranks, training.accelerator.device
    train, val = task.train, task.val
    if device.type == "cuda" and not config.loop.num_workers:
        train, val = train.to(device), val.to(device)  # no step waits for a copy
    objective = CaptionObjective(training.module, arm, config.caption, ranks, device)
    batches = training_batches(
        ExampleDataset(train.captions, maps={}, use={}),
        count=len(train.captions),
        batch_size=config.data.batch_size,
        seed=seed,
        num_workers=config.loop.num_workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start,
        stop_step=training.total_steps,
    )
    fit(training, batches, objective, start_step=start, hooks=[(every, Choice(training, task, val, config))])


class Choice:
    """After every epoch: the score of the held-out captions; the first epoch of the best is kept."""

    def __init__(self, training: Training, task: CaptionTask, val: Part, config: DownstreamConfig) -> None:
        self.training, self.task, self.val, self.config = training, task, val, config

    def __call__(self, step: int) -> None:
        """Score, log, and keep the weights if they are the best so far."""
        training, by = self.training, self.config.caption.choose_by
        model = plain_model(training.module)
        metrics = {"loss": mean_word_loss(model, self.val, training=training)}
        if by != "loss":
            written = write_all(model, self.task, self.val, training=training, beam=1, config=self.config)
            references = {image.name: list(image.captions) for image in self.val.images}
            metrics |= training.ranks.broadcast(simple_scores(written, references) if training.ranks.is_main else {})
        score = -metrics["loss"] if by == "loss" else metrics[by]
        if training.ranks.is_main:
            assert training.tracker is not None
            training.tracker.log({f"held_out/{name}": value for name, value in metrics.items()}, step=step)
            training.report(f"after step {step}: held-out {by} {metrics[by]:.4f}")
        best = training.extra.get("best")
        if best is None or score > best["score"]:
            training.extra["best"] = {"score": score, "step": step, "value": metrics[by]}
            weights = training.weights()
            if training.ranks.is_main:
                atomic_write(training.run.path / BEST, save({name: w.contiguous() for name, w in weights.items()}))


def plain_model(module: nn.Module) -> Captioner:
    """The captioner without the launcher's wrapping."""
    model = unwrap(module)
    assert isinstance(model, Captioner)
    return model


@torch.inference_mode()
def mean_word_loss(model: Captioner, part: Part, *, training: Training) -> float:
    """Mean cross entropy of a word of the part's captions, in nats. Every rank must call it."""
    sums = np.zeros(2)
    captions, device = part.captions, training.accelerator.device
    for rows in _parts(len(captions), training, CAPTIONS_AT_ONCE):
        inputs = {name: value.to(device) for name, value in captions.inputs(rows).items()}
        total, count = word_losses(model(inputs).logits, inputs["tokens"])
        sums += (float(total), int(count))
    total_sum, total_count = np.sum(training.ranks.gather(sums), axis=0)
    return float(total_sum / max(total_count, 1))


def write_all(
    model: Captioner, task: CaptionTask, part: Part, *, training: Training, beam: int, config: DownstreamConfig
) -> dict[str, str]:
    """A caption for every image of the part, by its name. Every rank must call it."""
    caption, device = config.caption, training.accelerator.device
    written: dict[str, str] = {}
    for rows in _parts(len(part.images), training, IMAGES_AT_ONCE):
        inputs = {name: value.to(device) for name, value in part.pictures.inputs(rows).items()}
        found = search(model, inputs, beam=beam, max_words=caption.max_words, length_penalty=caption.length_penalty)
        for row, tokens in zip(rows.tolist(), found.tokens.tolist(), strict=True):
            written[part.images[row].name] = " ".join(task.vocabulary.decode(tokens))
    return {name: text for piece in training.ranks.gather(written) for name, text in piece.items()}


@torch.inference_mode()
def attention_correctness(model: Captioner, part: Part, *, training: Training) -> Correctness:
    """The maps of all words that name a detected object, under teacher forcing. Every rank must call it."""
    found, captions, device = Correctness(), part.captions, training.accelerator.device
    for rows in _parts(len(captions), training, CAPTIONS_AT_ONCE):
        inputs = captions.inputs(rows)
        maps = model({name: value.to(device) for name, value in inputs.items()}).maps.float().cpu().numpy()
        for i, j in (inputs["positions"] >= 0).nonzero().tolist():
            found.add(maps[i, int(inputs["positions"][i, j])], inputs["coverage"][i, j].numpy())
    merged = Correctness()
    merged.extend(training.ranks.gather(found))
    return merged


def _parts(count: int, training: Training, size: int) -> list[np.ndarray]:
    ranks = training.ranks
    return rows_of_rank(count, rank=ranks.rank, world_size=ranks.world_size, size=size)


def _finish(training: Training, task: CaptionTask, config: DownstreamConfig, *, arm: str, seed: int) -> None:
    """Captions, attention and scores of the best epoch's weights on the test images."""
    training.ranks.barrier()
    model = plain_model(training.module)
    model.load_state_dict(best_weights(training.run))
    model.eval()
    test = task.test
    written = write_all(model, task, test, training=training, beam=config.caption.beam, config=config)
    attention = attention_correctness(model, test, training=training)

    def write() -> None:
        best = training.extra["best"]
        write_captions(training.run, written, {image.name: list(image.captions) for image in test.images})
        metrics: dict[str, Any] = {
            f"held_out/{config.caption.choose_by}": best["value"],
            "best_step": best["step"],
            **attention.metrics(),
        }
        protocol = {
            "arm": arm,
            "seed": seed,
            "epochs": config.epochs,
            "beam": config.caption.beam,
            "commit": environment()["commit"],
        }
        finish_scores(training.run, more=metrics, step=training.total_steps, data=task.facts, protocol=protocol)
        found = training.run.read_summary()["metrics"]
        training.report(
            f"{training.run.name}: test BLEU-4 {found['test/bleu4']:.4f}, CIDEr {found['test/cider']:.4f} "
            f"(best epoch ends at step {best['step']})"
        )

    training.ranks.on_main(write)


def _resolved(config: DownstreamConfig, *, arm: str, seed: int) -> dict[str, Any]:
    """The config of one run: what the table adds around it, and what captioning does not read, is left out."""
    dropped = ("arms", "seeds", "retrain_epochs", "first", "restart", "text", "vqa", "supervision")
    values = config_to_dict(replace(config, arm=arm, seed=seed))
    return {key: value for key, value in values.items() if key not in dropped}
