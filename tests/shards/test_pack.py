"""Packing: deterministic, killed and resumed to the same bytes, and one clear line for every mistake."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from engine.errors import InputError
from engine.progress import ProgressBar
from shards import owning, packing
from shards.decode import decode_rgb
from shards.pack import PackConfig, check, pack
from shards.plan import make_plan
from shards.reader import ShardSet
from shards.sources.base import Item, SourceConfig
from shards.sources.image_folder import ImageFolder
from shards.sources.salicon import Salicon
from shards.writer import ShardWriter

PROGRAM = Path(__file__).resolve().parents[2] / "shards" / "pack.py"


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def command(source: Path, output: Path, *options: str) -> list[str]:
    return [
        sys.executable, str(PROGRAM), "--source.kind", "image_folder", "--source.path", str(source),
        "--output", str(output), *options,
    ]  # fmt: skip


def run(arguments: list[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[1]), *sys.path])}
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_the_bytes_do_not_depend_on_processes_or_time(image_folder: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 3)):
        pack(ImageFolder(image_folder), tmp_path / name, shard_samples=5, workers=workers, name="set")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 11  # 5 tars, 5 indices, 1 manifest


def test_the_program_packs_and_says_when_there_is_nothing_to_do(image_folder: Path, tmp_path: Path) -> None:
    arguments = command(image_folder, tmp_path / "out", "--shard_samples", "8", "--workers", "2")
    done = run(arguments, cwd=tmp_path)
    assert done.returncode == 0 and "23 samples in 3 shards" in done.stdout, done.stderr
    before = files(tmp_path / "out")
    again = run(arguments, cwd=tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    other = run([*arguments, "--seed", "1"], cwd=tmp_path)
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "other images or options" in other.stderr
    assert files(tmp_path / "out") == before


def test_killed_at_any_time_and_resumed_is_byte_identical(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    """The packing process dies at random moments, again and again; its own processes must notice by themselves."""
    source = tmp_path / "images"
    source.mkdir()
    pictures = [jpeg(seed=number, height=300, width=400) for number in range(20)]
    for number in range(300):
        (source / f"{number:04d}.jpg").write_bytes(pictures[number % 20])
    options = ("--shard_samples", "10", "--name", "set", "--max_side", "390", "--workers", "2")
    assert run(command(source, tmp_path / "whole", *options), cwd=tmp_path).returncode == 0
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[1]), *sys.path])}
    chance, found, output = random.Random(0), [], tmp_path / "killed"
    for target in (0, 1, 4, 9, 15):
        process = subprocess.Popen(
            command(source, output, *options), env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and not (output.exists() and len(list(output.glob("*.index"))) >= target):
            time.sleep(0.001)
        time.sleep(chance.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found.append(len(list(output.glob("*.index"))))
    assert any(0 < count < 30 for count in found), found  # some kills fell in the middle
    finished = run(command(source, output, *options), cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert files(output) == files(tmp_path / "whole")


def test_two_packs_into_one_folder_are_refused(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owning, "LOCK_WAIT_S", 0.2)
    source = ImageFolder(image_folder)
    with owning.exclusive(tmp_path / "out", "digest"), pytest.raises(InputError, match="another process is packing"):
        pack(source, tmp_path / "out", workers=1)


def test_a_full_disk_is_one_clear_line_and_the_pack_goes_on_after_it(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardWriter._write

    def full(writer: ShardWriter, data: bytes) -> None:
        if writer.path.name == "shard-000003.tar":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, data)

    source = ImageFolder(image_folder)
    pack(source, tmp_path / "whole", shard_samples=5, workers=1, name="set")
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", full)
        with pytest.raises(InputError, match=r"No space left on device.*goes on where it stopped"):
            pack(source, tmp_path / "full", shard_samples=5, workers=1, name="set")
    complete = len(list((tmp_path / "full").glob("*.index")))
    assert complete >= 3 and not list((tmp_path / "full").glob("*.tmp"))
    bars: list[ProgressBar] = []
    monkeypatch.setattr(
        packing, "ProgressBar", lambda *args, **options: bars.append(ProgressBar(*args, **options)) or bars[0]
    )
    pack(source, tmp_path / "full", shard_samples=5, workers=1, name="set")
    assert files(tmp_path / "full") == files(tmp_path / "whole")
    # the last shard, of 3, is written by whoever comes to it
    assert (bars[0].total, bars[0].count, bars[0].done) == (23, 23, 15 if complete == 3 else 18)


def test_the_time_left_goes_by_the_items_of_this_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log = [0.0], io.StringIO()
    monkeypatch.setattr("engine.progress.time.monotonic", lambda: now[0])
    bar = ProgressBar(1_000_000, "packing", stream=log, done=900_000)
    for seconds, items in ((10, 0), (20, 100), (30, 3900), (530, 96_000)):
        now[0] = seconds
        bar.update(items)
    assert log.getvalue().splitlines() == [
        "packing: 900000/1000000 (10.0 s)",
        "packing: 900100/1000000 (20.0 s, ETA 5h33m)",
        "packing: 904000/1000000 (30.0 s, ETA 12m00s)",
        "packing: 1000000/1000000 (530.0 s)",
    ]
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with ProgressBar(1000, "packing", stream=terminal, done=900):
        pass
    assert "900/1000" in terminal.getvalue()


def test_every_shard_is_a_fair_sample_unless_told_otherwise(image_folder: Path, tmp_path: Path) -> None:
    pack(ImageFolder(image_folder), tmp_path / "mixed", shard_samples=8, workers=1)
    pack(ImageFolder(image_folder), tmp_path / "sorted", shard_samples=8, workers=1, shuffle=False)
    mixed, ordered = ShardSet(tmp_path / "mixed"), ShardSet(tmp_path / "sorted")
    assert {mixed.read(0, row).label for row in range(8)} == {0, 1, 2}
    keys = [key for shard in range(3) for key in ordered.keys(shard)]
    assert keys == sorted(keys)
    assert sorted(keys) == sorted(key for shard in range(3) for key in mixed.keys(shard))


def test_shards_come_out_near_the_target_size() -> None:
    rng = np.random.default_rng(0)
    items = [Item(f"{number}.jpg", int(size)) for number, size in enumerate(rng.integers(1_000, 200_000, 5000))]
    plan = make_plan(items, shard_bytes=10_000_000, shard_samples=None, seed=0, settings={})
    sizes = [sum(item.size for item in shard) for shard in plan.shards]
    assert sorted(item.name for shard in plan.shards for item in shard) == sorted(item.name for item in items)
    assert 0.9 * 10e6 < np.mean(sizes) < 1.1 * 10e6 and max(sizes) - min(sizes) < 500_000


def test_unusable_images_are_left_out_and_counted_or_stop_the_pack(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "cat" / "empty.jpg").write_bytes(b"")
    (image_folder / "dog" / "text.jpg").write_text("not an image")
    source = ImageFolder(image_folder)
    with pytest.raises(InputError, match=r"\d of 25 images cannot be used, at most 0 may be left out"):
        pack(source, tmp_path / "strict", workers=1)
    manifest = pack(source, tmp_path / "lenient", workers=1, max_bad_fraction=0.1)
    assert manifest.num_samples == 23 and manifest.extra["source"]["num_skipped"] == 2
    assert sorted(manifest.extra["source"]["skipped"]) == [
        ["cat/empty.jpg", "zero bytes"],
        ["dog/text.jpg", "not an image of a known format"],
    ]


def test_decode_finds_images_that_only_look_right(image_folder: Path, tmp_path: Path) -> None:
    path = image_folder / "cat" / "000.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    assert pack(ImageFolder(image_folder), tmp_path / "headers", workers=1).num_samples == 23
    manifest = pack(ImageFolder(image_folder), tmp_path / "all", workers=1, decode=True, max_bad_fraction=0.1)
    assert manifest.num_samples == 22 and manifest.extra["source"]["skipped"][0][0] == "cat/000.jpg"


def test_bytes_pass_through_and_other_formats_become_png(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    root = tmp_path / "images"
    root.mkdir()
    picture = Image.open(io.BytesIO(jpeg()))
    picture.save(root / "really_png.jpg", "PNG")
    picture.save(root / "lossless.bmp")
    (root / "photo.jpeg").write_bytes(jpeg(seed=5))
    pack(ImageFolder(root), tmp_path / "set", workers=1, shuffle=False)
    shards = ShardSet(tmp_path / "set")
    assert shards.classes == () and [shards.read(0, row).label for row in range(3)] == [-1] * 3
    images = {shards.read(0, row).key: shards.read(0, row).image for row in range(3)}
    assert images["photo"] == jpeg(seed=5) and images["really_png"] == (root / "really_png.jpg").read_bytes()
    assert images["lossless"][:4] == b"\x89PNG"
    np.testing.assert_array_equal(decode_rgb(images["lossless"]), np.asarray(picture.convert("RGB")))
    tar = (tmp_path / "set" / "shard-000000.tar").read_bytes()
    assert b"photo.jpg" in tar and b"really_png.png" in tar and b"lossless.png" in tar


def test_max_side_scales_images_fixations_and_sigma(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    for folder in ("images/train", "fixations/train"):
        (tmp_path / "s" / folder).mkdir(parents=True)
    (tmp_path / "s/images/train/a.jpg").write_bytes(jpeg(height=480, width=640))
    gaze = np.zeros(1, dtype=[("fixations", object)])
    gaze[0]["fixations"] = np.array([[1, 1], [640, 480], [321, 241]])
    savemat(tmp_path / "s/fixations/train/a.mat", {"gaze": gaze})
    manifest = pack(Salicon(tmp_path / "s"), tmp_path / "set", workers=1, max_side=320)
    sample = ShardSet(tmp_path / "set").read(0, 0)
    assert decode_rgb(sample.image).shape == (240, 320, 3)
    assert sample.info() == {
        "width": 320, "height": 240, "name": "train/a.jpg", "fixations": [[[0, 0], [319, 239], [160, 120]]],
    }  # fmt: skip
    assert manifest.extra["gaze"] == {"edition": "salicon-2017", "sigma": 9.5}


def test_clashing_names_are_refused_before_anything_is_written(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "cat" / "000.png").write_bytes((image_folder / "cat" / "000.jpg").read_bytes())
    with pytest.raises(InputError, match="would both get the key 'cat/000'"):
        pack(ImageFolder(image_folder), tmp_path / "set", workers=1)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("prepare", "word"),
    [
        (lambda root: (root / "file").write_text("x"), "is not empty"),
        (lambda root: root.rmdir() or root.write_text("x"), "is a file"),
    ],
)
def test_an_output_that_is_taken_is_left_alone(
    image_folder: Path, tmp_path: Path, prepare: Callable[[Path], object], word: str
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    prepare(output)
    before = files(tmp_path)
    with pytest.raises(InputError, match=word):
        pack(ImageFolder(image_folder), output, workers=1)
    assert files(tmp_path) == before


def test_an_unfinished_pack_of_other_images_is_refused(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out/.packing").mkdir(parents=True)
    (tmp_path / "out/.packing/plan.json").write_text(json.dumps({"plan": "another"}))
    with pytest.raises(InputError, match="unfinished pack of other images or options"):
        pack(ImageFolder(image_folder), tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--output", ""], "set --output"),
        (["--source.path", "nowhere"], "nowhere: no such folder"),
        (["--source.kind", "zip"], "source.kind"),
        (["--sed", "1"], "Did you mean 'seed'?"),
        (["--shard_samples", "0"], "shard_samples"),
        (["--quality", "100"], "quality"),
        (["--source.split", "train"], "image_folder has no such option"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_and_exit_code_2(
    image_folder: Path, tmp_path: Path, options: list[str], word: str
) -> None:
    result = run(command(image_folder, tmp_path / "out", *options), cwd=tmp_path)
    assert result.returncode == 2 and word in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "out").exists()


def test_check_reads_and_writes_nothing(image_folder: Path, tmp_path: Path) -> None:
    lines = check(PackConfig(source=SourceConfig(path=str(image_folder)), output=str(tmp_path / "out")))
    assert "23 images, 3 classes, no gaze" in lines[0] and not (tmp_path / "out").exists()
