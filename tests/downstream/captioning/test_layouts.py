"""Captions in the public layouts, the split, and what is wrong with files that people bring."""

import hashlib
import json
from pathlib import Path

import pytest

from downstream.captioning.config import CaptionConfig
from downstream.captioning.layouts import read_captions
from downstream.captioning.vocabulary import END, START, UNKNOWN, Vocabulary, learn_vocabulary, words_of
from engine.errors import InputError
from shards.sources.splits import TENTHS_RULE
from tests.downstream.captioning.files import sentences, write_coco, write_flickr8k


def names_of(found: object, part: str) -> list[str]:
    return [image.name for image in found.parts[part]]  # type: ignore[attr-defined]


def test_flickr8k_and_its_original_file_are_read_alike(tmp_path: Path) -> None:
    root = write_flickr8k(tmp_path, 20)
    first = read_captions(CaptionConfig(), root)
    assert {part: len(images) for part, images in first.parts.items()} == {"train": 16, "val": 2, "test": 2}
    every = [image for images in first.parts.values() for image in images]
    assert sorted(image.name for image in every) == [f"{i:04d}.jpg" for i in range(20)]
    assert all(list(image.captions) == sentences(int(image.name[:4])) for image in every)
    lines = [f"{i:04d}.jpg#{j}\t{text}" for i in range(20) for j, text in enumerate(sentences(i))]
    (root / "captions.txt").unlink()
    (root / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    assert read_captions(CaptionConfig(), root).parts == first.parts


def test_a_caption_with_commas_is_one_caption(tmp_path: Path) -> None:
    root = write_flickr8k(tmp_path, 10)
    with (root / "captions.txt").open("a") as file:
        file.write('0000.jpg,a dog , a car , and more\n0000.jpg,"a dog, quoted"\n')
    images = {i.name: i for images in read_captions(CaptionConfig(), root).parts.values() for i in images}
    assert images["0000.jpg"].captions[-2:] == ("a dog , a car , and more", "a dog, quoted")


def test_the_split_is_the_named_rule_whatever_is_missing(tmp_path: Path) -> None:
    root = write_flickr8k(tmp_path, 20)
    whole = read_captions(CaptionConfig(), root)
    assert whole.facts["split"] == TENTHS_RULE
    ordered = sorted((f"{i:04d}.jpg" for i in range(20)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert names_of(whole, "test") == sorted(ordered[-2:]) and names_of(whole, "val") == sorted(ordered[-4:-2])
    (root / "images" / ordered[0]).unlink()
    fewer = read_captions(CaptionConfig(), root)
    assert fewer.parts["val"] == whole.parts["val"] and fewer.parts["test"] == whole.parts["test"]


def test_split_lists_are_followed(tmp_path: Path) -> None:
    root = write_flickr8k(tmp_path, 10)
    for name, numbers in (("train", range(6)), ("dev", range(6, 8)), ("test", range(8, 9))):
        text = "".join(f"{i:04d}.jpg\n" for i in numbers)
        (root / f"Flickr_8k.{name}Images.txt").write_text(text)
    caption = CaptionConfig(split=root)
    found = read_captions(caption, root)
    assert names_of(found, "val") == ["0006.jpg", "0007.jpg"] and names_of(found, "test") == ["0008.jpg"]
    (root / "Flickr_8k.testImages.txt").write_text("0008.jpg\n9999.jpg\n")
    with pytest.raises(InputError, match=r"1 of 2 images have no captions, the first is 9999.jpg"):
        read_captions(caption, root)
    (root / "Flickr_8k.testImages.txt").write_text("0008.jpg\n0001.jpg\n")
    with pytest.raises(InputError, match=r"0001.jpg is also listed to train"):
        read_captions(caption, root)
    (root / "Flickr_8k.testImages.txt").unlink()
    with pytest.raises(InputError, match=r"caption.split needs it"):
        read_captions(caption, root)


def test_coco_and_karpathy(tmp_path: Path) -> None:
    root = write_coco(tmp_path, 10)
    found = read_captions(CaptionConfig(layout="coco"), root)
    assert sum(len(images) for images in found.parts.values()) == 10
    entries = [
        {
            "filename": f"{i:04d}.jpg",
            "filepath": "images",
            "split": ("restval", "val", "test", "train")[i % 4],
            "sentences": [{"raw": text} for text in sentences(i)],
        }
        for i in range(10)
    ]
    file = root / "dataset_coco.json"
    file.write_text(json.dumps({"images": entries}))
    karpathy = CaptionConfig(layout="karpathy", images=root)
    found = read_captions(karpathy, root)
    assert names_of(found, "train") == [f"images/{i:04d}.jpg" for i in (0, 3, 4, 7, 8)]
    assert names_of(found, "val") == [f"images/{i:04d}.jpg" for i in (1, 5, 9)]
    entries[2]["split"] = "dev"
    file.write_text(json.dumps({"images": entries}))
    with pytest.raises(InputError, match="entry 2 of 'images': split 'dev' is none of"):
        read_captions(karpathy, root)


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    root = write_coco(tmp_path, 20)
    content = json.loads((root / "captions.json").read_text())
    content["images"].append({"id": 77, "file_name": "gone.jpg"})
    content["annotations"] += [
        {"id": 900, "image_id": 77, "caption": "a dog that is missing"},
        {"id": 901, "image_id": 1234, "caption": "an image that nobody lists"},
        {"id": 902, "image_id": 1, "caption": " . "},
    ]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 5]
    (root / "captions.json").write_text(json.dumps(content))
    (root / "images" / "0010.jpg").unlink()
    found = read_captions(CaptionConfig(layout="coco"), root)
    assert dict(found.skipped_images) == {"without a file": 3, "without captions": 1}
    assert dict(found.skipped_captions) == {"empty": 1, "of an image without a file": 4}
    assert found.num_images == 22 and found.num_captions == 41
    used = {image.name for images in found.parts.values() for image in images}
    assert len(used) == 18 and not used & {"gone.jpg", "0004.jpg", "0010.jpg"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0000.jpg,A dog .\n", "line 1: the header 'image,caption' is missing"),
        ("image,caption\n0000.jpg\n", "entry 1: no image and caption"),
        ("", "header"),
    ],
)
def test_bad_captions_txt(tmp_path: Path, text: str, complaint: str) -> None:
    root = write_flickr8k(tmp_path, 10)
    (root / "captions.txt").write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_captions(CaptionConfig(), root)


def test_bad_files(tmp_path: Path) -> None:
    root = write_coco(tmp_path, 10)
    with pytest.raises(InputError, match=r"has none of captions.txt, .*check data.path, or give caption.captions"):
        read_captions(CaptionConfig(), root)
    coco = CaptionConfig(layout="coco")
    for text, complaint in (
        ("{", "is no JSON"),
        ("[]", "has no list 'images'"),
        ('{"images": [{"id": "x", "file_name": "a"}]}', "entry 0 of 'images': 'id' is missing or of the wrong type"),
    ):
        (root / "captions.json").write_text(text)
        with pytest.raises(InputError, match=complaint):
            read_captions(coco, root)
    (root / "captions.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="no UTF-8"):
        read_captions(coco, root)


def test_a_path_that_leaves_the_folder_is_no_image(tmp_path: Path) -> None:
    root = write_flickr8k(tmp_path / "set", 10)
    (tmp_path / "outside.jpg").write_bytes((root / "images" / "0000.jpg").read_bytes())
    with (root / "captions.txt").open("a") as file:
        file.write("../../outside.jpg,a dog\n")
    assert read_captions(CaptionConfig(), root).skipped_images["without a file"] == 1


def test_vocabulary(tmp_path: Path) -> None:
    assert words_of("A woman's T-shirt , 3 dogs !") == ["a", "woman's", "t", "shirt", "3", "dogs"]
    vocabulary = learn_vocabulary([["a", "dog"], ["a", "cat"], ["a", "dog"]], min_count=2)
    assert vocabulary.words == ("a", "dog") and len(vocabulary) == 6
    assert vocabulary.encode(["a", "cat"], max_words=5) == [START, 4, UNKNOWN, END]
    assert vocabulary.encode(["a", "dog", "a"], max_words=2) == [START, 4, 5], "a cut caption has no end"
    assert vocabulary.decode([4, UNKNOWN, 5, END, 4]) == ["a", "dog"]
    vocabulary.write(tmp_path / "words.json")
    assert Vocabulary.read(tmp_path / "words.json") == vocabulary
    with pytest.raises(InputError, match="no word stands 9 times"):
        learn_vocabulary([["a"]], min_count=9)
    (tmp_path / "words.json").write_text("{}")
    with pytest.raises(InputError, match="no list of words"):
        Vocabulary.read(tmp_path / "words.json")
