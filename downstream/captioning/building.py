"""The captioner that a config names, and the size of its encoder's feature map."""

from copy import deepcopy
from typing import Any

import torch

from downstream.captioning.models.base import Captioner
from downstream.captioning.models.show_attend_tell import ShowAttendTell
from downstream.captioning.models.transformer import CaptionTransformer
from downstream.captioning.models.trunk import FeatureTrunk
from downstream.config import DownstreamConfig
from engine.errors import InputError
from pretrain.evaluators.base import Subject


def build_captioner(
    config: DownstreamConfig, *, num_words: int, channels: int, grid: tuple[int, int], subject: Subject
) -> Captioner:
    """The captioner that `config` names, from random weights; an encoder that learns along begins with its own.

    Raises:
        InputError: widths that do not go together.
    """
    caption = config.caption
    trunk = FeatureTrunk(channels)
    if not config.image.frozen:
        backbone = deepcopy(subject.backbone).requires_grad_(True)  # every run begins with the same
        trunk = FeatureTrunk(channels, backbone=backbone, statistics=subject.statistics)
    common: dict[str, Any] = {"channels": channels, "trunk": trunk, "dropout": caption.dropout}
    if caption.model == "show_attend_tell":
        widths = {"embedding": caption.embedding, "attention": caption.attention, "decoder": caption.decoder}
        return ShowAttendTell(num_words, **common, **widths)
    if caption.embedding % caption.heads:
        raise InputError(f"caption.embedding {caption.embedding} must be a multiple of caption.heads {caption.heads}")
    return CaptionTransformer(
        num_words,
        **common,
        grid=grid,
        max_words=caption.max_words,
        width=caption.embedding,
        hidden=4 * caption.decoder,
        depth=caption.depth,
        heads=caption.heads,
    )


@torch.no_grad()
def map_of(subject: Subject, *, size: int) -> tuple[int, tuple[int, int]]:
    """Channels, and height and width, of an encoder's last feature map."""
    trunk = FeatureTrunk(None, backbone=subject.backbone, statistics=subject.statistics)
    blank = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=subject.device)
    found = trunk.eval()({"images": blank})
    return int(found.shape[1]), (int(found.shape[2]), int(found.shape[3]))
