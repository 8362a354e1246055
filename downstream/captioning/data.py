"""The captioning task: images as features or pixels, captions as tokens, object masks of the words that name them."""

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downstream.captioning.building import build_captioner, map_of
from downstream.captioning.examples import CaptionExamples, CaptionPictures, Part, padded
from downstream.captioning.layouts import PARTS, CaptionedImage, CaptionSet, read_captions
from downstream.captioning.matching import Mention, NameMatcher, read_synonyms
from downstream.captioning.models.base import Captioner
from downstream.captioning.objects import ObjectGrids, find_grids, known_images, open_objects
from downstream.captioning.reading import check_skipped
from downstream.captioning.vocabulary import PADDING, learn_vocabulary, words_of
from downstream.config import DownstreamConfig
from downstream.data import limited
from downstream.tasks.features import cached_features, open_encoder
from downstream.tasks.pictures import FeatureMaps, ImagesOnDisk, Pictures
from engine.errors import InputError
from engine.progress import report, silent
from engine.ranks import Ranks


class CaptionTask:
    """A captioned data set with its captioner. The vocabulary is learnt from the training captions alone.

    Every rank must make one, since they share the work of computing features.

    Raises:
        InputError: missing or damaged data, or more than `caption.max_skipped` of it left out.
    """

    def __init__(self, config: DownstreamConfig) -> None:
        self.config, self.caption = config, config.caption
        self.ranks = Ranks()
        self.tell = report if self.ranks.is_main else silent
        found = read_captions(self.caption, config.data.path)
        self.subject = open_encoder(config.image, weights=self.caption.weights, ranks=self.ranks)
        images = [image for part in PARTS for image in found.parts[part]]
        pictures = self._pictures(images, found)
        numbers = {image.name: number for number, image in enumerate(images)}
        for part in PARTS:
            found.parts[part] = _readable(found, part, numbers, pictures)
        self._check(found)
        train = limited(found.parts["train"], config)
        learnt = [words_of(caption) for image in train for caption in image.captions]
        self.vocabulary = learn_vocabulary(learnt, min_count=self.caption.min_count)
        self.channels, self.grid = self._shape(pictures)
        self.unknown_names: Counter[str] = Counter()
        used = [*train, *found.parts["val"], *found.parts["test"]]
        self.grids, self.matcher, self.object_facts = self._objects(used, every=images)
        parts = {"train": train, "val": found.parts["val"], "test": found.parts["test"]}
        self.train, self.val, self.test = (
            self._part(parts[part], CaptionPictures(pictures, parts[part], [numbers[i.name] for i in parts[part]]))
            for part in PARTS
        )
        self.facts = self._facts(found)

    def build_model(self) -> Captioner:
        """The captioner from random weights, drawn from torch's generator; the encoder with its own."""
        return build_captioner(
            self.config, num_words=len(self.vocabulary), channels=self.channels, grid=self.grid, subject=self.subject
        )

    def _pictures(self, images: list[CaptionedImage], found: CaptionSet) -> Pictures:
        files = dict(enumerate(image.path for image in images))
        if not self.config.image.frozen:
            return ImagesOnDisk(files, size=self.config.image.size)
        # the cache knows images by number, so their names and sizes are part of its own name
        listed = "\n".join(f"{image.name} {image.path.stat().st_size}" for image in images)
        digest = hashlib.sha256(listed.encode()).hexdigest()[:12]
        return cached_features(
            files,
            subset=f"{self.caption.layout}-{digest}",
            subject=self.subject,
            size=self.config.image.size,
            cache=self.caption.cache,
            num_workers=self.config.loop.num_workers,
            ranks=self.ranks,
        )

    def _shape(self, pictures: Pictures) -> tuple[int, tuple[int, int]]:
        if isinstance(pictures, FeatureMaps):
            channels, height, width = pictures.shape
            return channels, (height, width)
        return map_of(self.subject, size=self.config.image.size)

    def _check(self, found: CaptionSet) -> None:
        common = {"where": self.config.data.path, "limit": self.caption.max_skipped, "tell": self.tell}
        check_skipped(found.skipped_images, of=found.num_images, what="images", **common)
        check_skipped(found.skipped_captions, of=found.num_captions, what="captions", **common)

    def _objects(
        self, images: list[CaptionedImage], *, every: list[CaptionedImage]
    ) -> tuple[ObjectGrids, NameMatcher | None, dict[str, Any]]:
        caption = self.caption
        if caption.objects is None:
            return ObjectGrids(), None, {}
        source = open_objects(caption, remote=self.config.data.remote)
        known_images(source, every)  # a name that two images share is refused also where a limit leaves one of them out
        matcher = NameMatcher(source.categories, read_synonyms(caption.synonyms))
        wanted = {
            image.name: {mention.category for text in image.captions for mention in matcher.find(words_of(text))}
            for image in images
        }
        grids = find_grids(source, images, wanted, grid=self.grid, min_score=caption.min_score)
        check_skipped(
            {f"damaged or of another size, the first {grids.first_fault}": grids.num_unusable},
            of=grids.num_known,
            what="images with object masks",
            where=caption.objects,
            limit=caption.max_skipped,
            tell=self.tell,
        )
        facts = {
            "sha256": source.digest[:16],
            "images_known": grids.num_known,
            "images_of_others": source.num_images - grids.num_known,
            "images_with_unusable_masks": grids.num_unusable,
            "min_score": caption.min_score,
        }
        return grids, matcher, facts

    def _part(self, images: list[CaptionedImage], pictures: CaptionPictures) -> Part:
        keys: list[str] = []
        words: list[list[str]] = []
        rows: list[int] = []
        for row, image in enumerate(images):
            for number, text in enumerate(image.captions):
                keys.append(f"{image.name}#{number}")
                words.append(words_of(text))
                rows.append(row)
        encoded = [self.vocabulary.encode(w, max_words=self.caption.max_words) for w in words]
        positions, grids, coverage = self._masks(images, words, rows)
        image_rows = np.array(rows, dtype=np.int64)
        tokens = padded(encoded, fill=PADDING)
        captions = CaptionExamples(keys, words, tokens, image_rows, pictures, positions, grids, coverage)
        return Part(images, pictures, captions)

    def _masks(
        self, images: list[CaptionedImage], words: list[list[str]], rows: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, grids and coverage as in `CaptionExamples`; each mask of an image stands there once."""
        coverage: list[np.ndarray] = [np.zeros(self.grid, dtype=np.float32)]
        numbers: dict[tuple[int, str], int] = {}
        positions: list[list[int]] = []
        grids: list[list[int]] = []
        for row, spoken in zip(rows, words, strict=True):
            named = self._named(images[row], spoken)
            for mention in named:
                if (row, mention.category) not in numbers:
                    numbers[row, mention.category] = len(coverage)
                    coverage.append(self.grids.coverage[images[row].name][mention.category])
            positions.append([mention.position for mention in named])
            grids.append([numbers[row, mention.category] for mention in named])
        return padded(positions, fill=-1), padded(grids, fill=0), torch.from_numpy(np.stack(coverage))

    def _named(self, image: CaptionedImage, words: list[str]) -> list[Mention]:
        """Mentions of detected objects, of words that the captioner can write."""
        if self.matcher is None:
            return []
        found = []
        for mention in self.matcher.find(words):
            if mention.category not in self.grids.coverage.get(image.name, {}):
                continue
            if mention.position >= self.caption.max_words or words[mention.position] not in self.vocabulary:
                self.unknown_names[mention.category] += 1
                continue
            found.append(mention)
        return found

    def _facts(self, found: CaptionSet) -> dict[str, Any]:
        parts = {"train": self.train, "val": self.val, "test": self.test}
        matched = {name: float((part.captions.positions >= 0).sum(1).float().mean()) for name, part in parts.items()}
        return {
            **found.facts,
            "skipped_images": dict(found.skipped_images),
            "skipped_captions": dict(found.skipped_captions),
            "sizes": {name: {"images": len(p.images), "captions": len(p.captions)} for name, p in parts.items()},
            "vocabulary": len(self.vocabulary),
            "encoder": self.subject.name,
            "encoder_sha256": self.subject.hash[:16],
            "image_size": self.config.image.size,
            "grid": list(self.grid),
            "channels": self.channels,
            "objects": self.object_facts,
            "matched_objects_per_caption": {name: round(value, 4) for name, value in matched.items()},
            "names_outside_vocabulary": dict(self.unknown_names.most_common(20)),
        }


def _readable(found: CaptionSet, part: str, numbers: dict[str, int], pictures: Pictures) -> list[CaptionedImage]:
    """Images of a part whose file could be decoded; the others are counted."""
    good = []
    for image in found.parts[part]:
        if numbers[image.name] in pictures.places:
            good.append(image)
        else:
            found.skipped_images["that cannot be decoded"] += 1
            found.skipped_captions["of an image that cannot be decoded"] += len(image.captions)
    if not good:
        raise InputError(f"no image to {part} can be decoded: fetch the images again")
    return good
