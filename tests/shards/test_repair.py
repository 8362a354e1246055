"""What `verify.py --repair` gives back: lost indices as they were, and quarantined samples that are sound again."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.files import sha256_of
from shards.folder import open_folder
from shards.index import read_index
from shards.manifest import read_manifest
from shards.opening import read_shard_index
from shards.pack import pack
from shards.quarantine import BadEntry, write_quarantine
from shards.reader import ShardSet
from shards.sources.image_folder import ImageFolder
from shards.writer import index_path
from tests.shards.damage import manifest_of, tar_of
from tests.shards.test_verify import flip, label, verify


def files_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def packed_without(images: Path, output: Path, *, more: int = 0) -> ShardSet:
    """23 images of which 6 are unusable, and `more` other unusable ones, in shards of 7."""
    for path in sorted(images.rglob("*.jpg"))[::4]:
        path.write_bytes(b"no image")
    for number in range(more):
        (images / "cat" / f"more {number}.jpg").write_bytes(b"no image")
    pack(ImageFolder(images), output, shard_samples=7, max_bad_fraction=1.0, workers=1)
    return ShardSet(output)


def read_all(root: Path, labels: Path | None = None) -> int:
    shards = ShardSet(root, labels=labels)
    return sum(bool(shards.read(shard, row)) for shard, n in enumerate(shards.shard_sizes) for row in range(n))


def test_lost_indices_come_back_with_the_images_that_packing_left_out(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(packed_without(image_folder, tmp_path / "set").root)
    before = files_of(root)
    skipped = [len(read_index(path).skipped) for path in sorted(root.glob("*.index"))]
    assert sum(skipped) == 6 and sum(n > 0 for n in skipped) > 1
    for path in root.glob("*.index"):
        path.unlink()
    out, error = verify(root, capsys, repair=True)
    assert error == "" and out.count("index rebuilt\n") == len(skipped) and files_of(root) == before
    assert read_all(root) == 17


def test_an_index_of_names_that_nothing_else_holds_is_made_without_them(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest names the first 20 images left out; no sample is lost, and the set is the same one."""
    packed = packed_without(image_folder, tmp_path / "set", more=25)
    root, last = Path(packed.root), packed.manifest.num_shards - 1
    path = index_path(root / packed.manifest.files[last])
    assert read_index(path).skipped
    path.write_bytes(b"damaged")
    before = files_of(root)
    out, error = verify(root, capsys, repair=True)
    assert error == "" and "index rebuilt but for the names of images left out; manifest.json has its new hash" in out
    after = files_of(root)
    assert after.pop(f"{path.name}.damaged") == b"damaged"
    assert {name for name in before if after[name] != before[name]} == {path.name, "manifest.json"}
    old, new = packed.manifest, read_manifest(root)
    assert new.digest == old.digest and new.extra == old.extra
    assert [new.hash_of(n, "index_sha256") == old.hash_of(n, "index_sha256") for n in range(last + 1)] == (
        [True] * last + [False]
    )
    assert verify(root, capsys)[1] == "" and read_all(root) == 17 == packed.num_samples


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_repair_that_is_killed_keeps_the_damaged_index(
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    """At each of its renames: the damaged index put aside, and the new files put in place."""
    packed = packed_without(image_folder, tmp_path / "set", more=25)
    root = Path(packed.root)
    path = index_path(root / packed.manifest.files[-1])
    path.write_bytes(b"damaged")
    rename, renames = os.rename, [0]

    def killed(source: Path, target: Path) -> None:
        renames[0] += 1
        if renames[0] == killed_at:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        verify(root, capsys, repair=True)
    assert verify(root, capsys, repair=True)[1] == "" and verify(root, capsys)[1] == "" and read_all(root) == 17
    assert path.with_name(f"{path.name}.damaged").read_bytes() == b"damaged"


def test_pack_restores_a_shard_whose_index_was_made_without_names(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = packed_without(image_folder, tmp_path / "set", more=25)
    root, tar = Path(packed.root), packed.manifest.files[-1]
    whole = files_of(root)
    index_path(root / tar).unlink()
    assert verify(root, capsys, repair=True)[1] == "" and files_of(root) != whole
    (root / tar).unlink()
    manifest = pack(ImageFolder(image_folder), root, shard_samples=7, max_bad_fraction=1.0, workers=1)
    assert files_of(root) == whole and manifest.hash_of(-1, "index_sha256") == sha256_of(index_path(root / tar))


def test_a_damaged_index_still_tells_what_packing_left_out(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = packed_without(image_folder, tmp_path / "set", more=25)
    root = Path(packed.root)
    before = files_of(root)
    path = index_path(root / packed.manifest.files[-1])
    path.write_bytes(path.read_bytes()[:-1] + b"?")  # the last byte of the last key
    assert verify(root, capsys, repair=True)[1] == "" and files_of(root) == before


@pytest.mark.parametrize("damage", ["lost", "damaged"])
def test_rows_without_a_label_are_known_from_the_images(
    packed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    directory = label(packed, tmp_path / "labels", without=(packed.keys(1)[2],))
    path = index_path(directory / packed.manifest.files[1])
    exact = path.read_bytes()
    path.unlink() if damage == "lost" else flip(path, 300)
    before = files_of(directory)
    out, error = verify(directory, capsys, repair=True)
    assert "give their folder with --images" in out and error and files_of(directory) == before
    out, error = verify(directory, capsys, repair=True, images=str(packed.root))
    assert error == "" and path.read_bytes() == exact and "1 samples added to quarantine.json" in out
    assert read_all(Path(packed.root), directory) == 22


def test_images_are_repaired_before_their_labels(
    packed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = label(packed, tmp_path / "a labels", without=(packed.keys(1)[2],))
    expected = [index_path(root / packed.manifest.files[1]) for root in (Path(packed.root), directory)]
    before = [path.read_bytes() for path in expected]
    for path in expected:
        path.unlink()
    assert verify(tmp_path, capsys, repair=True)[1] == ""
    assert [path.read_bytes() for path in expected] == before and read_all(Path(packed.root), directory) == 22


def test_a_shard_without_index_whose_tar_has_changed_is_left_as_it_is(
    packed: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing tells which of its samples are sound, so none is left out before its owner gives them all up."""
    root = Path(packed.root)
    tar = root / packed.manifest.files[1]
    flip(tar, int(read_index(index_path(tar)).offset[3]))
    index_path(tar).unlink()
    before = files_of(root)
    out, error = verify(root, capsys, repair=True)
    assert "left as it is: its tar is not the manifest's either" in out and "8 faults" in error
    assert files_of(root) == before
    tar.unlink()
    out, error = verify(root, capsys, repair=True)
    assert error == "" and "7 samples added to quarantine.json" in out and read_all(root) == 16


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("index", ["index there", "index lost"])
def test_what_is_no_file_in_the_place_of_a_tar_costs_no_samples(
    packed: ShardSet, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], index: str
) -> None:
    root = Path(packed.root)
    tar = root / packed.manifest.files[1]
    tar.unlink()
    make(tar)
    if index == "index lost":
        index_path(tar).unlink()
    out, error = verify(root, capsys, repair=True)
    assert f"left as it is: {tar.name} is no file: move away what is there" in out and "8 faults" in error
    assert not (root / "quarantine.json").exists()


def test_a_folder_in_the_place_of_an_index_is_left_alone(packed: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(packed.root)
    path = index_path(root / packed.manifest.files[1])
    before = path.read_bytes()
    path.unlink()
    path.mkdir()
    out, error = verify(root, capsys, repair=True)
    assert f"left as it is: {path.name} is a folder: move it away" in out and "8 faults" in error and path.is_dir()
    path.rmdir()
    assert verify(root, capsys, repair=True)[1] == "" and path.read_bytes() == before


def test_a_tar_that_no_index_fits_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class of 40 digits, in a tar that the manifest promises."""
    tar = tmp_path / "shard-000000.tar"
    tar.write_bytes(tar_of({"a.jpg": b"x", "a.cls": b"9" * 40}))
    size = tar.stat().st_size
    value = manifest_of(shard={"num_bytes": size, "sha256": sha256_of(tar)}, num_bytes=size)
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    out, error = verify(tmp_path, capsys, repair=True)
    assert "left as it is: no index fits both tar and manifest" in out and "2 faults" in error
    assert sorted(files_of(tmp_path)) == ["manifest.json", "shard-000000.tar"]


def test_samples_come_back_with_their_shard(
    packed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(packed.root)
    tar = root / packed.manifest.files[1]
    shutil.move(tar, tmp_path / "away.tar")
    assert verify(root, capsys, repair=True)[1] == "" and ShardSet(root).num_samples == 16
    assert ShardSet(root).digest != packed.digest
    shutil.move(tmp_path / "away.tar", tar)
    out, error = verify(root, capsys)
    assert error == "" and "7 samples left out are sound again: --repair lets them back in" in out
    assert ShardSet(root).num_samples == 16
    out, error = verify(root, capsys, repair=True)
    assert error == "" and "7 samples are sound again and were taken out of quarantine.json" in out
    assert not (root / "quarantine.json").exists() and ShardSet(root).digest == packed.digest and read_all(root) == 23


def test_samples_that_are_still_damaged_stay_left_out(packed: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(packed.root)
    tar = root / packed.manifest.files[2]
    index = read_index(index_path(tar))
    for row in (1, 4):
        flip(tar, int(index.offset[row]) + 200)
    verify(root, capsys, repair=True)
    flip(tar, int(index.offset[4]) + 200)
    assert "sound again" not in verify(root, capsys, decode=False, repair=True)[0]
    assert verify(root, capsys, repair=True)[1] == ""
    assert ShardSet(root).keys(2) == [key for row, key in enumerate(index.keys()) if row != 1]


def test_a_shard_that_was_left_out_for_its_index_comes_back(
    packed: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(packed.root)
    index_path(root / packed.manifest.files[1]).unlink()
    write_quarantine(root, packed.manifest, [BadEntry(1, row, "", "whole shard unreadable") for row in range(7)])
    assert verify(root, capsys, repair=True)[1] == "" and read_all(root) == 23
    assert len(read_shard_index(open_folder(root), packed.manifest, 1)) == 7
