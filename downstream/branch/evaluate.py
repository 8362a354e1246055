"""What a network is worth on a test set: top-1, top-5, maps, and insertion and deletion games; every image once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from attention.insertion import deletion_auc, insertion_auc
from attention.metrics import cc
from downstream.branch.config import BranchConfig
from downstream.branch.model import AttentionBranchNetwork
from downstream.branch.objective import true_class_score
from downstream.branch.pictures import PictureSet
from downstream.data import rows_of_rank
from engine.errors import InputError
from engine.files import atomic_write
from engine.progress import ProgressBar
from engine.ranks import Ranks

FILE = "evaluation.safetensors"
CURVES = ("insertion", "insertion_zero", "deletion")


def check_curves(names: list[str]) -> None:
    """Refuse games that do not exist."""
    unknown = [name for name in names if name not in CURVES]
    if unknown:
        raise InputError(f"branch.curves {unknown}: not known; take from {', '.join(CURVES)}")


@torch.inference_mode()
def evaluate(
    network: AttentionBranchNetwork,
    pictures: PictureSet,
    config: BranchConfig,
    *,
    curves: list[str],
    ranks: Ranks,
    autocast: Any,
    label: str,
) -> dict[str, Tensor]:
    """Test `network` on `pictures`, which lie on its device. Every rank must call it, and gets the same.

    Args:
        curves: games to play, of `CURVES`.
        autocast: makes the context of a forward, as the accelerator's.
        label: of the progress bar.

    Returns:
        By image, on the CPU: `score` of the true class, `top1` and `top5` (0 or 1), `predicted`, `map`
        `(images, rows, columns)` in (0, 1), `<game>` area in [0, 1] and `<game>_scores` `(images, steps + 1)`.
    """
    network.eval()
    found: dict[str, list[Tensor]] = {}
    parts = rows_of_rank(len(pictures), rank=ranks.rank, world_size=ranks.world_size, size=config.test_batch)
    with ProgressBar(sum(map(len, parts)), label) as bar:
        for rows in parts:
            for name, value in _evaluate_rows(network, pictures, rows, config, curves, autocast).items():
                found.setdefault(name, []).append(value.cpu())
            bar.update(len(rows))
    mine = {name: torch.cat(values) for name, values in found.items()}
    gathered = [part for part in ranks.gather(mine) if part]
    return {name: torch.cat([part[name] for part in gathered]) for name in gathered[0]}


def _evaluate_rows(
    network: AttentionBranchNetwork,
    pictures: PictureSet,
    rows: np.ndarray,
    config: BranchConfig,
    curves: list[str],
    autocast: Any,
) -> dict[str, Tensor]:
    batch = pictures.central(rows, share=config.test_crop)
    views = pictures.views(batch, size=config.size, grid=network.grid)
    with autocast():
        output = network(views.images)
    logits, maps = output.logits.float(), output.maps.float()
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == views.targets[:, None]
    found = {
        "score": true_class_score(logits, views.targets),
        "top1": best[:, 0].float(),
        "top5": best.any(dim=1).float(),
        "predicted": logits.argmax(1),
        "map": maps.half(),
    }
    if views.maps is not None:
        found["map_cc"] = torch.where(views.use > 0, cc(maps, views.maps), torch.nan)
    return found | play(network, views.images, maps, views.targets, curves=curves, config=config, autocast=autocast)


def play(
    network: AttentionBranchNetwork,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    curves: list[str],
    config: BranchConfig,
    autocast: Any,
) -> dict[str, Tensor]:
    """Insertion and deletion of a batch, as RISE defines them: the whole network's true-class probability.

    Args:
        images: `(batch, 3, size, size)` in [0, 1]; pixels are hidden by the blurred image, or by the mean colour,
            which is zero to the network.
        maps: `(batch, rows, columns)`.
    """
    assert isinstance(network.mean, Tensor)

    def score(changed: Tensor) -> Tensor:
        with autocast():
            return true_class_score(network(changed).logits, targets)

    grey = network.mean.expand_as(images)
    found: dict[str, Tensor] = {}
    for name in curves:
        if name == "deletion":
            curve = deletion_auc(score, images, maps, num_steps=config.insertion_steps, end=grey)
        else:
            start = grey if name == "insertion_zero" else None
            curve = insertion_auc(score, images, maps, num_steps=config.insertion_steps, start=start)
        found |= {name: curve.auc.float(), f"{name}_scores": curve.scores.half()}
    return found


def summarise(found: Mapping[str, Tensor], *, wrong: Tensor | None = None) -> dict[str, float]:
    """Means over the test set: top-1 and top-5 in percent, areas in [0, 1].

    Args:
        wrong: bool `(images,)`, those that the baseline misclassifies; areas over these alone are added.
    """
    metrics = {"test/top1": 100 * float(found["top1"].mean()), "test/top5": 100 * float(found["top5"].mean())}
    for name in CURVES:
        if name in found:
            metrics[f"test/{name}"] = float(found[name].mean())
            if wrong is not None and bool(wrong.any()):
                metrics[f"misclassified/{name}"] = float(found[name][wrong].mean())
    if "map_cc" in found and not bool(found["map_cc"].isnan().all()):
        metrics["test/map_cc"] = float(found["map_cc"].nanmean())
    return metrics


def write_evaluation(folder: Path, found: Mapping[str, Tensor]) -> None:
    """Keep what `evaluate` found."""
    atomic_write(folder / FILE, save({name: value.contiguous() for name, value in found.items()}))


def read_evaluation(folder: Path) -> dict[str, Tensor]:
    """What `write_evaluation` wrote."""
    return load_file(folder / FILE)
