"""Decoding: the fast and the slow door give the upright RGB image."""

import io
import pickle
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards import decode
from shards.decode import (
    MAX_SCRATCH_BYTES,
    Scratch,
    decode_rgb,
    decoded_scale,
    file_extension,
    image_header,
    image_size,
    jpeg_header,
)

PICTURE = Image.fromarray(
    np.dstack(
        [
            np.linspace(0, 255, 40 * 60).reshape(40, 60),
            np.linspace(255, 0, 40 * 60).reshape(40, 60),
            np.tile(np.linspace(0, 255, 60), (40, 1)),
        ]
    ).astype(np.uint8)
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(value: int, *, big_endian: bool = False) -> bytes:
    order = "MM" if big_endian else "II"
    exif = Image.Exif()
    exif.endian = ">" if big_endian else "<"
    exif[0x0112] = value
    data = encoded(PICTURE, "JPEG", quality=95, exif=exif.tobytes())
    assert b"Exif\0\0" + order.encode() in data
    return data


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}])
def test_ordinary_jpegs_take_the_fast_door_and_match_pillow(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(PICTURE, "JPEG", quality=95, **options)
    monkeypatch.setattr(decode, "_decode_slowly", lambda data: pytest.fail("slow door"))
    pixels = decode_rgb(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert pixels.shape == (40, 60, 3) and image_size(data) == (40, 60) and file_extension(data) == "jpg"
    assert np.abs(pixels.astype(int) - expected).mean() < 1


@pytest.mark.parametrize("size", [(90, 120), (91, 119), (375, 500)])
def test_fast_colour_is_close_and_leaves_brightness_alone(size: tuple[int, int]) -> None:
    image = PICTURE.resize((10, 8)).resize(size[::-1], Image.Resampling.BICUBIC)
    data = encoded(image, "JPEG", quality=90, subsampling=2)
    exact, fast = (decode_rgb(data, fast_colour=fast).astype(int) for fast in (False, True))
    weights = np.array([0.299, 0.587, 0.114])
    assert exact.shape == fast.shape == (*size, 3) and 0 < np.abs(exact - fast).mean() < 2
    assert np.abs((exact - fast) @ weights).mean() < 0.5
    for other in (encoded(image.convert("L"), "JPEG"), encoded(image, "JPEG", subsampling=0), oriented(6)):
        np.testing.assert_array_equal(decode_rgb(other, fast_colour=True), decode_rgb(other))


@pytest.mark.parametrize("min_size", [None, (50, 60)])
def test_scratch_memory_changes_nothing_and_is_used_again(min_size: tuple[int, int] | None) -> None:
    scratch = Scratch()
    images = [PICTURE.resize(size, Image.Resampling.BICUBIC) for size in ((640, 480), (64, 80), (100, 200), (640, 480))]
    files = [encoded(image, "JPEG", quality=90) for image in images] + [encoded(PICTURE, "PNG"), oriented(6)]
    starts = []
    for data in files:
        expected = decode_rgb(data, min_size=min_size)
        pixels = decode_rgb(data, min_size=min_size, scratch=scratch)
        np.testing.assert_array_equal(pixels, expected)
        starts.append(pixels.ctypes.data)
    assert len(set(starts[:4])) == 1 and starts[0] % 32 != 0 and not {*starts[4:]} & {starts[0]}
    assert len(pickle.dumps(scratch)) < 100 and scratch.take(MAX_SCRATCH_BYTES + 1) is None


def test_grey_jpegs_become_rgb() -> None:
    data = encoded(PICTURE.convert("L"), "JPEG", quality=95)
    pixels = decode_rgb(data)
    assert jpeg_header(data).components == 1 and pixels.shape == (40, 60, 3)
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()


def test_cmyk_jpegs_come_out_as_pillow_converts_them() -> None:
    data = encoded(PICTURE.convert("CMYK"), "JPEG", quality=95)
    assert not image_header(data).fast
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("value", range(1, 9))
def test_rotated_photographs_come_out_upright(value: int, big_endian: bool) -> None:
    data = oriented(value, big_endian=big_endian)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    pixels = decode_rgb(data)
    assert jpeg_header(data).orientation == value
    assert image_size(data) == pixels.shape[:2] == ((60, 40) if value >= 5 else (40, 60))
    assert np.abs(pixels.astype(int) - expected).mean() < 1


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "LA"), ("BMP", "RGB"), ("TIFF", "RGB")],
)
def test_other_formats_are_exact(kind: str, mode: str) -> None:
    image = PICTURE.convert(mode)
    data = encoded(image, kind)
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(image.convert("RGB")))
    assert image_size(data) == (40, 60) and file_extension(data) == ("png" if kind == "PNG" else None)


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    pixels = decode_rgb(encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(pixels[..., 1], (values >> 8).astype(np.uint8))


@pytest.mark.parametrize(("wanted", "found"), [((40, 60), (40, 60)), ((20, 30), (20, 30)), ((6, 9), (10, 15))])
def test_scaled_decoding_is_no_smaller_than_asked(wanted: tuple[int, int], found: tuple[int, int]) -> None:
    data = encoded(PICTURE, "JPEG", quality=95)
    pixels = decode_rgb(data, min_size=wanted)
    assert all(side >= least for side, least in zip(pixels.shape, wanted, strict=False))
    assert pixels.shape[0] <= found[0] and pixels.shape[1] <= found[1]
    reference = np.asarray(PICTURE.resize(pixels.shape[1::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(pixels.astype(int) - reference).mean() < 4


def test_stray_bytes_between_markers_are_read_and_cut_files_are_not(jpeg: Callable[..., bytes]) -> None:
    data = jpeg(height=80, width=80)
    end = data.rindex(b"\xff\xd9")
    assert decode_rgb(data[:end] + b"\0" * 8 + data[end:]).shape == (80, 80, 3)
    tables = data.index(b"\xff\xdb")
    for stray in (b"\x12\x34", b"\xff\xff", b"\xff\0", b"\xff\xd0"):
        np.testing.assert_array_equal(decode_rgb(data[:tables] + stray + data[tables:]), decode_rgb(data))
    for length in range(2, len(data) - 2, 37):
        with pytest.raises(ValueError):
            decode_rgb(data[:length])


def test_an_orientation_of_four_bytes_counts() -> None:
    tiff = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHII", 0x112, 4, 1, 6) + bytes(4)
    data = encoded(PICTURE, "JPEG", quality=95)
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff + data[2:]
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    assert image_size(data) == (60, 40) and np.abs(decode_rgb(data) - upright).mean() < 1


@pytest.mark.parametrize("stored", [(513, 641), (511, 767), (200, 1001), (9, 4001)])
@pytest.mark.parametrize("eighths", range(1, 8))
def test_the_scale_of_a_decoded_image_is_known(stored: tuple[int, int], eighths: int) -> None:
    wanted = (-(-stored[0] * eighths // 8), -(-stored[1] * eighths // 8))
    image = decode_rgb(encoded(Image.new("RGB", stored[::-1]), "JPEG"), min_size=wanted)
    assert image.shape[:2] == wanted and decoded_scale(stored, image.shape) == eighths / 8


def test_damaged_exif_counts_as_upright() -> None:
    data = oriented(6)
    start = data.index(b"Exif\0\0") + 6
    for junk in (b"XX*\0", b"II*\0\xff\xff\xff\xff"):
        broken = data[:start] + junk + data[start + len(junk) :]
        assert jpeg_header(broken).orientation == 1 and image_size(broken) == (40, 60)
