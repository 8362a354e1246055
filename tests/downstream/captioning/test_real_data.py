"""The readers and the matching on Flickr8k and COCO as they are."""

import os
from pathlib import Path

import pytest

from downstream.captioning.config import SYNONYMS, CaptionConfig, LayoutName
from downstream.captioning.layouts import read_captions
from downstream.captioning.matching import NameMatcher, read_synonyms
from downstream.captioning.objects import find_grids, open_objects
from downstream.captioning.vocabulary import words_of

FOLDERS: dict[LayoutName, tuple[str, str]] = {
    "flickr8k": ("flickr8k_1k/data", "detections.json"),
    "coco": ("coco362", "instances.json"),
}


@pytest.mark.parametrize(
    ("layout", "sizes", "literal", "matched"),
    [("flickr8k", [800, 100, 100], 0.27, 0.83), ("coco", [290, 36, 36], 0.68, 0.89)],
)
def test_matched_captions(layout: LayoutName, sizes: list[int], literal: float, matched: float) -> None:
    """Shares of captions that name a detected object: by class names and plurals alone, and with the synonyms."""
    folder, objects = FOLDERS[layout]
    root = Path(os.environ.get("SACCADE_DATA", "")) / folder
    if "SACCADE_DATA" not in os.environ or not (root / objects).is_file():
        pytest.skip(f"SACCADE_DATA names no folder that holds {folder}/{objects}")
    caption = CaptionConfig(layout=layout, objects=root / objects)
    found = read_captions(caption, root)
    assert [len(found.parts[part]) for part in ("train", "val", "test")] == sizes
    assert not found.skipped_images and not found.skipped_captions
    images = [image for part in found.parts.values() for image in part]
    source = open_objects(caption)
    for synonyms, expected in ((None, literal), (SYNONYMS, matched)):
        matcher = NameMatcher(source.categories, read_synonyms(synonyms))
        named = {
            image.name: [{m.category for m in matcher.find(words_of(text))} for text in image.captions]
            for image in images
        }
        wanted = {name: set().union(*classes) for name, classes in named.items()}
        grids = find_grids(source, images, wanted, grid=(10, 10), min_score=0.25)
        assert grids.num_known == len(images) and grids.num_unusable == 0
        hits = [bool(one & grids.coverage[name].keys()) for name, classes in named.items() for one in classes]
        assert sum(hits) / len(hits) == pytest.approx(expected, abs=0.01)
