"""Sources in their true public layouts, and what each refuses."""

import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
from scipy.io import savemat
from scipy.ndimage import gaussian_filter

from engine.errors import Fault, InputError
from shards.decode import decode_rgb
from shards.pack import pack
from shards.reader import ShardSet
from shards.sources.base import SourceConfig, from_matlab, make_source
from shards.sources.cifar import Cifar
from shards.sources.image_folder import ImageFolder
from shards.sources.osie import Osie
from shards.sources.salicon import Salicon
from shards.sources.tars import Tars

HEIGHT, WIDTH = 240, 320
SIGMA = 19 / 640 * WIDTH

Points = list[np.ndarray]


def test_matlab_positions_become_pixel_indices() -> None:
    points = np.array([[1, 1], [320, 240], [1.2, 799.4], [2.5, 2.4], [np.nan, 3]])
    assert from_matlab(points) == [[0, 0], [319, 239], [0, 798], [2, 1]]
    assert from_matlab(points[:2], swapped=True) == [[0, 0], [239, 319]]
    assert from_matlab(np.zeros((0, 2))) == []


def observers(seed: int) -> Points:
    """Three observers' (x, y) pixel indices counted from 0, off-centre and wider than high."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform((60, 40), (260, 120))
    points = [np.rint(rng.normal(centre, (30, 12), (9, 2))).astype(int) for _ in range(3)]
    return [np.clip(one, 0, (WIDTH - 1, HEIGHT - 1)) for one in points]


def map_of(points: Points) -> np.ndarray:
    counts = np.zeros((HEIGHT, WIDTH))
    for x, y in np.concatenate(points):
        counts[y, x] += 1
    blurred = gaussian_filter(counts, SIGMA, mode="constant")
    return np.rint(255 * blurred / blurred.max()).astype(np.uint8)


def write_mat(path: Path, points: list[np.ndarray]) -> None:
    """The 2017 layout: struct array `gaze` with location, timestamp, fixations."""
    gaze = np.zeros((len(points), 1), dtype=[("location", object), ("timestamp", object), ("fixations", object)])
    for number, one in enumerate(points):
        gaze[number, 0]["location"] = one + 0.25
        gaze[number, 0]["timestamp"] = np.arange(len(one))[:, None]
        gaze[number, 0]["fixations"] = one
    savemat(path, {"image": path.stem, "resolution": np.array([[HEIGHT, WIDTH]]), "gaze": gaze})


@pytest.fixture
def salicon(tmp_path: Path, jpeg: Callable[..., bytes]) -> Callable[..., Path]:
    """Write a SALICON folder; `change` distorts what goes into the gaze files (positions counted from 1)."""

    def make(
        *, edition: str = "2017", flat: bool = False, change: Callable[[np.ndarray], np.ndarray] = lambda p: p
    ) -> Path:
        root = tmp_path / "salicon"
        for split, count in (("train", 6), ("val", 3)):
            sub = "" if flat else f"{split}/"
            for folder in ("images", "fixations", "maps"):
                (root / folder / sub).mkdir(parents=True, exist_ok=True)
            content: dict[str, list[Any]] = {"images": [], "annotations": []}
            for number in range(count):
                name = f"COCO_{split}2014_{number:012d}"
                points = observers(number)
                (root / f"images/{sub}{name}.jpg").write_bytes(jpeg(seed=number, height=HEIGHT, width=WIDTH))
                cv2.imwrite(str(root / f"maps/{sub}{name}.png"), map_of(points))
                if edition == "2017":
                    write_mat(root / f"fixations/{sub}{name}.mat", [change(one + 1) for one in points])
                content["images"].append({"id": number, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
                content["annotations"] += [
                    {"image_id": number, "worker_id": w, "fixations": change(one + 1)[:, ::-1].tolist()}
                    for w, one in enumerate(points)
                ]
            if edition == "2015":
                (root / f"fixations_{split}2014.json").write_text(json.dumps(content))
        return root

    return make


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("edition", ["2017", "2015"])
def test_salicon_fixations_come_out_as_x_y_from_0(salicon: Callable[..., Path], edition: str, flat: bool) -> None:
    root = salicon(edition=edition, flat=flat)
    for split, count in (("train", 6), ("val", 3), ("all", 9)):
        source = Salicon(root, split=split)
        items = source.items()
        assert len(items) == count and source.gaze == {"edition": f"salicon-{edition}", "sigma": SIGMA}
        for item in items:
            number = int(item.name.split("_")[-1].split(".")[0])
            assert source.fixations(item) == [one.tolist() for one in observers(number)]
        assert source.describe()["maps_compared"] is True


@pytest.mark.parametrize("edition", ["2017", "2015"])
def test_swapped_axes_are_refused_with_a_hint(salicon: Callable[..., Path], edition: str) -> None:
    root = salicon(edition=edition, change=lambda points: points[:, ::-1])
    with pytest.raises(InputError, match=r"x and y look swapped.*axes exchanged"):
        Salicon(root)
    assert Salicon(root, compare_maps=False).describe()["maps_compared"] is False


@pytest.mark.parametrize("edition", ["2017", "2015"])
def test_positions_counted_from_0_are_refused_with_a_hint(salicon: Callable[..., Path], edition: str) -> None:
    root = salicon(edition=edition, change=lambda points: points - 1)
    with pytest.raises(InputError, match=r"count from 0.*add 1"):
        Salicon(root)


def test_maps_of_other_images_are_refused(salicon: Callable[..., Path]) -> None:
    root = salicon()
    for path in root.rglob("maps/*/*.png"):
        cv2.imwrite(str(path), map_of([np.array([[5, 230], [315, 5], [300, 235]])]))
    with pytest.raises(InputError, match="different images or editions"):
        Salicon(root)


def test_two_editions_in_one_folder_need_a_choice(salicon: Callable[..., Path]) -> None:
    salicon(edition="2017")
    root = salicon(edition="2015")
    with pytest.raises(InputError, match=r"two editions.*--source.edition 2015 or 2017"):
        Salicon(root)
    for edition in ("2015", "2017"):
        assert Salicon(root, edition=edition).gaze == {"edition": f"salicon-{edition}", "sigma": SIGMA}
    assert Salicon(root, edition="simulated").gaze == {"edition": "simulated", "sigma": SIGMA}


@pytest.mark.parametrize(("there", "asked"), [("2015", "2017"), ("2017", "2015"), ("2015", "simulated")])
def test_an_edition_whose_files_are_not_there_is_refused(salicon: Callable[..., Path], there: str, asked: str) -> None:
    with pytest.raises(InputError, match=rf"edition {asked} is .* none found.*or give {there}"):
        Salicon(salicon(edition=there), edition=asked)


def test_gaze_that_cannot_be_read_for_now_ends_the_pack(salicon: Callable[..., Path], tmp_path: Path) -> None:
    source = Salicon(salicon())
    path = tmp_path / "salicon/fixations/train/COCO_train2014_000000000002.mat"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a plain file to open, and EIO to read
    with pytest.raises(Fault, match=r"000002.mat: cannot be read.*Input/output error"):
        pack(source, tmp_path / "set", workers=1, max_bad_fraction=0.5)


def test_salicon_without_its_parts_is_refused(salicon: Callable[..., Path], tmp_path: Path) -> None:
    root = salicon()
    with pytest.raises(InputError, match="no images of split 'test'"):
        Salicon(root, split="test")
    (root / "fixations/val/COCO_val2014_000000000001.mat").unlink()
    with pytest.raises(InputError, match=r"no gaze for 1 of 3 images.*COCO_val2014_000000000001"):
        Salicon(root, split="val")
    (root / "fixations/val/COCO_val2014_000000000001.mat").write_bytes(b"MATLAB 5.0 but not really")
    with pytest.raises(InputError, match="damaged MATLAB file"):
        Salicon(root, split="val")
    (tmp_path / "other/images").mkdir(parents=True)
    with pytest.raises(InputError, match="no images in it"):
        Salicon(tmp_path / "other")
    with pytest.raises(InputError, match="no images/ in it"):
        Salicon(tmp_path)


def write_osie(root: Path, jpeg: Callable[..., bytes], *, count: int) -> None:
    for folder in ("stimuli", "eye", "mouse_lab"):
        (root / "data" / folder).mkdir(parents=True)
    fixations = np.zeros((count, 1), dtype=object)
    for number in range(count):
        name = f"{1001 + number}"
        (root / f"data/stimuli/{name}.jpg").write_bytes(jpeg(seed=number))
        subjects = np.zeros((2, 1), dtype=object)
        for s in range(2):
            subjects[s, 0] = {"fix_x": np.array([[10.2 + number, 3.0]]), "fix_y": np.array([[5.0, 7.6 + s]])}
        fixations[number, 0] = {"img": f"{name}.jpg", "subjects": subjects}
        mouse = {"subj": np.array([[1], [1], [4]]), "coord": np.array([[2, 9], [3, 8], [24, 32]])}
        savemat(root / f"data/mouse_lab/{name}.mat", {"fixations": mouse})
    savemat(root / "data/eye/fixations.mat", {"fixations": fixations})


def test_osie_eye_and_mouse_and_the_fixed_split(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    write_osie(tmp_path, jpeg, count=203)
    everything = [item.name for item in Osie(tmp_path).items()]
    assert everything == sorted(everything) and len(everything) == 203
    assert [item.name for item in Osie(tmp_path, split="train").items()] == everything[:3]
    val = Osie(tmp_path, split="val")
    assert [item.name for item in val.items()] == everything[3:]
    assert val.fixations(val.items()[0]) == [[[12, 4], [2, 7]], [[12, 4], [2, 8]]]
    assert val.gaze == {"edition": "osie-eye", "sigma": 24.0}
    mouse = Osie(tmp_path, split="val", tracking="mouse")
    assert mouse.fixations(mouse.items()[0]) == [[[8, 1], [7, 2]], [[31, 23]]]  # row, column to x, y
    assert mouse.gaze == {"edition": "osie-mouse", "sigma": 24.0}


def test_osie_refusals(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    write_osie(tmp_path, jpeg, count=5)
    with pytest.raises(InputError, match="needs more than 200"):
        Osie(tmp_path, split="train")
    with pytest.raises(InputError, match="no split 'test'"):
        Osie(tmp_path, split="test")
    (tmp_path / "data/stimuli/2000.jpg").write_bytes(jpeg())
    for tracking in ("eye", "mouse"):
        with pytest.raises(InputError, match=r"no gaze for 1 images, the first is 2000.jpg"):
            make_source(SourceConfig(kind="osie", path=str(tmp_path), tracking=tracking))  # type: ignore[arg-type]
    (tmp_path / "data/eye/fixations.mat").unlink()
    with pytest.raises(InputError, match=r"fixations.mat: not found"):
        Osie(tmp_path)
    with pytest.raises(InputError, match="no data/stimuli"):
        Osie(tmp_path / "data/eye")


def test_image_folder_refusals(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    with pytest.raises(InputError, match="no folder given"):
        ImageFolder("")
    with pytest.raises(InputError, match="no such folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no images in it"):
        ImageFolder(tmp_path)
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "train/cat/a.jpg").write_bytes(jpeg())
    with pytest.raises(InputError, match=r"are splits \(train\), not classes.*train"):
        ImageFolder(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        ImageFolder(tmp_path / "train/cat/a.jpg")
    (tmp_path / "train/dog").mkdir()
    with pytest.raises(InputError, match=r"dog: a class folder without images"):
        ImageFolder(tmp_path / "train")
    (tmp_path / "train/dog/b.jpg").write_bytes(jpeg())
    (tmp_path / "train/stray.jpg").write_bytes(jpeg())
    with pytest.raises(InputError, match="lie beside folders"):
        ImageFolder(tmp_path / "train")


def test_image_folder_follows_links_but_not_in_circles(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/a.jpg").write_bytes(jpeg())
    (tmp_path / "set").mkdir()
    (tmp_path / "set/cat").symlink_to(tmp_path / "store")
    (tmp_path / "store/circle").symlink_to(tmp_path / "set")
    (tmp_path / "store/.hidden.jpg").write_bytes(b"")
    assert [item.name for item in ImageFolder(tmp_path / "set").items()] == ["cat/a.jpg"]
    (tmp_path / "store/b.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="dangling link"):
        ImageFolder(tmp_path / "set")


def test_file_names_that_are_not_utf8_get_a_key(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    with open(name, "wb") as file:
        file.write(jpeg())
    pack(ImageFolder(tmp_path), tmp_path.parent / f"{tmp_path.name}-set", workers=1)
    assert ShardSet(tmp_path.parent / f"{tmp_path.name}-set").keys(0) == ["caf\\udce9"]


def write_tar(path: Path, contents: dict[str, bytes], *, link: bytes = b"") -> None:
    """`link`: type of one more member, which is no plain file."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("link.jpg")
            info.type, info.linkname = link, "/etc/passwd"
            archive.addfile(info)


def test_tars_with_folders_with_classes_and_one_per_class(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    a, b = jpeg(seed=1), jpeg(seed=2)
    write_tar(tmp_path / "x.tar", {"./dog/1.jpg": a, "./cat/2.jpg": b, "./notes.txt": b"-"})
    source = Tars(tmp_path / "x.tar")
    assert source.classes == ("cat", "dog")
    assert [(item.name, item.label, source.read(item)) for item in source.items()] == [
        ("cat/2.jpg", 0, b), ("dog/1.jpg", 1, a),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", {"1.jpg": a, "1.cls": b"2", "2.jpg": b, "2.cls": b"0"})
    source = Tars(tmp_path / "x.tar")
    assert source.classes == ("0", "1", "2") and [item.label for item in source.items()] == [2, 0]
    write_tar(tmp_path / "x.tar", {"1.jpg": a})
    assert [item.label for item in Tars(tmp_path / "x.tar").items()] == [-1]
    write_tar(tmp_path / "y.tar", {"1.jpg": b})
    source = Tars(tmp_path)  # as ImageNet comes: one archive per class
    assert source.classes == ("x", "y") and [source.read(item) for item in source.items()] == [a, b]


def test_tars_refusals(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    with pytest.raises(InputError, match="no such archive"):
        Tars(tmp_path / "x.tar")
    with pytest.raises(InputError, match=r"no .tar in it"):
        Tars(tmp_path)
    write_tar(tmp_path / "x.tar", {"a.txt": b""})
    with pytest.raises(InputError, match="no images in the archive"):
        Tars(tmp_path / "x.tar")
    write_tar(tmp_path / "x.tar", {"1.jpg": jpeg(), "1.cls": b"2", "2.jpg": jpeg()})
    with pytest.raises(InputError, match=r"without a .cls member, the first is \['2.jpg'\]"):
        Tars(tmp_path / "x.tar")
    write_tar(tmp_path / "x.tar", {"../up.jpg": jpeg()})
    with pytest.raises(InputError, match=r"x\.tar: .*'\.\./up' has a '\.' or '\.\.' part"):
        Tars(tmp_path / "x.tar")
    write_tar(tmp_path / "x.tar", {"/etc/absolute.jpg": jpeg()})
    with pytest.raises(InputError, match=r"x\.tar: .*'/etc/absolute' is empty, absolute"):
        Tars(tmp_path / "x.tar")
    for text in (b"99999999999", b"1000000", b"-1", b"", b"cat", b"9" * 5000):
        write_tar(tmp_path / "x.tar", {"1.jpg": jpeg(), "1.cls": text})
        with pytest.raises(InputError, match=r"x\.tar: .*member '1\.cls' is no class index"):
            Tars(tmp_path / "x.tar")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        write_tar(tmp_path / "x.tar", {"1.jpg": jpeg()}, link=kind)
        with pytest.raises(InputError, match=r"'link.jpg' is not a plain file"):
            pack(Tars(tmp_path / "x.tar"), tmp_path / "set", workers=1)
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[:700])
    with pytest.raises(InputError, match="the archive ends before"):
        Tars(tmp_path / "x.tar")
    assert not (tmp_path / "set").exists()


NAMES = [b"plane", b"car"]


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes byte strings as Python 2 did, in which CIFAR was pickled."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_python2_string(self, value: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(value)) + value)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch[bytes] = save_python2_string


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    data = buffer.getvalue()
    return data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar10(root: Path, layout: str) -> tuple[np.ndarray, list[int]]:
    """Five batches of 4 images and a test batch, as the release has them; returns all pixels and labels."""
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 3072), dtype=np.uint8)
    labels = [int(value) for value in np.arange(24) % 2]
    batches = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(batches):
        part = slice(4 * number, 4 * number + 4)
        if layout == "python":
            content = {b"data": pixels[part], b"labels": labels[part], b"batch_label": b"x", b"filenames": [b"f"] * 4}
            (root / name).write_bytes(python2_pickle(content))
        else:
            records = np.column_stack([np.array(labels[part], dtype=np.uint8), pixels[part]])
            (root / f"{name}.bin").write_bytes(records.tobytes())
    if layout == "python":
        (root / "batches.meta").write_bytes(python2_pickle({b"label_names": NAMES}))
    else:
        (root / "batches.meta.txt").write_text("plane\ncar\n\n")
    return pixels, labels


@pytest.mark.parametrize("layout", ["python", "binary"])
def test_cifar10_pixels_are_exact(tmp_path: Path, layout: str) -> None:
    pixels, labels = write_cifar10(tmp_path / "c", layout)
    source = Cifar(tmp_path / "c")
    items = source.items()
    assert source.classes == ("plane", "car") and [item.label for item in items] == labels
    assert [items[0].name, items[-1].name] == ["train/00000.png", "test/00003.png"]
    assert len(Cifar(tmp_path / "c", split="train").items()) == 20
    assert source.describe() == {"kind": "cifar", "release": "10", "format": layout, "split": "all", "num_images": 24}
    for item, row in zip(items, pixels, strict=True):
        np.testing.assert_array_equal(decode_rgb(source.read(item)), row.reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("layout", ["python", "binary"])
def test_cifar100_takes_the_fine_labels(tmp_path: Path, layout: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        if layout == "python":
            content = {b"data": pixels, b"fine_labels": [2, 0, 1], b"coarse_labels": [0, 0, 0]}
            (tmp_path / name).write_bytes(python2_pickle(content))
        else:
            head = np.array([[9, 2], [9, 0], [9, 1]], dtype=np.uint8)
            (tmp_path / f"{name}.bin").write_bytes(np.column_stack([head, pixels]).tobytes())
    (tmp_path / "meta").write_bytes(python2_pickle({b"fine_label_names": [b"a", b"b", b"c"]}))
    (tmp_path / "fine_label_names.txt").write_text("a\nb\nc\n")
    source = Cifar(tmp_path, split="test")
    assert [item.label for item in source.items()] == [2, 0, 1] and source.classes == ("a", "b", "c")
    np.testing.assert_array_equal(
        decode_rgb(source.read(source.items()[1])), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0)
    )


def test_cifar_in_folders(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for split in ("train", "test"):
        (tmp_path / "c" / split).symlink_to(image_folder)
    source = Cifar(tmp_path / "c")
    assert len(source.items()) == 46 and source.items()[0].name == "train/cat/000.jpg"
    assert source.read(source.items()[0]) == (image_folder / "cat/000.jpg").read_bytes()
    assert source.classes == ("cat", "dog", "owl")


def test_hostile_and_damaged_cifar_files_are_refused_and_never_run(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    write_cifar10(tmp_path / "p", "python")
    for content in (Boom(), {b"data": Boom(), b"labels": []}, [1], {b"data": [[1]], b"labels": [0]}):
        (tmp_path / "p/data_batch_2").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match="not a CIFAR"):
            Cifar(tmp_path / "p")
    (tmp_path / "p/data_batch_2").write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match="not a CIFAR file"):
        Cifar(tmp_path / "p")
    assert not (tmp_path / "ran").exists()
    write_cifar10(tmp_path / "b", "binary")
    (tmp_path / "b/test_batch.bin").write_bytes(b"x" * 5000)
    with pytest.raises(InputError, match="not whole records"):
        Cifar(tmp_path / "b")
    (tmp_path / "b/test_batch.bin").write_bytes(b"\x07" + b"x" * 3072)
    with pytest.raises(InputError, match="labels outside the 2 classes"):
        Cifar(tmp_path / "b")
    with pytest.raises(InputError, match="no CIFAR in it"):
        Cifar(tmp_path)
    with pytest.raises(InputError, match="no split 'val'"):
        Cifar(tmp_path / "b", split="val")


# every source, packed and read back

Expected = dict[str, tuple[bytes | np.ndarray, str | None, Any]]
"""Key -> file or pixels, class, fixations."""
Layout = Callable[[Path, Callable[..., bytes]], Expected]


def of_files(root: Path, classes: dict[str, str | None], jpeg: Callable[..., bytes]) -> Expected:
    """Write one image for each name below `root`; the keys are the names below that."""
    files = {name: jpeg(seed=number) for number, name in enumerate(classes)}
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return {name.removesuffix(".jpg"): (files[name], known, None) for name, known in classes.items()}


def folder_layout(root: Path, jpeg: Callable[..., bytes]) -> Expected:
    return of_files(root, {"dog/1.jpg": "dog", "cat/more/2.jpg": "cat"}, jpeg)


def tar_layout(root: Path, jpeg: Callable[..., bytes]) -> Expected:
    root.mkdir()
    write_tar(root / "x.tar", {"./dog/1.jpg": jpeg(seed=1), "./cat/2.jpg": jpeg(seed=2)})
    return {"dog/1": (jpeg(seed=1), "dog", None), "cat/2": (jpeg(seed=2), "cat", None)}


def cifar_layout(root: Path, jpeg: Callable[..., bytes], *, form: str) -> Expected:
    pixels, labels = write_cifar10(root, form)
    keys = [f"train/{number:05d}" for number in range(20)] + [f"test/{number:05d}" for number in range(4)]
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {key: (image, ("plane", "car")[label], None) for key, image, label in zip(keys, images, labels, strict=True)}


def cifar_folders(root: Path, jpeg: Callable[..., bytes]) -> Expected:
    return of_files(root, {f"{split}/{name}/1.jpg": name for split in ("train", "test") for name in "ab"}, jpeg)


def osie_layout(root: Path, jpeg: Callable[..., bytes], *, tracking: str) -> Expected:
    write_osie(root, jpeg, count=3)
    seen = {
        "eye": [[[[9 + number, 4], [2, 7]], [[9 + number, 4], [2, 8]]] for number in range(3)],
        "mouse": [[[[8, 1], [7, 2]], [[31, 23]]]] * 3,
    }[tracking]
    return {f"{1001 + number}": (jpeg(seed=number), None, seen[number]) for number in range(3)}


def flickr8k_layout(root: Path, jpeg: Callable[..., bytes]) -> Expected:
    found = of_files(root, {f"Images/{number}_ab.jpg": None for number in range(3)}, jpeg)
    (root / "Flickr_8k.trainImages.txt").write_text("".join(f"{number}_ab.jpg\n" for number in range(3)))
    return {key.removeprefix("Images/"): value for key, value in found.items()}


def coco_layout(root: Path, jpeg: Callable[..., bytes]) -> Expected:
    found = of_files(root, {"train2017/000000000009.jpg": None, "val2017/000000000139.jpg": None}, jpeg)
    return {"000000000009": found["train2017/000000000009"]}


def below_images(root: Path, jpeg: Callable[..., bytes], *, folder: str) -> Expected:
    """CUB-200 and Stanford Dogs without their lists: each class has one image, in its train half."""
    found = of_files(root, {f"{folder}/{name}/1.jpg": name for name in ("a.Crow", "b.Wren")}, jpeg)
    return {key.removeprefix(f"{folder}/"): value for key, value in found.items()}


LAYOUTS: dict[str, tuple[dict[str, Any], Layout]] = {
    "image_folder": ({}, folder_layout),
    "tar": ({}, tar_layout),
    "cifar python": ({}, partial(cifar_layout, form="python")),
    "cifar binary": ({}, partial(cifar_layout, form="binary")),
    "cifar folders": ({}, cifar_folders),
    "osie eye": ({}, partial(osie_layout, tracking="eye")),
    "osie mouse": ({"tracking": "mouse"}, partial(osie_layout, tracking="mouse")),
    "flickr8k": ({"split": "train"}, flickr8k_layout),
    "coco": ({"split": "train"}, coco_layout),
    "cub": ({"split": "train"}, partial(below_images, folder="images")),
    "stanford_dogs": ({"split": "train"}, partial(below_images, folder="Images")),
}


def assert_packs(config: SourceConfig, expected: Expected, folder: Path) -> ShardSet:
    """Pack it and read all of it back."""
    pack(make_source(config), folder, workers=1)
    shards, found = ShardSet(folder), {}
    for row in range(shards.num_samples):
        sample = shards.read(0, row)
        found[sample.key] = sample
        file, known, fixations = expected[sample.key]
        if isinstance(file, bytes):
            assert sample.image == file
        else:
            np.testing.assert_array_equal(decode_rgb(sample.image), file)
        assert (None if sample.label < 0 else shards.classes[sample.label]) == known
        assert sample.info().get("fixations") == fixations
        assert (sample.info()["height"], sample.info()["width"]) == decode_rgb(sample.image).shape[:2]
    assert found.keys() == expected.keys()
    assert shards.manifest.extra["source"]["kind"] == config.kind
    return shards


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_source_packs_and_reads_back(name: str, tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    options, layout = LAYOUTS[name]
    expected = layout(tmp_path / "source", jpeg)
    config = SourceConfig(kind=name.split()[0], path=str(tmp_path / "source"), **options)  # type: ignore[arg-type]
    gaze = assert_packs(config, expected, tmp_path / "set").manifest.extra["gaze"]
    assert gaze == ({"edition": name.replace(" ", "-"), "sigma": 24.0} if name.startswith("osie") else None)


@pytest.mark.parametrize("edition", ["2017", "2015"])
def test_both_editions_of_salicon_pack_and_are_named_in_the_manifest(
    salicon: Callable[..., Path], tmp_path: Path, jpeg: Callable[..., bytes], edition: str
) -> None:
    config = SourceConfig(kind="salicon", path=str(salicon(edition=edition)), split="train")
    expected: Expected = {
        f"train/COCO_train2014_{number:012d}": (
            jpeg(seed=number, height=HEIGHT, width=WIDTH), None, [one.tolist() for one in observers(number)],
        )
        for number in range(6)
    }  # fmt: skip
    shards = assert_packs(config, expected, tmp_path / "set")
    assert shards.manifest.extra["gaze"] == {"edition": f"salicon-{edition}", "sigma": SIGMA}
    assert f'"edition": "salicon-{edition}"' in (tmp_path / "set" / "manifest.json").read_text()


def test_options_of_another_source_are_refused(image_folder: Path) -> None:
    for changes in ({"split": "val"}, {"edition": "2015"}, {"tracking": "mouse"}, {"compare_maps": False}):
        config = SourceConfig(path=str(image_folder), **changes)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"source.{next(iter(changes))}: image_folder has no such option"):
            make_source(config)
