"""Captions of a folder of one's own images, written by a trained run: JSON, and a page with words and maps."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from downstream.captioning.beam import search
from downstream.captioning.building import build_captioner, map_of
from downstream.captioning.folder_config import FolderConfig
from downstream.captioning.models.base import Captioner
from downstream.captioning.scoring import WORDS
from downstream.captioning.vocabulary import END, NUM_SPECIAL, Vocabulary
from downstream.config import DownstreamConfig
from downstream.stage import BEST, best_weights, read_stage_config
from downstream.tasks.features import feature_maps, open_encoder
from downstream.tasks.pictures import read_square
from engine.errors import InputError
from engine.files import write_json
from engine.page import Page, overlay
from engine.progress import ProgressBar, report
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.evaluators.base import Subject
from shards.sources.base import walk_images

THUMBNAIL = 136
SHOWN, PAGE = "captions.json", "index.html"


@dataclass
class Captioned:
    """One image's caption.

    Attributes:
        words: without the end; `maps` `(words, height, width)` are where the captioner looked for each.
        score: log-probability of the caption, as its beam search compared it.
    """

    name: str
    words: list[str]
    maps: np.ndarray
    score: float


@dataclass
class TrainedCaptioner:
    """A run's captioner with what it needs to read images and write words."""

    config: DownstreamConfig
    subject: Subject
    model: Captioner
    vocabulary: Vocabulary

    @classmethod
    def load(cls, path: Path) -> "TrainedCaptioner":
        """The best epoch of a finished run.

        Raises:
            InputError: no finished captioner there, or its encoder is another one now.
        """
        run = RunFolder(path)
        config = read_stage_config(run)
        summary = run.read_summary()
        if config.task != "caption" or not summary or not (run.path / BEST).is_file():
            raise InputError(f"{path} is no finished captioning run: train it to its end, or give another --run")
        subject = open_encoder(config.image, weights=config.caption.weights, ranks=Ranks())
        if subject.hash[:16] != summary["data"]["encoder_sha256"]:
            raise InputError(f"{config.image.encoder} is not the encoder that {path} learnt with: put that one back")
        vocabulary = Vocabulary.read(run.path / WORDS)
        channels, grid = map_of(subject, size=config.image.size)
        model = build_captioner(config, num_words=len(vocabulary), channels=channels, grid=grid, subject=subject)
        model.load_state_dict(best_weights(run))
        return cls(config, subject, model.to(subject.device).eval(), vocabulary)

    @torch.inference_mode()
    def describe(self, names: list[str], images: np.ndarray, *, beam: int | None = None) -> list[Captioned]:
        """Captions of uint8 images `(images, size, size, 3)`."""
        pixels = torch.from_numpy(images).to(self.subject.device)
        # as training had them: features of a frozen encoder in half precision, from the cache
        frozen = self.config.image.frozen
        inputs = {"features": feature_maps(self.subject, pixels).half()} if frozen else {"images": pixels}
        caption = self.config.caption
        found = search(
            self.model,
            inputs,
            beam=beam or caption.beam,
            max_words=caption.max_words,
            length_penalty=caption.length_penalty,
        )
        captions = []
        for i, name in enumerate(names):
            tokens = found.tokens[i].tolist()
            kept = [t for t, token in enumerate(tokens) if token >= NUM_SPECIAL and END not in tokens[:t]]
            words = [self.vocabulary.words[tokens[t] - NUM_SPECIAL] for t in kept]
            captions.append(Captioned(name, words, found.maps[i, kept].float().cpu().numpy(), float(found.scores[i])))
        return captions


def caption_folder(config: FolderConfig) -> list[Captioned]:
    """Caption every image of a folder, and write `captions.json` and `index.html`.

    An image that cannot be decoded is named in captions.json and left out.

    Raises:
        InputError: no folder, no image in it that can be decoded, or no finished run.
    """
    if not config.images.is_dir():
        raise InputError(f"images {config.images} is no folder: give one with images")
    files = sorted(name for name, _ in walk_images(config.images))
    if not files:
        raise InputError(f"images {config.images}: no images in it (.jpg, .png, ...)")
    captioner = TrainedCaptioner.load(config.run)
    skipped: dict[str, str] = {}
    found: list[Captioned] = []
    shown: dict[str, np.ndarray] = {}
    with ProgressBar(len(files), "captions") as bar:
        for names, images in _batches(config, files, size=captioner.config.image.size, skipped=skipped):
            found += captioner.describe(names, images, beam=config.beam)
            for name, pixels in zip(names, images, strict=True):
                if len(shown) < config.max_shown:
                    shown[name] = cv2.resize(pixels, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
            bar.update(len(names))
    if not found:
        raise InputError(f"images {config.images}: none of {len(files)} images can be decoded")
    config.output.mkdir(parents=True, exist_ok=True)
    beam = config.beam or captioner.config.caption.beam
    write_json(config.output / SHOWN, _as_json(config, found, skipped, beam=beam))
    _page(config, found, shown).write(config.output / PAGE)
    report(f"{len(found)} images captioned, {len(skipped)} could not be decoded: {config.output / PAGE}")
    return found


def _batches(
    config: FolderConfig, files: list[str], *, size: int, skipped: dict[str, str]
) -> Iterator[tuple[list[str], np.ndarray]]:
    names: list[str] = []
    images: list[np.ndarray] = []
    for name in files:
        try:
            images.append(read_square(config.images / name, size=size))
            names.append(name)
        except ValueError as error:
            skipped[name] = str(error).removeprefix(f"{config.images / name}: ")
        if len(names) == config.batch_size:
            yield names, np.stack(images)
            names, images = [], []
    if names:
        yield names, np.stack(images)


def _as_json(config: FolderConfig, found: list[Captioned], skipped: dict[str, str], *, beam: int) -> dict[str, Any]:
    images = [
        {
            "image": one.name,
            "caption": " ".join(one.words),
            "score": round(one.score, 5),
            "words": [
                {"word": word, "map": [[round(float(value), 5) for value in row] for row in density]}
                for word, density in zip(one.words, one.maps, strict=True)
            ],
        }
        for one in found
    ]
    return {"run": config.run.name, "beam": beam, "images": images, "skipped": skipped}


def _page(config: FolderConfig, found: list[Captioned], shown: dict[str, np.ndarray]) -> Page:
    page = Page(f"Captions by {config.run.name}")
    if len(found) > len(shown):
        page.note(f"The first {len(shown)} of {len(found)} images; {SHOWN} holds all.")
    for one in found[: len(shown)]:
        pixels = shown[one.name]
        pictures = [(pixels, f"image {one.name}")]
        pictures += [(overlay(pixels, m), f"where it looked for {w}") for w, m in zip(one.words, one.maps, strict=True)]
        page.gallery([one.name, *one.words], [pictures], caption=" ".join(one.words) or "(no word)")
    return page
