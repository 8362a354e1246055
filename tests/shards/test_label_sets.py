"""Label sets: joined by key, refused when they do not fit, safe against racing writers; the controls."""

import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.maps import decode_map_np, encode_map_np, fixation_density
from engine.errors import InputError
from shards.controls import CONTROLS, write_control
from shards.labels import (
    claim_directory,
    encode_label,
    label_directory,
    label_shard_path,
    labels_complete,
    seal_labels,
    write_label_shard,
)
from shards.manifest import read_manifest
from shards.map_png import decode_map_png, encode_map_png
from shards.pack import pack
from shards.quarantine import BadEntry, write_quarantine
from shards.reader import BadSample, ShardSet
from shards.sources.image_folder import ImageFolder
from shards.verify import VerifyConfig
from shards.verify import main as verify
from shards.writer import index_path
from tests.shards.conftest import jpeg

TEACHER = "ab" * 32
SIZE = (6, 8)


def density_of(key: str, *, salt: int = 0) -> np.ndarray:
    """A map that can only be this key's."""
    return np.random.default_rng([salt, *key.encode()]).random(SIZE) + 0.01


def expected(key: str) -> np.ndarray:
    return stored_of(density_of(key))


def stored_of(density: np.ndarray) -> np.ndarray:
    """What a label of this density is read as: its codes are even, for fewer bytes."""
    return decode_map_np(encode_map_np(density, step=2))


def write_labels(
    images: ShardSet,
    root: Path,
    *,
    without: tuple[str, ...] = (),
    encode: Callable[[str], bytes] = lambda key: encode_label(density_of(key)),
) -> Path:
    directory = label_directory(root, TEACHER)
    for shard in range(images.manifest.num_shards):
        keys = [key for key in images.keys(shard) if key not in without]
        random.Random(shard).shuffle(keys)  # any order will do
        write_label_shard(directory, images, shard, [(key, encode(key)) for key in keys])
    seal_labels(directory, images, teacher={"hash": TEACHER}, settings={"size": list(SIZE)})
    return directory


def spoil(directory: Path, **entries: Any) -> None:
    """Give a set's manifest other entries."""
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def rows(shards: ShardSet) -> list[tuple[int, int]]:
    return [(shard, row) for shard, size in enumerate(shards.shard_sizes) for row in range(size)]


def test_every_image_gets_its_own_map(packed: ShardSet, tmp_path: Path) -> None:
    directory = write_labels(packed, tmp_path / "labels")
    assert directory == tmp_path / "labels" / TEACHER[:16]
    joined = ShardSet(packed.root, labels=directory, teacher_hash=TEACHER)
    assert joined.digest == packed.digest
    for shard, row in rows(joined):
        sample = joined.read(shard, row)
        assert sample.map is not None and sample.map.dtype == np.float32 and sample.map.shape == SIZE
        np.testing.assert_array_equal(sample.map, expected(sample.key))
        assert sample.map.sum() == pytest.approx(1, abs=1e-5)
        assert (sample.image, sample.label) == (packed.read(shard, row).image, packed.read(shard, row).label)
    manifest = read_manifest(directory, kind="labels")
    assert manifest.extra["images"]["digest"] == packed.manifest.digest
    assert manifest.extra["settings"] == {"encoding": "sqrt8", "size": [6, 8]}


def test_stored_maps_are_close_to_the_float_ones() -> None:
    """Peaked maps such as a teacher gives: KLD below 1e-3 and at most 1.5 kB at 56x56."""
    rng = np.random.default_rng(0)
    divergences, sizes = [], []
    for _ in range(30):
        points = rng.normal((400, 300), (150, 100), (8, 2))
        true = fixation_density(points, size=(600, 800), sigma=40, grid=(56, 56)).astype(np.float64)
        data = encode_label(true)
        stored = decode_map_np(decode_map_png(data)).astype(np.float64)
        divergences.append(float((true * np.log((true + 1e-12) / (stored + 1e-12))).sum()))
        sizes.append(len(data))
    assert max(divergences) < 1e-3
    assert np.mean(sizes) <= 1536


def test_an_image_without_label_is_a_bad_sample_and_never_a_half_one(packed: ShardSet, tmp_path: Path) -> None:
    lost = packed.keys(1)[2]
    joined = ShardSet(packed.root, labels=write_labels(packed, tmp_path, without=(lost,)))
    with pytest.raises(BadSample, match="label map: none was written") as caught:
        joined.read(1, 2)
    assert caught.value.key == lost
    assert joined.read(1, 3).map is not None and packed.read(1, 2).map is None


def test_a_damaged_map_is_a_bad_sample(packed: ShardSet, tmp_path: Path) -> None:
    directory = write_labels(packed, tmp_path)
    tar = directory / packed.manifest.files[0]
    data = bytearray(tar.read_bytes())
    data[512 + 30] ^= 1
    tar.write_bytes(data)
    joined = ShardSet(packed.root, labels=directory, check=False)  # maps are checked all the same
    with pytest.raises(BadSample, match="label map: its bytes have changed"):
        joined.read(0, 0)
    assert joined.read(0, 1).map is not None


def test_labels_for_other_keys_or_twice_are_refused(packed: ShardSet, tmp_path: Path) -> None:
    png = encode_label(density_of("x"))
    with pytest.raises(InputError, match="not in that image shard"):
        write_label_shard(tmp_path / "l", packed, 0, [("stranger", png)])
    key = packed.keys(0)[0]
    with pytest.raises(InputError, match="two label maps"):
        write_label_shard(tmp_path / "l", packed, 0, [(key, png), (key, png)])
    assert not (tmp_path / "l").exists()


def test_unsealed_labels_are_refused_and_name_what_is_missing(packed: ShardSet, tmp_path: Path) -> None:
    directory = tmp_path / "l"
    write_label_shard(directory, packed, 0, [])
    assert labels_complete(directory, packed, 0) and not labels_complete(directory, packed, 1)
    with pytest.raises(InputError, match=r"3 of 4 label shards are missing, the first is shard-000001.tar"):
        seal_labels(directory, packed, teacher={"hash": TEACHER}, settings={})
    with pytest.raises(InputError, match=r"no manifest.json in it: the set is not complete"):
        ShardSet(packed.root, labels=directory)


def test_labels_of_another_set_or_teacher_are_refused(packed: ShardSet, image_folder: Path, tmp_path: Path) -> None:
    directory = write_labels(packed, tmp_path / "labels")
    pack(ImageFolder(image_folder), tmp_path / "other", shard_samples=7, seed=1, workers=1)
    with pytest.raises(InputError, match="belong to another image set"):
        ShardSet(tmp_path / "other", labels=directory)
    with pytest.raises(InputError, match=r"written by teacher abababababab, but teacher cdcdcdcdcdcd"):
        ShardSet(packed.root, labels=directory, teacher_hash="cd" * 32)
    with pytest.raises(InputError, match="holds images, but labels are needed"):
        ShardSet(packed.root, labels=packed.root)
    with pytest.raises(InputError, match="holds labels, but images are needed"):
        ShardSet(directory)
    for bad in ("../up", "XYZ" * 10, "ab"):
        with pytest.raises(InputError, match="hexadecimal"):
            label_directory(tmp_path, bad)


def test_the_first_characters_of_a_teacher_are_enough(packed: ShardSet, tmp_path: Path) -> None:
    directory = write_labels(packed, tmp_path / "labels")
    for length in (8, 12, 16, len(TEACHER)):
        assert ShardSet(packed.root, labels=directory, teacher_hash=TEACHER[:length]).label_manifest is not None
    with pytest.raises(InputError, match=f"at least its first 8 characters; .* by {TEACHER[:16]}"):
        ShardSet(packed.root, labels=directory, teacher_hash=TEACHER[:7])
    for other in (TEACHER[:8] + "0", TEACHER + "0", "0" * 8, TEACHER[1:10]):
        with pytest.raises(InputError, match="written by teacher"):
            ShardSet(packed.root, labels=directory, teacher_hash=other)


def test_a_manifest_that_claims_other_counts_is_refused(packed: ShardSet, tmp_path: Path) -> None:
    directory = write_labels(packed, tmp_path)
    path = directory / "manifest.json"
    value = json.loads(path.read_text())
    value["shards"][0]["num_samples"] += 1
    value["num_samples"] += 1
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match="other sample counts"):
        ShardSet(packed.root, labels=directory)


def test_sealing_again_gives_the_same_bytes(packed: ShardSet, tmp_path: Path) -> None:
    first, second = write_labels(packed, tmp_path / "a"), write_labels(packed, tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir()) and len(names) == 9
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    before = (first / "manifest.json").read_bytes()
    seal_labels(first, packed, teacher={"hash": TEACHER}, settings={"size": list(SIZE)})
    assert (first / "manifest.json").read_bytes() == before


def race(root: Path, directory: Path, salt: int, barrier: object) -> None:
    """One of several processes that write all label shards, each with slightly other maps (as GPUs do)."""
    images = ShardSet(root)
    barrier.wait()  # type: ignore[attr-defined]
    for shard in range(images.manifest.num_shards):
        maps = [(key, encode_label(density_of(key, salt=salt))) for key in images.keys(shard)]
        write_label_shard(directory, images, shard, maps)


def test_processes_that_write_the_same_shards_at_once_leave_one_sound_set(packed: ShardSet, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        barrier = context.Barrier(4)
        processes = [context.Process(target=race, args=(packed.root, directory, salt, barrier)) for salt in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        seal_labels(directory, packed, teacher={"hash": TEACHER}, settings={})
        joined = ShardSet(packed.root, labels=directory)
        for shard, row in rows(joined):
            sample = joined.read(shard, row)
            assert sample.map is not None
            choices = [stored_of(density_of(sample.key, salt=salt)) for salt in range(4)]
            assert any(np.array_equal(sample.map, choice) for choice in choices)
        assert not [path for path in directory.iterdir() if path.name.endswith(".tmp")]


def claim(directory: Path, salt: int, barrier: object, answers: object) -> None:
    """One of several processes that want the same folder for other settings."""
    barrier.wait()  # type: ignore[attr-defined]
    try:
        claim_directory(directory, {"size": [salt, salt]})
        answers.put(salt)  # type: ignore[attr-defined]
    except InputError as error:
        answers.put(str(error))  # type: ignore[attr-defined]


def test_a_folder_goes_to_one_of_several_settings_that_want_it_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(40):
        directory = tmp_path / str(attempt)
        barrier, answers = context.Barrier(4), context.Queue()
        processes = [context.Process(target=claim, args=(directory, salt, barrier, answers)) for salt in range(4)]
        for process in processes:
            process.start()
        found = [answers.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(60)
        winners = [answer for answer in found if isinstance(answer, int)]
        assert len(winners) == 1, f"attempt {attempt}: {found}"
        assert all("labels of other size" in answer for answer in found if isinstance(answer, str))
        assert [path.name for path in directory.iterdir()] == [".settings.json"]
        claim_directory(directory, {"size": winners * 2})


def test_a_writer_killed_between_tar_and_index_is_completed(packed: ShardSet, tmp_path: Path) -> None:
    directory = write_labels(packed, tmp_path)
    tar = label_shard_path(directory, packed, 1)
    before = index_path(tar).read_bytes()
    index_path(tar).unlink()
    write_label_shard(directory, packed, 1, [])
    assert index_path(tar).read_bytes() == before
    index_path(tar).unlink()
    tar.write_bytes(b"junk")
    with pytest.raises(InputError, match="unusable file is in the way"):
        write_label_shard(directory, packed, 1, [])


def test_shuffled_labels_are_the_same_maps_and_none_at_its_own_image(packed: ShardSet, tmp_path: Path) -> None:
    lost = packed.keys(0)[0]
    labels = write_labels(packed, tmp_path, without=(lost,))
    directory, manifest = write_control("shuffled", packed, labels, tmp_path, seed=3)
    assert directory.name == f"{TEACHER[:16]}-shuffled-3"
    assert manifest.extra["teacher"] == {"hash": TEACHER, "control": "shuffled", "seed": 3}
    joined = ShardSet(packed.root, labels=directory)
    own, found = [], []
    for shard, row in rows(joined)[1:]:
        sample = joined.read(shard, row)
        assert sample.map is not None and not np.array_equal(sample.map, expected(sample.key))
        own.append(expected(sample.key).tobytes())
        found.append(sample.map.tobytes())
    assert sorted(own) == sorted(found)
    with pytest.raises(BadSample):
        joined.read(0, 0)


def test_centre_bias_labels_are_the_mean_map(packed: ShardSet, tmp_path: Path) -> None:
    labels = write_labels(packed, tmp_path)
    directory, _ = write_control("centre_bias", packed, labels, tmp_path)
    joined = ShardSet(packed.root, labels=directory)
    mean = np.mean([expected(joined.read(*place).key) for place in rows(joined)], axis=0)
    for place in rows(joined):
        np.testing.assert_array_equal(joined.read(*place).map, stored_of(mean))


def test_a_control_is_completed_and_refused_when_unknown(packed: ShardSet, tmp_path: Path) -> None:
    labels = write_labels(packed, tmp_path)
    directory, first = write_control("shuffled", packed, labels, tmp_path)
    for path in (directory / "manifest.json", index_path(directory / "shard-000002.tar")):
        path.unlink()
    assert write_control("shuffled", packed, labels, tmp_path)[1].digest == first.digest
    with pytest.raises(InputError, match="give one of shuffled, centre_bias"):
        write_control("random", packed, labels, tmp_path)


def test_quarantines_of_images_and_labels_are_both_respected(packed: ShardSet, tmp_path: Path) -> None:
    directory = write_labels(packed, tmp_path)
    keys = packed.keys(0)
    write_quarantine(packed.root, packed.manifest, [BadEntry(0, 1, "", "x")])
    write_quarantine(directory, read_manifest(directory), [BadEntry(0, 4, "", "x")])
    joined = ShardSet(packed.root, labels=directory)
    assert joined.keys(0) == [key for row, key in enumerate(keys) if row not in (1, 4)]
    for row in range(5):
        sample = joined.read(0, row)
        np.testing.assert_array_equal(sample.map, expected(sample.key))
    # Labels written from a set with a quarantine still have a row for every image on disk.
    again = write_labels(ShardSet(packed.root), tmp_path / "again")
    assert ShardSet(packed.root, labels=again).num_samples == 22
    shutil.rmtree(again)


def test_the_rest_of_a_repaired_set_makes_controls(packed: ShardSet, tmp_path: Path) -> None:
    labels = write_labels(packed, tmp_path)
    lost = packed.keys(0)[0]
    tar = labels / packed.manifest.files[0]
    data = bytearray(tar.read_bytes())
    data[512 + 30] ^= 1
    tar.write_bytes(data)
    for kind in CONTROLS:
        with pytest.raises(InputError, match=r"bytes have changed.*run python shards/verify\.py"):
            write_control(kind, packed, labels, tmp_path)
    write_quarantine(labels, read_manifest(labels), [BadEntry(0, 0, lost, "x")])
    mean = stored_of(
        np.mean([expected(key) for shard in range(4) for key in packed.keys(shard) if key != lost], axis=0)
    )
    digest = ShardSet(packed.root, labels=labels).digest
    for kind in CONTROLS:
        control, _ = write_control(kind, packed, labels, tmp_path)
        joined = ShardSet(packed.root, labels=control)
        # both arms of a comparison read the same samples in the same order
        assert joined.digest == digest and joined.num_samples == 22 and lost not in joined.keys(0)
        verify(VerifyConfig(path=str(control), images=str(packed.root), workers=1))
        samples = [joined.read(*place) for place in rows(joined)]
        found = sorted(sample.map.tobytes() for sample in samples)
        if kind == "shuffled":
            assert found == sorted(expected(sample.key).tobytes() for sample in samples)
            assert not any(np.array_equal(sample.map, expected(sample.key)) for sample in samples)
        else:
            assert set(found) == {mean.tobytes()}


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_of_other_labels_is_refused_and_kept(packed: ShardSet, tmp_path: Path, kind: str) -> None:
    labels = write_labels(packed, tmp_path)
    directory, _ = write_control(kind, packed, labels, tmp_path)
    before = contents(directory)
    shutil.rmtree(labels)
    write_labels(packed, tmp_path, encode=lambda key: encode_label(density_of(key, salt=1)))
    with pytest.raises(
        InputError, match=r"holds labels of other source \(\w{12}, now \w{12}\): .*move that folder away"
    ):
        write_control(kind, packed, labels, tmp_path)
    assert contents(directory) == before
    shutil.rmtree(directory)
    write_control(kind, packed, labels, tmp_path)
    # a list of bad samples changes which maps are shuffled, and the mean
    sealed = contents(directory)
    write_quarantine(labels, read_manifest(labels), [BadEntry(0, 0, "", "x")])
    with pytest.raises(InputError, match=r"holds labels of other samples .*move that folder away"):
        write_control(kind, packed, labels, tmp_path)
    directory.rename(tmp_path / "away")
    write_control(kind, packed, labels, tmp_path)
    assert contents(tmp_path / "away") == sealed
    samples = [ShardSet(packed.root, labels=place).num_samples for place in (tmp_path / "away", directory)]
    assert samples == [23, 22]


@pytest.mark.parametrize("kind", CONTROLS)
def test_a_control_that_does_not_say_what_it_was_made_of_is_read_but_not_written(
    packed: ShardSet, tmp_path: Path, kind: str
) -> None:
    labels = write_labels(packed, tmp_path)
    directory, _ = write_control(kind, packed, labels, tmp_path)
    (directory / ".settings.json").unlink()
    before = contents(directory)
    samples = ShardSet(packed.root, labels=directory)
    for _ in range(2):  # of the same labels, and of others
        with pytest.raises(InputError, match=r"no \.settings\.json that says .* give another --output"):
            write_control(kind, packed, labels, tmp_path)
        assert contents(directory) == before
        shutil.rmtree(labels)
        write_labels(packed, tmp_path, encode=lambda key: encode_label(density_of(key, salt=1)))
    assert all(samples.read(*place).map is not None for place in rows(samples))


def test_maps_that_have_no_mean_are_named(packed: ShardSet, tmp_path: Path) -> None:
    key = packed.keys(1)[3]
    sizes = write_labels(
        packed, tmp_path / "a", encode=lambda own: encode_map_png(np.ones((3, 1) if own == key else (3, 3), np.uint8))
    )
    damaged = write_labels(
        packed, tmp_path / "b", encode=lambda own: b"no PNG" if own == key else encode_label(density_of(own))
    )
    for labels, reason in ((sizes, "3x1, the others are 3x3"), (damaged, "no PNG of a sensible size")):
        with pytest.raises(InputError, match=f"shard-000001.tar: sample '{key}': label map: .*{reason}.*verify"):
            write_control("centre_bias", packed, labels, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_control_is_no_source_of_controls(packed: ShardSet, tmp_path: Path) -> None:
    control, _ = write_control("centre_bias", packed, write_labels(packed, tmp_path), tmp_path)
    with pytest.raises(InputError, match="itself a control: give the label set"):
        write_control("shuffled", packed, control, tmp_path)


@pytest.mark.parametrize("found", ["/{}/pwned" + "0" * 16, "../" + "a" * 16, "AB" * 8, "", None, 10**20, ["a" * 16]])
def test_a_hash_in_a_manifest_names_no_other_place(packed: ShardSet, tmp_path: Path, found: object) -> None:
    labels = write_labels(packed, tmp_path / "labels")
    spoil(labels, teacher={"hash": found.format(tmp_path) if isinstance(found, str) else found})
    before = contents(tmp_path)
    for kind in CONTROLS:
        with pytest.raises(InputError, match=r"manifest\.json: .*hash"):
            write_control(kind, packed, labels, tmp_path / "labels")
    assert contents(tmp_path) == before


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KNOWN = {
    "teacher": {"hash": TEACHER, "control": "shuffled", "seed": 0},
    "settings": {"size": list(SIZE), "encoding": "coco_rle"},
    "images": {"digest": "0" * 64, "name": "set"},
}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, Path]:
    """A small set and its labels."""
    root = tmp_path_factory.mktemp("fuzzed")
    for number in range(4):
        (root / "images" / "one").mkdir(parents=True, exist_ok=True)
        (root / "images" / "one" / f"{number}.jpg").write_bytes(jpeg(seed=number))
    pack(ImageFolder(root / "images"), root / "set", shard_samples=2, workers=1)
    images = ShardSet(root / "set")
    return images, write_labels(images, root / "labels")


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(CONTROLS), entry=st.sampled_from(sorted(KNOWN)))
def test_any_entry_of_a_manifest_makes_a_control_or_one_line(
    fuzzed: tuple[ShardSet, Path], data: st.DataObject, kind: str, entry: str
) -> None:
    images, labels = fuzzed
    sound = (labels / "manifest.json").read_bytes()
    value = json.loads(sound)
    if data.draw(st.booleans()):
        value[entry] = data.draw(ANYTHING)
    elif data.draw(st.booleans()):
        del value[entry]
    else:
        key = data.draw(st.sampled_from(sorted(KNOWN[entry])) | st.text())
        value[entry][key] = data.draw(st.just(KNOWN[entry].get(key)) | ANYTHING)
    with tempfile.TemporaryDirectory() as folder:
        try:
            (labels / "manifest.json").write_text(json.dumps(value))
            directory, _ = write_control(kind, images, labels, Path(folder) / "labels")
            assert directory.parent == Path(folder) / "labels"
            objects = value["settings"].get("encoding") == "coco_rle"
            assert ShardSet(images.root, labels=directory, objects=objects).num_samples == 4
        except InputError as error:
            assert "\n" not in str(error)
        finally:
            (labels / "manifest.json").write_bytes(sound)
        assert {path.name for path in Path(folder).iterdir()} <= {"labels"}


def test_what_cannot_be_written_as_json_is_refused_when_sealing(packed: ShardSet, tmp_path: Path) -> None:
    labels = write_labels(packed, tmp_path)
    (labels / "manifest.json").unlink()
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in (float("nan"), deep):
        with pytest.raises(InputError, match="teacher or settings"):
            seal_labels(labels, packed, teacher={"hash": TEACHER, "metrics": value}, settings={})
    assert not (labels / "manifest.json").exists()


def test_sealing_removes_what_dead_writers_left_and_nothing_else(packed: ShardSet, tmp_path: Path) -> None:
    labels = write_labels(packed, tmp_path)
    old, new = (f".shard-00000{number}.tar.{'0f' * 16}.tmp" for number in range(2))
    users = (".notes.tmp", "shard.tmp", ".shard-000000.tar.tmp", f".{'0f' * 16}.tmp")
    for name in (old, new, *users):
        (labels / name).write_bytes(b"x")
        if name != new:
            os.utime(labels / name, (time.time() - 90_000,) * 2)
    seal_labels(labels, packed, teacher={"hash": TEACHER}, settings={"size": list(SIZE)})
    assert {path.name for path in labels.iterdir() if path.name.endswith(".tmp")} == {new, *users}
