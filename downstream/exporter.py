"""Surrogates of image shards as a label set, which everything that reads a teacher's labels reads as well."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from downstream.config import DownstreamConfig
from downstream.export_config import ExportConfig
from downstream.pipeline import mine_rows
from downstream.stage import FIRST_STEP, best_weights, read_stage_config
from downstream.surrogates import SurrogateStore
from downstream.tasks.images import ImageExamples, ImageTask, read_images
from engine.errors import InputError
from engine.files import sha256_of
from engine.progress import ProgressBar, report
from engine.runs import RunFolder
from shards.labels import encode_label, label_directory, seal_labels, write_label_shard


def export(config: ExportConfig) -> Path:
    """Write the surrogates of `config.run`, on the attention's own grid, as label shards beside its training shards.

    Those of images that were not trained on (held out, or left out by `data.limit`) are mined now, so that the label
    set lacks nothing but images that cannot be read. A second call completes what a killed one left and changes nothing
    else.

    Returns:
        The folder of the label set.

    Raises:
        InputError: the run is no first step of an image task, its surrogates are not complete, or the images have
            changed.
    """
    run = RunFolder(config.run)
    settings = read_stage_config(run)
    if settings.task != "cifar10" or settings.arm != FIRST_STEP:
        raise InputError(
            f"{run.path} is {settings.arm} of task '{settings.task}': give the {FIRST_STEP} of an image task "
            f"(cifar10), whose surrogates belong to images in shards"
        )
    task = ImageTask(settings)
    store = SurrogateStore(run.path / "surrogates" / "image")
    known = dict(zip(task.train.keys, store.load(task.train.keys).maps.numpy(), strict=True))
    digest = sha256_of(store.manifest_file)  # which names model, data and the parts' hashes
    directory = label_directory(config.output, digest)
    every = read_images(task.shards, size=settings.image.size, seed=0, limit=None)
    with ProgressBar(len(every), f"labels of {run.name}") as bar:
        for shard in range(task.shards.manifest.num_shards):
            part = every.part(np.flatnonzero(every.places[:, 0] == shard))
            maps = known | _mined(task, run, part, known)
            labels = ((key, encode_label(maps[key])) for key in part.keys)
            write_label_shard(directory, task.shards, shard, labels)
            bar.update(len(part))
    size = list(next(iter(known.values())).shape)
    seal_labels(directory, task.shards, teacher=_teacher(run, settings, digest), settings={"size": size})
    report(f"{directory}: sealed, {len(every)} of {task.shards.num_samples} images have a surrogate")
    return directory


def _mined(task: ImageTask, run: RunFolder, part: ImageExamples, known: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Maps by key of the images of `part` that are not among the `known`."""
    rows = np.array([row for row, key in enumerate(part.keys) if key not in known], dtype=np.int64)
    if not len(rows):
        return {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = task.build_model()
    model.load_state_dict(best_weights(run))
    found = mine_rows(task, model.to(device).eval(), part, rows, modality="image", device=device)
    return {part.keys[row]: maps for row, maps in zip(rows.tolist(), found.maps.cpu().numpy(), strict=True)}


def _teacher(run: RunFolder, settings: DownstreamConfig, digest: str) -> dict[str, Any]:
    """What the manifest says about where the maps come from."""
    image = settings.image
    return {
        "hash": digest,
        "kind": "surrogates mined from the model itself (Patro et al., 2021)",
        "run": run.name,
        "task": settings.task,
        "masks": {"count": image.num_masks, "scale": image.mask_scale, "seed": image.mask_seed},
        "metrics": run.read_summary().get("metrics", {}),
    }
