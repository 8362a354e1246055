"""Measuring a teacher on held-out gaze: every sample on exactly one rank, the best kept on disk."""

import numpy as np
import torch
from torch import Tensor

from engine.environment import environment
from engine.loading import make_loader
from engine.loop import Training
from shards.gaze import METRICS, GazeTarget, load_targets, mean_scores, score_each
from shards.order import shard_rows_for_rank
from shards.reader import ShardSet
from teacher.average import Teacher
from teacher.config import Config
from teacher.data import GazeDataset
from teacher.model import SaliencyModel
from teacher.report import NUM_PICTURES, Predictions, evenly, side_by_side
from teacher.saved import save_teacher
from teacher.sources import GazeSet, GazeSets

LOWER_IS_BETTER = ("kld",)
SOFTWARE = ("python", "torch", "timm", "numpy")


class EarlyStop(Exception):
    """The teacher has not become better for long enough; the checkpoint is written."""


class Validation:
    """Scores the teacher on the validation set and keeps the best one in `runs/<name>/best/`.

    Called by the training loop with the number of steps done, on every rank.
    """

    def __init__(self, training: Training, config: Config, shards: ShardSet, *, sources: GazeSets) -> None:
        self.training, self.config, self.shards, self.sources = training, config, shards, sources
        self.targets = {(t.shard, t.row): t for t in load_targets(shards, sigma=config.data.sigma)}
        self.shown: Predictions = []
        training.extra.setdefault("best", None)
        training.extra.setdefault("num_since_best", 0)

    def __call__(self, step: int) -> None:
        """Score, report, keep the best, and stop where patience is over."""
        training, extra = self.training, self.training.extra
        teacher = training.accelerator.unwrap_model(training.module)
        with teacher.chosen() as model:
            means = self.score(model)
        if training.ranks.is_main:
            assert training.tracker is not None
            training.tracker.log({f"val/{name}": value for name, value in means.items()}, step=step)
            training.report(f"validation after step {step}: " + ", ".join(f"{n} {means[n]:.4f}" for n in METRICS))
            if self.config.loop.tracker == "wandb":
                self._send_pictures(step)
        if means["num_images"] and self._is_better(means[self.config.best_by]):
            extra.update(best=means[self.config.best_by], num_since_best=0)
            self._keep(step, means, teacher)
        else:
            extra["num_since_best"] += 1
        if 0 < self.config.patience <= extra["num_since_best"] and step < training.total_steps:
            extra["stopped_after"] = step
            training.save(step, last=True)
            raise EarlyStop

    def _is_better(self, value: float) -> bool:
        """Whether this is the best value so far; what is not a number never is."""
        best = self.training.extra["best"]
        if best is None:
            return bool(np.isfinite(value))
        return value < best if self.config.best_by in LOWER_IS_BETTER else value > best

    def score(self, model: SaliencyModel) -> dict[str, float]:
        """Means of the scores over the validation set; every rank must call it, and each scores its part."""
        ranks = self.training.ranks
        positions = shard_rows_for_rank(self.shards.shard_sizes, rank=ranks.rank, world_size=ranks.world_size)
        targets, densities = self.predict(model, [(e, s, r) for e, s, r in positions.tolist()])
        self.shown = evenly(list(zip(targets, densities, strict=True)), NUM_PICTURES)
        gathered = ranks.gather(score_each(targets, densities, stride=self.config.data.stride))
        means = mean_scores({name: np.concatenate([part[name] for part in gathered]) for name in METRICS})
        return means | {"num_skipped": self.shards.num_samples - means["num_images"]}

    def _send_pictures(self, step: int) -> None:
        """Image, human map and predicted map of some images that this rank has scored."""
        assert self.training.tracker is not None
        drawn = [side_by_side(self.shards, target, density) for target, density in self.shown]
        self.training.tracker.images("val/maps", drawn, captions=[t.key for t, _ in self.shown], step=step)

    def predict(
        self, model: SaliencyModel, positions: list[tuple[int, int, int]]
    ) -> tuple[list[GazeTarget], list[Tensor]]:
        """Targets with a fixation and readable image, and the densities `(rows, columns)` predicted for them."""
        config, accelerator = self.config, self.training.accelerator
        sigma = next(iter(self.targets.values())).sigma
        dataset = GazeDataset(GazeSets([GazeSet(self.shards, sigma)]), size=model.image_size, grid=(1, 1))
        size = config.data.batch_size
        parts = [positions[i : i + size] for i in range(0, len(positions), size)]
        loader = make_loader(dataset, parts, num_workers=min(config.loop.num_workers, len(parts)))
        targets, densities = [], []
        with torch.no_grad():
            for part, batch in zip(parts, loader, strict=True):
                with accelerator.autocast():
                    predicted = model(batch.images.to(accelerator.device)).exp().cpu()
                for i in batch.valid.nonzero().flatten().tolist():
                    targets.append(self.targets[part[i][1:]])
                    densities.append(predicted[i])
        return targets, densities

    def predict_all(self, model: SaliencyModel) -> Predictions:
        """Targets and densities of the whole set, on one rank."""
        positions = shard_rows_for_rank(self.shards.shard_sizes, rank=0, world_size=1)
        targets, densities = self.predict(
            model.to(self.training.accelerator.device), [(e, s, r) for e, s, r in positions.tolist()]
        )
        return list(zip(targets, densities, strict=True))

    def _keep(self, step: int, means: dict[str, float], teacher: Teacher) -> None:
        state = self.training.weights()
        if not self.training.ranks.is_main:
            return
        software = environment()
        save_teacher(
            self.training.run.path,
            teacher.chosen_state(state),
            model=self.config.model,
            image_size=self.config.data.image_size,
            facts={
                "step": step,
                "metrics": means,
                "data": {"train": self.sources.digest, "val": self.shards.digest},
                "sources": self.sources.describe(),
                "gaze": {**self.shards.manifest.extra["gaze"], "sigma": next(iter(self.targets.values())).sigma},
                "software": {name: software[name] for name in SOFTWARE},
            },
        )
