"""How well predicted attention agrees with where people looked."""

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from pretrain.evaluators.attention_maps import Densities, feature_norm, grad_cam, has_feature_map, open_readout
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.cache import Outputs
from pretrain.evaluators.features import collect
from pretrain.evaluators.gaze_rows import GazeRows, means
from pretrain.evaluators.linear_probe import fit_on
from pretrain.evaluators.prepare import CentreCrop
from pretrain.evaluators.reading import UNREADABLE, Job
from pretrain.evaluators.sources import ShardImages, train_images
from pretrain.evaluators.subjects import state_hash
from pretrain.probe_config import ProbeConfig
from shards.gaze import GazeTarget, load_targets
from shards.reader import ShardSet


def alignment(subject: Subject, probe: ProbeConfig) -> Result:
    """Score the attention head, or a read-out trained on the frozen encoder where it has none, against human gaze.

    Metrics, means over the images of the gaze shards with at least one fixation: `nss`, `kld`, `cc`, `sim`,
    `auc_judd`, `auc_borji`, `auc_shuffled`, `information_gain` (over the centre bias), `spearman`; the same with
    `feature_norm/` and `grad_cam/` in front for those maps, and with `uniform/`, `centre_bias/`, `one_human/`,
    `split_half/` for what needs no model. `num_images` were scored, `num_skipped` were not.

    Raises:
        InputError: shards without gaze, or no labels to train a read-out from.
    """
    options = probe.gaze_options
    images, targets = gaze_set(probe)
    readout, origin = open_readout(subject, probe)
    rows = GazeRows(targets, stride=options.stride, negatives=options.negatives, seed=probe.seed)
    predicted = _predict(
        subject, probe, images, lambda x: readout.densities(subject.backbone, x), key=f"readout-{state_hash(readout)}"
    )
    densities = _of_targets(predicted, targets, images)
    values = rows.score_each(densities)
    scored = int(np.isfinite(values["nss"]).sum())
    metrics = means(values) | {"num_images": float(scored), "num_skipped": float(len(images) - scored)}
    protocol = {
        "gaze": {"samples": len(images), "scored": scored, "digest": images.digest},
        "map": origin,
        "stride": options.stride,
        "negatives": options.negatives,
        "seed": probe.seed,
    }
    for name, make, key in _other_maps(subject, probe, protocol):
        found = _predict(subject, probe, images, make, key=key)
        scores = means(rows.score_each(_of_targets(found, targets, images)))
        metrics |= {f"{name}/{metric}": value for metric, value in scores.items()}
    if "baselines" in options.rows:
        for row, scores in rows.baselines(subject.cache, digest=images.digest).items():
            metrics |= {f"{row}/{metric}": value for metric, value in scores.items()}
    table = {name: [float(v) for v in each] for name, each in values.items() if np.isfinite(each).all()}
    maps = {target.key: density.numpy() for target, density in zip(targets, densities, strict=True)}
    return Result(metrics, protocol, maps=maps, tables={"by_image": table})


def gaze_set(probe: ProbeConfig) -> tuple[ShardImages, list[GazeTarget]]:
    """The images with gaze that are used, and the targets among them with a fixation inside.

    Raises:
        InputError: shards without gaze.
    """
    shards = ShardSet(probe.gaze)
    targets = load_targets(shards)
    images = ShardImages(shards, limit=probe.max_gaze)
    places = {images.place(number) for number in range(len(images))}
    chosen = [target for target in targets if (target.shard, target.row) in places and target.num_inside]
    if not chosen:
        raise InputError(f"{probe.gaze}: none of the {len(images)} images used has a fixation: raise max_gaze")
    return images, chosen


def _of_targets(outputs: Outputs, targets: list[GazeTarget], images: ShardImages) -> list[Tensor]:
    """The density of each target; the uniform one where its image could not be read."""
    numbers = {images.place(number): number for number in range(len(images))}
    maps, labels = outputs["maps"], outputs["labels"]
    flat = torch.full(maps.shape[1:], 1 / maps[0].numel())
    chosen = [numbers[target.shard, target.row] for target in targets]
    return [maps[number] if labels[number] != UNREADABLE else flat for number in chosen]


def _predict(subject: Subject, probe: ProbeConfig, images: ShardImages, densities: Densities, *, key: str) -> Outputs:
    """Densities of whole images, squeezed to the encoder's square input."""
    prepare = CentreCrop(subject.image_size, 0.0)
    return collect(subject, probe, Job(images, prepare, lambda x: {"maps": densities(x)}, key, "attention maps"))


def _other_maps(subject: Subject, probe: ProbeConfig, protocol: dict[str, object]) -> list[tuple[str, Densities, str]]:
    """Maps to score beside the predicted attention: name, densities, key; the protocol says what was left out."""
    rows = probe.gaze_options.rows
    found: list[tuple[str, Densities, str]] = []
    if "feature_norm" in rows:
        found.append(("feature_norm", feature_norm(subject), "feature-norm"))
    if "grad_cam" in rows:
        try:
            train = train_images(probe)
        except InputError as error:
            protocol["grad_cam"] = f"left out: {error}"
            return found
        if len(train.classes) < 2 or not has_feature_map(subject):
            why = "the training shards have no classes" if len(train.classes) < 2 else "no convolutional feature map"
            protocol["grad_cam"] = f"left out: {why}"
            return found
        head = fit_on(subject, probe, train)
        key = f"grad-cam-{train.digest}-{vars(probe.linear)}-{probe.seed}-{probe.crop}"
        found.append(("grad_cam", grad_cam(subject, head), key))
        protocol["grad_cam"] = f"of a linear probe on {len(train)} images"
    return found


evaluator = Evaluator("alignment", needs=("gaze",), run=alignment, prefix="attention")
