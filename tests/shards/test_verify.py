"""Verifying and repairing: every kind of fault is found, named and counted, and repaired sets read on."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from engine.errors import InputError
from engine.files import sha256_of
from shards.index import read_index
from shards.labels import encode_label, label_directory, labels_complete, seal_labels, write_label_shard
from shards.quarantine import BadEntry, write_quarantine
from shards.reader import ShardSet
from shards.verify import VerifyConfig, command_line, main
from shards.writer import index_path
from tests.shards.damage import tar_of

PROGRAM = Path(__file__).resolve().parents[2] / "shards" / "verify.py"
TEACHER = "cd" * 32


def verify(root: Path, capsys: pytest.CaptureFixture[str], **options: object) -> tuple[str, str]:
    """Output and error line, empty when all is good."""
    error = ""
    try:
        main(VerifyConfig(path=str(root), workers=1, **options))  # type: ignore[arg-type]
    except InputError as caught:
        error = str(caught)
    return capsys.readouterr().out, error


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def label(images: ShardSet, root: Path, *, teacher: str = TEACHER, without: tuple[str, ...] = ()) -> Path:
    directory = label_directory(root, teacher)
    for shard in range(images.manifest.num_shards):
        maps = [(key, encode_label(np.ones((4, 4)))) for key in images.keys(shard) if key not in without]
        write_label_shard(directory, images, shard, maps)
    seal_labels(directory, images, teacher={"hash": teacher}, settings={"size": [4, 4]})
    return directory


def test_sound_sets_are_counted(packed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label(packed, tmp_path / "labels")
    out, error = verify(tmp_path, capsys)
    assert error == "" and out.count("good") == 2
    assert "images: 23 samples in 1 sets" in out and "labels: 23 samples in 1 sets" in out


def test_the_program_takes_a_bare_folder_and_exits_with_2_on_a_fault(packed: ShardSet, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[1]), *sys.path])}
    command = [sys.executable, str(PROGRAM), str(packed.root)]
    good = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert good.returncode == 0 and "23 samples" in good.stdout, good.stderr
    flip(packed.root / packed.manifest.files[0], 700)
    bad = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2 and "2 faults" in bad.stdout and "--repair" in bad.stderr


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("DIR", "--path DIR"),
        ("DIR --repair", "--path DIR --repair=true"),
        ("--repair --path DIR", "--repair=true --path DIR"),
        ("--path DIR --repair false", "--path DIR --repair false"),
        ("--repair DIR", "--repair=true --path DIR"),
        ("--repair false DIR", "--repair false --path DIR"),
        ("--images I --repair DIR --workers 2", "--images I --repair=true --path DIR --workers 2"),
        ("--check --images=I DIR", "--check --images=I --path DIR"),
        ("DIR OTHER", "--path DIR OTHER"),
        ("", ""),
    ],
)
def test_short_forms_of_the_command_line(given: str, read: str) -> None:
    assert command_line(given.split()) == read.split()


def test_a_flipped_bit_is_traced_to_its_sample_and_quarantined(
    packed: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = packed.root / packed.manifest.files[2]
    index = read_index(index_path(tar))
    flip(tar, int(index.offset[4]) + 200)
    out, error = verify(packed.root, capsys)
    assert "2 faults" in error and "SHA-256" in out and f"row 4 '{index.key(4)}': its bytes have changed" in out
    out, error = verify(packed.root, capsys, repair=True)
    assert error == "" and "1 samples added to quarantine.json" in out
    again = ShardSet(packed.root)
    assert again.num_samples == 22 and index.key(4) not in again.keys(2)
    for shard, size in enumerate(again.shard_sizes):
        for row in range(size):
            again.read(shard, row)
    out, error = verify(packed.root, capsys)
    assert error == "" and "good" in out
    first = packed.root / packed.manifest.files[0]
    flip(first, int(read_index(index_path(first)).offset[0]))
    out, error = verify(packed.root, capsys, repair=True)  # a second repair adds to the first
    assert error == "" and ShardSet(packed.root).num_samples == 21


def test_a_truncated_shard_loses_only_what_is_cut_off(packed: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    tar = packed.root / packed.manifest.files[0]
    index = read_index(index_path(tar))
    os.truncate(tar, int(index.offset[5]))
    out, error = verify(packed.root, capsys)
    assert "cut short" in out and "the manifest says" in out and error
    verify(packed.root, capsys, repair=True)
    assert ShardSet(packed.root).keys(0) == index.keys()[:5]


def test_a_lost_index_is_rebuilt_exactly(packed: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    path = index_path(packed.root / packed.manifest.files[1])
    before = path.read_bytes()
    path.unlink()
    out, error = verify(packed.root, capsys)
    assert "whole shard unreadable" in out and "8 faults" in error
    out, error = verify(packed.root, capsys, repair=True)
    assert error == "" and path.read_bytes() == before and not (packed.root / "quarantine.json").exists()


def test_a_lost_tar_is_quarantined_as_a_whole(packed: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    (packed.root / packed.manifest.files[1]).unlink()
    assert verify(packed.root, capsys, repair=True)[1] == ""
    assert ShardSet(packed.root).shard_sizes.tolist() == [7, 0, 7, 2]
    assert verify(packed.root, capsys)[1] == ""


def test_swapped_shards_and_strays_are_found(packed: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (packed.root / packed.manifest.files[number] for number in (0, 1))
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1])
    b.write_bytes(contents[0])
    (packed.root / "shard-000099.tar").write_bytes(b"")
    out, error = verify(packed.root, capsys)
    assert "shard-000099.tar is not in the manifest" in out and out.count("shard-000000.tar: row") == 7 and error


def test_a_key_that_occurs_in_two_shards_is_found(packed: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed.root / "manifest.json"
    value = json.loads(path.read_text())
    for ending in ("tar", "index"):
        copy = packed.root / f"copy-000000.{ending}"
        copy.write_bytes((packed.root / f"shard-000000.{ending}").read_bytes())
    value["shards"].append(value["shards"][0] | {"file": "copy-000000.tar"})
    value["num_samples"] += 7
    value["num_bytes"] += value["shards"][0]["num_bytes"]
    path.write_text(json.dumps(value))
    out, error = verify(packed.root, capsys)
    assert "7 keys occur more than once" in out and "1 faults" in error


def test_labels_are_checked_against_their_images(
    packed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = label(packed, tmp_path / "labels")
    assert "give their folder with --images" in verify(directory, capsys)[0]
    assert verify(directory, capsys, images=str(packed.root))[1] == ""
    flip(directory / packed.manifest.files[0], 512 + 20)
    out, error = verify(directory, capsys, images=str(packed.root), repair=True)
    assert error == "" and "1 samples added" in out
    joined = ShardSet(packed.root, labels=directory)
    assert joined.num_samples == 22 and joined.shard_sizes[0] == 6


def test_damaged_labels_are_moved_away_and_written_anew(
    packed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where only the tar is moved, and the index of the old one lies there still."""
    directory = label(packed, tmp_path / "labels")
    tar = directory / packed.manifest.files[1]
    whole = tar.read_bytes()
    flip(tar, 512 + 20)
    error = verify(directory, capsys, images=str(packed.root))[1]
    assert "2 faults" in error and "pack again" not in error and "move tars and indices of those label shards" in error
    tar.rename(tmp_path / "away.tar")
    with pytest.raises(InputError, match=r"1 of 4 label shards are missing.*shard-000001"):
        seal_labels(directory, packed, teacher={"hash": TEACHER}, settings={"size": [4, 4]})
    label(packed, tmp_path / "labels")
    assert tar.read_bytes() == whole and verify(directory, capsys, images=str(packed.root))[1] == ""


def test_the_index_of_a_tar_that_is_gone_never_passes_for_a_new_ones(
    packed: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer killed between the two leaves a tar that the next one completes."""
    directory = label(packed, tmp_path / "labels")
    tar = directory / packed.manifest.files[1]
    tar.unlink()
    maps = [(key, encode_label(np.eye(4))) for key in packed.keys(1)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shards.writer.write_index", raise_interrupt)
        write_label_shard(directory, packed, 1, maps)
    assert tar.exists() and not labels_complete(directory, packed, 1)
    assert write_label_shard(directory, packed, 1, maps).sha256 == sha256_of(tar)


def raise_interrupt(*_: object) -> str:
    raise KeyboardInterrupt


def test_images_without_a_label_map_are_unusable_and_quarantined(
    packed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the reader refuses them. An image that is left out itself needs no map."""
    lost = (packed.keys(0)[2], packed.keys(2)[5])
    directory = label(packed, tmp_path / "labels", without=lost)
    out, error = verify(directory, capsys, images=str(packed.root))
    assert "2 faults" in error and f"row 2 '{lost[0]}': no label map: none was written for this image" in out
    write_quarantine(packed.root, packed.manifest, [BadEntry(0, 2, lost[0], "blurred")])
    assert "1 faults" in verify(directory, capsys, images=str(packed.root))[1]
    out, error = verify(directory, capsys, images=str(packed.root), repair=True)
    assert error == "" and "1 samples added" in out
    joined = ShardSet(packed.root, labels=directory)
    for shard, size in enumerate(joined.shard_sizes):
        for row in range(size):
            assert joined.read(shard, row).map is not None
    assert joined.num_samples == 21 and verify(directory, capsys, images=str(packed.root))[1] == ""


def damage_header(tar: Path, row: int) -> None:
    """One byte of the header before a sample's image: its bytes stay, stock webdataset loses it and all after it."""
    flip(tar, int(read_index(index_path(tar)).offset[row]) - 500)


def readable_by_webdataset(tar: Path) -> int:
    samples = webdataset.WebDataset(str(tar), shardshuffle=False, handler=webdataset.ignore_and_continue)
    return sum("jpg" in sample for sample in samples)


def test_a_quarantined_sample_hides_no_other_damage_of_its_shard(
    packed: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = packed.root / packed.manifest.files[1]
    write_quarantine(packed.root, packed.manifest, [BadEntry(1, 3, "", "blurred")])
    assert verify(packed.root, capsys)[1] == "" and readable_by_webdataset(tar) == 7
    damage_header(tar, 1)
    assert readable_by_webdataset(tar) == 1
    for repair in (False, True, False):
        out, error = verify(packed.root, capsys, repair=repair)
        assert "2 faults" in error and "SHA-256 is not the manifest's" in out and "tar: damaged header" in out


def test_repair_does_not_pass_over_a_header_when_it_finds_bad_samples(
    packed: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = packed.root / packed.manifest.files[1]
    flip(tar, int(read_index(index_path(tar)).offset[0]) + 200)
    damage_header(tar, 4)
    out, error = verify(packed.root, capsys, repair=True)
    assert (
        "2 faults" in error
        and "move the tars of those shards out of the folder and pack again" in error
        and "1 samples added" in out
    )
    assert "2 faults" in verify(packed.root, capsys)[1]


def test_damage_that_no_quarantined_sample_explains_stays_a_fault(
    packed: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end mark cut off, and a member that the index does not know."""
    write_quarantine(packed.root, packed.manifest, [BadEntry(0, 6, "", "blurred"), BadEntry(1, 6, "", "blurred")])
    cut, longer = (packed.root / name for name in packed.manifest.files[:2])
    os.truncate(cut, cut.stat().st_size - 1024)
    longer.write_bytes(longer.read_bytes()[:-1024] + tar_of({"more.jpg": b"x"}))
    out, error = verify(packed.root, capsys, repair=True)
    assert "4 faults" in error and "the end mark is missing" in out and "'more.jpg' is not in the index" in out


def test_wrong_folders_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, word in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no manifest.json")):
        out, error = verify(path, capsys)
        assert word in error and out == ""
    with pytest.raises(InputError, match="no folder given"):
        main(VerifyConfig())


def test_labels_are_checked_against_the_weights_of_their_teacher(
    packed: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "best" / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    right, wrong = label(packed, tmp_path / "a", teacher=digest), label(packed, tmp_path / "b")
    assert verify(right, capsys, images=str(packed.root), teacher=str(run))[1] == ""
    out, error = verify(wrong, capsys, images=str(packed.root), teacher=str(run))
    assert "1 faults" in error and f"teacher {TEACHER[:12]}" in out and digest[:12] in out
    with pytest.raises(InputError, match=r"no weights in .*give the run folder"):
        main(VerifyConfig(path=str(right), images=str(packed.root), teacher=str(tmp_path / "absent"), workers=1))
