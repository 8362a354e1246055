"""How well predicted attention agrees with where people looked."""

import numpy as np

from engine.errors import InputError
from pretrain.evaluators.attention_maps import Densities, feature_norm, grad_cam, has_feature_map, open_readout
from pretrain.evaluators.base import Evaluator, Result, Subject
from pretrain.evaluators.cache import Outputs
from pretrain.evaluators.features import collect
from pretrain.evaluators.gaze_rows import GazeRows, emd_note, means
from pretrain.evaluators.linear_probe import fit_on, linear_protocol
from pretrain.evaluators.prepare import CentreCrop
from pretrain.evaluators.reading import UNREADABLE, Job
from pretrain.evaluators.sources import ShardImages, train_images
from pretrain.evaluators.subjects import state_hash
from pretrain.probe_config import ProbeConfig
from shards.gaze import GazeTarget, load_targets
from shards.reader import ShardSet


def alignment(subject: Subject, probe: ProbeConfig) -> Result:
    """Score the attention head, or a read-out trained on the frozen encoder where it has none, against human gaze.

    Metrics, means over the readable images of the gaze shards with at least one fixation: `nss`, `kld`, `cc`, `sim`,
    `auc_judd`, `auc_borji`, `auc_shuffled`, `information_gain` (over the centre bias), `spearman`, `emd` (where POT is
    installed); the same with `feature_norm/` and `grad_cam/` in front for those maps, and with `uniform/`,
    `centre_bias/`, `one_human/`, `split_half/` for what needs no model. `num_images` were
    scored, `num_skipped` were not.

    Raises:
        InputError: shards without gaze or without a readable image, or no labels to train a read-out from.
    """
    options = probe.gaze_options
    images, targets = gaze_set(probe)
    readout, made = open_readout(subject, probe)
    protocol: dict[str, object] = made | {"stride": options.stride, "negatives": options.negatives, "seed": probe.seed}
    maps = {
        name: _predict(subject, probe, images, densities, key=key)
        for name, densities, key in [
            ("", lambda x: readout.densities(subject.backbone, x), f"readout-{state_hash(readout)}"),
            *_other_maps(subject, probe, protocol),
        ]
    }
    targets, places = _readable(subject, images, targets, maps)
    rows = GazeRows(targets, stride=options.stride, negatives=options.negatives, seed=probe.seed)
    values = {name: rows.score_each(outputs["maps"][places]) for name, outputs in maps.items()}
    metrics = means(values[""]) | {"num_images": float(len(targets)), "num_skipped": float(len(images) - len(targets))}
    for name in maps:
        if name:
            metrics |= {f"{name}/{metric}": value for metric, value in means(values[name]).items()}
    if "baselines" in options.rows:
        for row, scores in rows.baselines(subject.cache, digest=images.digest).items():
            metrics |= {f"{row}/{metric}": value for metric, value in scores.items()}
    protocol |= {"gaze": {"samples": len(images), "scored": len(targets), "digest": images.digest}, "emd": emd_note()}
    table = {name: [float(v) for v in each] for name, each in values[""].items() if np.isfinite(each).all()}
    shown = {target.key: maps[""]["maps"][place].numpy() for target, place in zip(targets, places, strict=True)}
    return Result(metrics, protocol, maps=shown, tables={"by_image": table})


def gaze_set(probe: ProbeConfig) -> tuple[ShardImages, list[GazeTarget]]:
    """The images with gaze that are used, and the targets among them with a fixation inside.

    Raises:
        InputError: shards without gaze.
    """
    shards = ShardSet(probe.gaze, remote=probe.remote)
    targets = load_targets(shards)
    images = ShardImages(shards, limit=probe.max_gaze)
    places = {images.place(number) for number in range(len(images))}
    chosen = [target for target in targets if (target.shard, target.row) in places and target.num_inside]
    if not chosen:
        raise InputError(f"{probe.gaze}: none of the {len(images)} images used has a fixation: raise max_gaze")
    return images, chosen


def _readable(
    subject: Subject, images: ShardImages, targets: list[GazeTarget], maps: dict[str, Outputs]
) -> tuple[list[GazeTarget], list[int]]:
    """The targets whose image could be read, and their places among the images; the others are reported.

    Raises:
        InputError: none could be read.
    """
    numbers = {images.place(number): number for number in range(len(images))}
    found = [(target, numbers[target.shard, target.row]) for target in targets]
    kept = [(t, place) for t, place in found if all(each["labels"][place] != UNREADABLE for each in maps.values())]
    if not kept:
        raise InputError(f"{images.name}: none of the {len(found)} images with gaze can be read: pack them again")
    if len(kept) < len(found):
        subject.report(f"{images.name}: {len(found) - len(kept)} of {len(found)} images with gaze unreadable, left out")
    return [target for target, _ in kept], [place for _, place in kept]


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
        protocol["train"] = {"samples": len(train), "digest": train.digest}
        protocol |= {f"grad_cam_{name}": value for name, value in linear_protocol(probe, head).items()}
    return found


evaluator = Evaluator("alignment", needs=("gaze",), run=alignment, prefix="attention")
