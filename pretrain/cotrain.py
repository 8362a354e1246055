"""Arm co-train: human gaze in the same optimisation, without a teacher.

Yao et al. (CVPR 2023) train "human attention directly on SSL, without a teacher" and publish no more about it; how it
is done here is our choice. Every step has two passes and one step of the optimiser: a batch of images, from which
NT-Xent alone learns, and a batch of gaze images, from which the attention heads learn human maps. Trunk and heads are
shared. Each pass normalises with the statistics of its own batch, and the gaze pass leaves batch norm's running
statistics alone: so NT-Xent computes exactly what it computes in arm contrastive, and the encoder is evaluated with the
statistics of the images that it is pretrained on.

`optim.micro_batch` cuts both batches. The attention loss is a mean over images, so the gaze batch goes through in one
pass a part, and an encoder without batch statistics gets the gradient of the whole; batch norm normalises each part
with the statistics of that part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attention.maps import encode_map_np, is_constant
from engine.errors import InputError
from engine.faults import SampleNote
from engine.passes import Backward
from engine.ranks import Ranks
from pretrain.batch_statistics import kept_statistics
from pretrain.config import Config
from pretrain.data import Batch, ViewDataset, view_batches
from pretrain.diagnostics import gradient_norms
from pretrain.micro_batch import split_batch
from pretrain.model import StudentOutput
from pretrain.objective import GRADIENT_IMAGES, MAIN_GRADIENT, Objective, attention_objective
from shards.gaze import check_gaze, gaze_sigma, parse_target
from shards.reader import BadSample, ShardSet, Stored

MAP_SIZE = 56  # rows and columns of a human map before it is cropped with its view: those of a teacher's labels
GAZE_SEED = 0x6A7E  # views of gaze images are not those of the images with the same number


class GazeShards(ShardSet):
    """A gaze set whose samples come with their human maps, as an image set's come with a teacher's."""

    def read_stored(self, shard: int, row: int) -> Stored:
        """One sample with its human map, stored as a teacher's would be; constant where nobody looked at the image.

        Raises:
            BadSample: as `ShardSet.read_stored`, or unusable gaze.
        """
        stored = super().read_stored(shard, row)
        key = self.key(shard, row)
        try:
            info = self.read_info(shard, row)
            target = parse_target(info, key=key, sigma=gaze_sigma(self), shard=shard, row=row)
        except BadSample:
            raise
        except ValueError as error:
            raise BadSample(key, self.manifest.files[shard], str(error)) from error
        return replace(stored, codes=encode_map_np(target.density((MAP_SIZE, MAP_SIZE))))


@dataclass
class CoTrainBatch:
    """One rank's images and gaze images of one step."""

    images: Batch
    gaze: Batch

    @property
    def bad(self) -> list[str]:
        """Key and reason of each sample that could not be read, of both."""
        return self.images.bad + self.gaze.bad

    @property
    def positions(self) -> Any:
        """Places of the images in their order, where they are known; the gaze images' follow from the step."""
        return getattr(self.images, "positions", None)

    def note(self) -> Callable[[], SampleNote]:
        """Says, when called, which images and gaze images the batch holds; keeps none of its tensors."""
        images, gaze = self.images.note(), self.gaze.note()
        return lambda: images() | {f"gaze_{name}": values for name, values in gaze().items()}


@dataclass
class CoTraining:
    """The objective of a step: NT-Xent of the images, then lambda times the attention loss of the gaze images."""

    objective: Objective

    def __call__(self, batch: CoTrainBatch, *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Gradients of this rank's `batch`, and named scalars whose means over ranks are those of the global batch."""
        scalars: dict[str, Tensor] = {}
        for index in backward.passes(2):
            if index == 0:
                scalars = self.objective(batch.images, step=step, backward=backward)
            else:
                main_gradient = scalars.pop(MAIN_GRADIENT, None)
                terms = self._gaze_passes(batch.gaze, backward=backward, main_gradient=main_gradient)
                weighted = self.objective.config.attention.weight * terms["attention"]
                scalars |= {"loss": scalars["loss"] + weighted, **terms}
        return scalars

    def _gaze_passes(self, batch: Batch, *, backward: Backward, main_gradient: Tensor | None) -> dict[str, Tensor]:
        """Means over the gaze batch, `attention` among them, one pass for every `optim.micro_batch` images.

        With the norm of the other loss's gradient, `gradient_ratio` is among them too.
        """
        parts = split_batch(batch, self.objective.config.optim.micro_batch)
        means: dict[str, Tensor] = {}
        for index in backward.passes(len(parts)):
            part = looked_at(parts[index].to(self.objective.device))
            images, share = self.objective.prepare(part), len(part.valid) / len(batch.valid)
            if index == 0 and main_gradient is not None:
                means["gradient_ratio"] = self._gradient(part, images) / main_gradient
            for name, value in self._gaze_pass(part, images, share=share, backward=backward).items():
                means[name] = means.get(name, torch.zeros_like(value)) + share * value
        return means

    def _gaze_pass(self, part: Batch, images: Tensor, *, share: float, backward: Backward) -> dict[str, Tensor]:
        """Gradients of a part, `share` of the gaze batch; the part's attention loss and its terms."""
        objective = self.objective
        with kept_statistics(objective.module):
            output: StudentOutput = objective.module(images)
        attention, terms = attention_objective(output.attention, part, objective.config.attention)
        assert output.embeddings is not None
        # DDP waits for the gradient of every weight in the pass that exchanges them: the projector's is zero
        unused = 0.0 * output.embeddings.float().sum()
        backward(share * objective.config.attention.weight * attention + unused)
        return {"attention": attention.detach(), **terms}

    def _gradient(self, batch: Batch, images: Tensor) -> Tensor:
        """Norm of the gradient of lambda L_attn of the first gaze images with respect to the trunk's parameters."""
        config, few = self.objective.config.attention, split_batch(batch, GRADIENT_IMAGES)[0]
        norms = gradient_norms(
            self.objective.module,
            images[: len(few.valid)],
            lambda output: {"attention": config.weight * attention_objective(output.attention, few, config)[0]},
        )
        return norms["attention"]


def looked_at(batch: Batch) -> Batch:
    """Gaze images of which those that nobody looked at count as unreadable: their maps are constant."""
    assert batch.maps is not None
    return replace(batch, valid=batch.valid & ~is_constant(batch.maps))


def open_gaze(config: Config, *, world_size: int) -> GazeShards:
    """The gaze set of arm co-train.

    Raises:
        InputError: no set given, one without gaze, or a gaze batch that the ranks or the set cannot give.
    """
    if config.data.gaze is None:
        raise InputError("data.gaze is needed by arm 'co-train': give shards that were packed with gaze")
    size = config.data.gaze_batch_size
    if size % world_size:
        raise InputError(
            f"data.gaze_batch_size {size} cannot be divided by {world_size} ranks: set it to a multiple of {world_size}"
        )
    shards = GazeShards(config.data.gaze, remote=config.data.remote)
    check_gaze(shards)
    if size > shards.num_samples:
        raise InputError(
            f"data.gaze_batch_size {size} is more than the {shards.num_samples} samples in {config.data.gaze}: lower it"
        )
    return shards


def gaze_dataset(shards: GazeShards, config: Config) -> ViewDataset:
    """The data set of the gaze images' views."""
    return ViewDataset(
        shards,
        views=config.views,
        num_views=1,
        image_size=config.data.image_size,
        seed=gaze_seed(config),
        map_size=MAP_SIZE,
    )


def gaze_seed(config: Config) -> int:
    """Seed of the gaze images' order and views."""
    return config.seed ^ GAZE_SEED


def with_gaze(
    images: Iterator[Batch], shards: GazeShards, config: Config, *, ranks: Ranks, start_step: int, stop_step: int
) -> Iterator[CoTrainBatch]:
    """Put a batch of gaze images beside each batch of `images`, in an order of its own that is as exact and elastic."""
    gaze = view_batches(
        gaze_dataset(shards, config),
        data=replace(config.data, batch_size=config.data.gaze_batch_size),
        loop=replace(config.loop, num_workers=min(config.loop.num_workers, 1)),
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start_step,
        stop_step=stop_step,
        seed=gaze_seed(config),
    )
    for one, other in zip(images, gaze, strict=True):
        yield CoTrainBatch(one, other)
