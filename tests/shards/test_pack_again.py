"""A pack that is given again: lost shards of a finished set, stops in the middle, and errors that pass."""

import errno
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import Fault, InputError
from shards.pack import PackConfig, check, main, pack
from shards.reader import ShardSet
from shards.sources.base import Item, SourceConfig
from shards.sources.image_folder import ImageFolder
from tests.shards.test_pack import files


def flip(path: Path) -> None:
    """Change one byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def again(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Pack the image folder into `out`, with one unusable image; returns what the program says."""
    (image_folder / "cat" / "empty.jpg").write_bytes(b"")

    def run(**options: object) -> str:
        source, output = SourceConfig(path=str(image_folder)), str(tmp_path / "out")
        main(PackConfig(source=source, output=output, shard_samples=5, workers=2, max_bad_fraction=0.1, **options))  # type: ignore[arg-type]
        return capsys.readouterr().out

    assert "in 5 shards" in run()
    return run


def test_lost_and_cut_shards_of_a_finished_set_are_written_again(again: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    whole = files(output)
    for suffix in ("tar", "index"):
        (output / f"shard-000000.{suffix}").unlink()
    os.truncate(output / "shard-000001.tar", 1000)
    flip(output / "shard-000002.index")
    before = (output / "shard-000003.tar").stat().st_ino
    assert again() == f"{output}: 3 of 5 shards were missing or cut and are written again\n"
    assert files(output) == whole and (output / "shard-000003.tar").stat().st_ino == before
    assert again() == f"{output}: already packed, nothing to do\n"
    for path in output.glob("shard-*"):
        path.unlink()
    assert "5 of 5 shards" in again() and files(output) == whole


def test_check_says_which_shards_would_be_written_again(
    again: Callable[..., str], image_folder: Path, tmp_path: Path
) -> None:
    source, output = SourceConfig(path=str(image_folder)), tmp_path / "out"
    config = PackConfig(source=source, output=str(output), shard_samples=5)
    assert check(config)[1] == f"output {output}: 5 shards, already packed"
    (output / "shard-000001.tar").unlink()
    before = files(output)
    assert check(config)[1] == (f"output {output}: 5 shards, already packed; 1 missing or cut, to be written again")
    assert files(output) == before


def test_images_that_changed_since_never_take_the_place_of_a_shard(
    again: Callable[..., str], image_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    whole = files(output)
    for number in (0, 3):
        os.truncate(output / f"shard-00000{number}.tar", 1000)
    cut = files(output)
    shard = ShardSet(output)
    named = next(image_folder.glob(f"{shard.keys(3)[2]}.jpg"))
    old = named.read_bytes()
    flip(named)  # the same size: nothing but the bytes tells
    with pytest.raises(InputError, match=r"1 of 5 shards.*shard-000003.tar.*changed since.*delete that folder"):
        again()
    assert files(output) == cut | {"shard-000000.tar": whole["shard-000000.tar"]}
    named.write_bytes(old)
    assert "1 of 5 shards" in again() and files(output) == whole


def test_without_its_manifest_a_set_is_left_alone_and_the_remedy_named(
    again: Callable[..., str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    whole = files(output)
    (output / "manifest.json").unlink()
    before = files(output)
    with pytest.raises(InputError, match=r"without manifest.json.*delete that folder and pack again"):
        again()
    assert files(output) == before
    (output / "manifest.json").write_bytes(whole["manifest.json"][:-9])
    with pytest.raises(InputError, match=r"not a valid manifest.*to pack again, delete .*/out first"):
        again()
    shutil.rmtree(output)
    assert "in 5 shards" in again() and files(output) == whole


def test_a_kill_between_manifest_and_tidying_leaves_nothing_behind(again: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    whole = files(output)
    (output / ".packing").mkdir()
    (output / ".packing" / "lock").touch()
    assert "already packed" in again()
    assert files(output) == whole and not (output / ".packing").exists()


def test_a_kill_while_shards_are_written_again_is_taken_up(again: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    whole = files(output)
    (output / ".packing").mkdir()
    for number in (1, 2):  # the tar of the first is already in its place, the second is complete
        os.rename(output / f"shard-00000{number}.index", output / f".packing/shard-00000{number}.index")
    os.rename(output / "shard-000002.tar", output / ".packing/shard-000002.tar")
    (output / "shard-000003.tar").unlink()
    assert "3 of 5 shards" in again() and files(output) == whole


def test_too_many_unusable_images_keep_what_is_written(image_folder: Path, tmp_path: Path) -> None:
    for number in range(8):
        (image_folder / "cat" / f"empty{number}.jpg").write_bytes(b"")
    source, output = ImageFolder(image_folder), tmp_path / "out"
    with pytest.raises(InputError, match=r"raise --max_bad_fraction.*goes on.*delete"):
        pack(source, output, shard_samples=5, workers=1, name="set")
    kept = {path: path.stat().st_ino for path in output.glob("shard-*")}
    assert kept
    pack(source, output, shard_samples=5, workers=1, name="set", max_bad_fraction=0.5)
    assert {path: path.stat().st_ino for path in kept} == kept
    pack(source, tmp_path / "whole", shard_samples=5, workers=1, name="set", max_bad_fraction=0.5)
    assert files(output) == files(tmp_path / "whole")


@pytest.mark.parametrize("begun", ["nothing", "lost"])
def test_packs_that_wait_for_another_find_what_it_left(image_folder: Path, tmp_path: Path, begun: str) -> None:
    """Three at once, for a new set and for one of which tars are lost: one works, and none writes over the others'."""
    output, source = tmp_path / "out", Slow(image_folder)
    options = {"shard_samples": 5, "workers": 1, "name": "set"}
    pack(source, tmp_path / "whole", **options)
    if begun == "lost":
        shutil.copytree(tmp_path / "whole", output)
        for path in output.glob("*.tar"):
            path.unlink()
    else:
        output.mkdir()

    def one(number: int) -> None:
        time.sleep(number * 0.2)
        pack(source, output, **options)
        (tmp_path / f"done {number}").write_text(str((output / "shard-000000.tar").stat().st_ino))

    context = multiprocessing.get_context("fork")
    packs = [context.Process(target=one, args=(number,)) for number in range(3)]
    for process in packs:
        process.start()
    for process in packs:
        process.join(60)
    assert [process.exitcode for process in packs] == [0, 0, 0]
    assert len({(tmp_path / f"done {number}").read_text() for number in range(3)}) == 1
    assert files(output) == files(tmp_path / "whole")


class Slow(ImageFolder):
    """Half a second in all, so that others come in the meantime."""

    def read(self, item: Item) -> bytes:
        time.sleep(0.04)
        return super().read(item)


class Share(ImageFolder):
    """An image folder on a share: while the file `down` is there, one image cannot be read for the reason in it."""

    def read(self, item: Item) -> bytes:
        down = self.root.parent / "down"
        if item.name == "dog/010.jpg" and down.exists():
            number = int(down.read_text())
            raise OSError(number, os.strerror(number))
        return super().read(item)


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT"])
def test_errors_that_pass_end_the_pack_which_goes_on_after_them(image_folder: Path, tmp_path: Path, name: str) -> None:
    source, output = Share(image_folder), tmp_path / "out"
    pack(source, tmp_path / "whole", shard_samples=5, workers=1, name="set")
    (tmp_path / "down").write_text(str(getattr(errno, name)))
    with pytest.raises(Fault, match=r"dog/010.jpg: cannot be read.*the same command goes on"):
        pack(source, output, shard_samples=5, workers=1, name="set", max_bad_fraction=0.5)
    (tmp_path / "down").unlink()
    pack(source, output, shard_samples=5, workers=1, name="set", max_bad_fraction=0.5)
    assert files(output) == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.index"])
def test_a_folder_in_the_place_of_a_file_is_one_clear_line(
    again: Callable[..., str], tmp_path: Path, name: str
) -> None:
    output = tmp_path / "out"
    whole = files(output)
    (output / name).unlink()
    (output / name).mkdir()
    (output / "shard-000003.tar").unlink()
    with pytest.raises(InputError, match=rf"{name}: is a folder, where a file of the set belongs: move it away"):
        again()
    assert not (output / ".packing").exists()
    (output / name).rmdir()
    assert "2 of 5 shards" in again() and files(output) == whole


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(again: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    whole = files(output)
    for name in ("shard-000001.tar", "shard-000002.index"):
        (output / name).unlink()
        os.mkfifo(output / name)
    assert "2 of 5 shards" in again() and files(output) == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_keeps_the_shards_that_were_written_again_before_it(
    image_folder: Path, tmp_path: Path, workers: int
) -> None:
    source, output = Share(image_folder), tmp_path / "out"
    options = {"shard_samples": 5, "shuffle": False, "name": "set"}
    pack(source, output, workers=workers, **options)  # the image lies in the third of 5 shards
    whole = files(output)
    for path in output.glob("*.tar"):
        path.unlink()
    (tmp_path / "down").write_text(str(errno.EIO))
    with pytest.raises(Fault, match=r"the same command goes on"):
        pack(source, output, workers=workers, **options)
    kept = {path.name for path in output.glob("*.tar")}
    assert kept >= {"shard-000000.tar", "shard-000001.tar"} and "shard-000002.tar" not in kept
    assert files(output).items() <= whole.items()
    (tmp_path / "down").unlink()
    pack(source, output, workers=workers, **options)
    assert files(output) == whole


@pytest.mark.parametrize("name", ["ENOENT", "EACCES"])
def test_a_file_that_is_gone_or_forbidden_is_left_out(image_folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "down").write_text(str(getattr(errno, name)))
    manifest = pack(Share(image_folder), tmp_path / "out", workers=1, max_bad_fraction=0.5)
    assert manifest.extra["source"]["skipped"] == [["dog/010.jpg", os.strerror(getattr(errno, name))]]
