"""Writing, indexing and reading: by value, through stock webdataset, and with one thing wrong at a time."""

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from engine.errors import InputError
from shards.index import IndexFault, read_index, write_index
from shards.manifest import make_manifest, read_manifest, write_manifest
from shards.opening import MAX_OPEN_SHARDS
from shards.pack import pack
from shards.quarantine import BadEntry, write_quarantine
from shards.reader import BadSample, ShardSet
from shards.sources.image_folder import ImageFolder
from shards.writer import ShardWriter, index_path, is_complete

MakeSet = Callable[[list[tuple[str, bytes, int]]], ShardSet]


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """Write one shard of (key, image, label) by hand."""

    def make(samples: list[tuple[str, bytes, int]]) -> ShardSet:
        root = tmp_path / "by_hand"
        root.mkdir()
        with ShardWriter(root / "shard-000000.tar") as writer:
            for key, image, label in samples:
                writer.add(key, {"jpg": image, "json": json.dumps({"name": key}).encode()}, label=label)
            record = writer.close()
        write_manifest(root, make_manifest([record], kind="images", name="by hand", classes=["a", "b", "c"]))
        return ShardSet(root)

    return make


def all_samples(shards: ShardSet) -> dict[str, tuple[bytes, int]]:
    rows = [(shard, row) for shard, size in enumerate(shards.shard_sizes) for row in range(size)]
    samples = [shards.read(shard, row) for shard, row in rows]
    return {sample.key: (sample.image, sample.label) for sample in samples}


def test_every_image_comes_back_byte_for_byte(packed: ShardSet, image_folder: Path) -> None:
    files = {path.relative_to(image_folder).as_posix(): path for path in image_folder.rglob("*.jpg")}
    expected = {
        name.removesuffix(".jpg"): (path.read_bytes(), ["cat", "dog", "owl"].index(name.split("/")[0]))
        for name, path in files.items()
    }
    assert all_samples(packed) == expected
    assert packed.classes == ("cat", "dog", "owl")
    assert packed.num_samples == 23 and packed.shard_sizes.tolist() == [7, 7, 7, 2]
    assert packed.shard_starts.tolist() == [0, 7, 14, 21]
    info = packed.read(0, 0).info()
    assert (info["width"], info["height"]) == (32, 24) and info["name"] == f"{packed.read(0, 0).key}.jpg"


def test_stock_webdataset_reads_the_tars(packed: ShardSet) -> None:
    urls = [str(packed.root / name) for name in packed.manifest.files]
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        assert set(sample) >= {"jpg", "cls", "json"}
        found[sample["__key__"]] = (sample["jpg"], int(sample["cls"]))
    assert found == all_samples(packed)
    decoded = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb").to_tuple("jpg", "cls", "json")))
    assert decoded[0].shape == (24, 32, 3) and isinstance(decoded[1], int) and decoded[2]["width"] == 32


@pytest.mark.parametrize("key", ["日本/写真", "é" * 60, "d/" + "k" * 4000, "a.b/c", "with space"])
def test_unusual_keys_survive_here_and_in_webdataset(make_set: MakeSet, jpeg: Callable[..., bytes], key: str) -> None:
    image = jpeg()
    shards = make_set([(key, image, 2), ("other", jpeg(seed=1), -1)])
    assert shards.read(0, 0).key == key and shards.read(0, 0).image == image
    assert shards.read(0, 1).label == -1
    found = list(webdataset.WebDataset(str(shards.root / "shard-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [key, "other"]
    assert found[0]["jpg"] == image and found[0]["cls"] == b"2" and "cls" not in found[1]


def test_a_set_is_cheap_to_pickle_and_reads_after_it(packed: ShardSet) -> None:
    before = packed.read(2, 3)
    data = pickle.dumps(packed)
    assert len(data) < 4000
    after = pickle.loads(data).read(2, 3)
    assert (after.key, after.image) == (before.key, before.image)


def test_few_files_stay_open_however_many_shards_are_read(image_folder: Path, tmp_path: Path) -> None:
    for number in range(80):
        (image_folder / "cat" / f"more{number}.jpg").write_bytes((image_folder / "cat" / "000.jpg").read_bytes())
    pack(ImageFolder(image_folder), tmp_path / "many", shard_samples=1, workers=1)
    shards = ShardSet(tmp_path / "many")
    before = len(os.listdir("/proc/self/fd"))
    assert len(all_samples(shards)) == 103
    assert len(os.listdir("/proc/self/fd")) - before <= MAX_OPEN_SHARDS
    shards.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_rows_outside_the_set_are_a_programming_error(packed: ShardSet) -> None:
    for shard, row in ((4, 0), (0, 7), (-1, 0), (0, -1)):
        with pytest.raises(IndexError):
            packed.read(shard, row)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_in_an_image_is_one_bad_sample(packed: ShardSet) -> None:
    tar = packed.root / packed.manifest.files[1]
    index = read_index(index_path(tar))
    good = all_samples(packed)
    flip(tar, int(index.offset[3] + index.size[3] // 2))
    with pytest.raises(BadSample, match=r"shard-000001.tar.*CRC-32") as caught:
        packed.read(1, 3)
    assert caught.value.key == index.key(3) and not isinstance(caught.value, InputError)
    for row in (0, 1, 2, 4, 5, 6):
        sample = packed.read(1, row)
        assert good[sample.key] == (sample.image, sample.label)
    assert len(ShardSet(packed.root, check=False).read(1, 3).image) == index.size[3]
    copy = pickle.loads(pickle.dumps(caught.value))  # workers send it to the trainer
    assert (copy.key, copy.shard, copy.reason) == (caught.value.key, "shard-000001.tar", caught.value.reason)


def test_a_truncated_tar_never_gives_half_a_sample(packed: ShardSet) -> None:
    tar = packed.root / packed.manifest.files[0]
    index, whole, good = read_index(index_path(tar)), tar.read_bytes(), all_samples(packed)
    for length in range(0, len(whole), 997):
        tar.write_bytes(whole[:length])
        packed.close()
        for row in range(7):
            if index.offset[row] + index.size[row] <= length:
                sample = packed.read(0, row)
                assert good[sample.key] == (sample.image, sample.label)
            else:
                with pytest.raises(BadSample, match="cut short"):
                    packed.read(0, row)


def test_every_flipped_byte_of_an_index_is_noticed(packed: ShardSet) -> None:
    path = index_path(packed.root / packed.manifest.files[0])
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        flip(path, position)
        with pytest.raises(BadSample, match="whole shard"):
            ShardSet(packed.root).read(0, 0)
        with pytest.raises(IndexFault):  # or, without the manifest's hash, either sound or a fault, never a crash
            read_index(path, sha256=hashlib.sha256(whole).hexdigest())
        with contextlib.suppress(IndexFault):
            read_index(path)
        path.write_bytes(whole)


def test_a_missing_shard_or_index_makes_its_samples_bad_and_no_others(packed: ShardSet) -> None:
    (packed.root / packed.manifest.files[0]).unlink()
    index_path(packed.root / packed.manifest.files[1]).unlink()
    for shard in (0, 1):
        for row in range(7):
            with pytest.raises(BadSample, match="whole shard"):
                packed.read(shard, row)
    assert packed.read(2, 0).image


def test_the_index_of_another_shard_is_noticed(packed: ShardSet) -> None:
    paths = [index_path(packed.root / name) for name in packed.manifest.files]
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(BadSample, match="manifest's"):
        packed.read(0, 0)


def test_a_zero_byte_image_is_a_bad_sample(make_set: MakeSet, jpeg: Callable[..., bytes]) -> None:
    shards = make_set([("empty", b"", 0), ("full", jpeg(), 1)])
    with pytest.raises(BadSample, match="zero bytes"):
        shards.read(0, 0)
    assert shards.read(0, 1).key == "full"


def test_duplicate_keys_are_refused_and_leave_nothing(make_set: MakeSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="occurs twice"):
        make_set([("same", b"x", 0), ("same", b"y", 0)])
    assert list((tmp_path / "by_hand").iterdir()) == []


def test_an_index_is_written_last_and_a_left_tar_is_taken_over(tmp_path: Path) -> None:
    """Two writers of one shard: the first tar stays and the index fits it, whoever writes the index."""
    path = tmp_path / "shard-000000.tar"
    first, second = ShardWriter(path), ShardWriter(path)
    first.add("a", {"jpg": b"first"})
    second.add("a", {"jpg": b"the second is longer"})
    assert not path.exists()
    record = first.close()
    index_path(path).unlink()  # as if the first writer had been killed between tar and index
    assert not is_complete(path)
    assert second.close() == record and is_complete(path)
    index = read_index(index_path(path))
    assert path.read_bytes()[index.offset[0] :][: index.size[0]] == b"first"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["shard-000000.index", "shard-000000.tar"]


def test_quarantined_samples_are_left_out_and_change_the_order_identity(packed: ShardSet) -> None:
    entries = [BadEntry(1, 0, "", "x"), BadEntry(1, 3, "", "x"), BadEntry(1, 4, "", "x"), BadEntry(3, 1, "", "x")]
    keys = packed.keys(1)
    write_quarantine(packed.root, packed.manifest, entries)
    shards = ShardSet(packed.root)
    assert shards.shard_sizes.tolist() == [7, 4, 7, 1] and shards.num_quarantined == 4
    assert [shards.read(1, row).key for row in range(4)] == [keys[1], keys[2], keys[5], keys[6]] == shards.keys(1)
    assert shards.read(1, 2).info()["name"] == f"{keys[5]}.jpg"
    assert shards.digest != packed.digest and shards.manifest.digest == packed.manifest.digest
    with pytest.raises(IndexError):
        shards.read(1, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "0" * 64},
        {"schema": 2},
        {"schema": True},
        {"samples": [{"shard": 9, "row": 0, "key": "", "reason": ""}]},
        {"samples": [{"shard": 0, "row": 0.5, "key": "", "reason": ""}]},
        {"samples": 7},
    ],
)
def test_an_unusable_quarantine_is_refused(packed: ShardSet, change: dict[str, object]) -> None:
    write_quarantine(packed.root, packed.manifest, [])
    path = packed.root / "quarantine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"quarantine.json.*--repair"):
        ShardSet(packed.root)


def test_index_and_manifest_bytes_do_not_depend_on_the_run(packed: ShardSet, tmp_path: Path) -> None:
    path = index_path(packed.root / packed.manifest.files[0])
    assert write_index(tmp_path / "again.index", read_index(path)) == packed.manifest.hash_of(0, "index_sha256")
    write_manifest(tmp_path, read_manifest(packed.root))
    assert (tmp_path / "manifest.json").read_bytes() == (packed.root / "manifest.json").read_bytes()


def test_missing_and_empty_sets_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder: pack a set first"):
        ShardSet(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no manifest.json"):
        ShardSet(tmp_path)
    write_manifest(tmp_path, make_manifest([], kind="images", name="empty"))
    with pytest.raises(InputError, match="no usable samples"):
        ShardSet(tmp_path)
    np.testing.assert_equal(read_manifest(tmp_path).num_samples, 0)
