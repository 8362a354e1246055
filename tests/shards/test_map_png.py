"""The PNG of a label map: one kind is written, every kind is read, and the quick door gives what libpng gives."""

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attention.maps import decode_map_np, encode_map_np
from shards.labels import encode_label
from shards.map_png import MapRows, decode_map_png, encode_map_png, read_map_png, stack_codes

SIZE = (56, 56)


def codes_of(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def pillow(codes: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(codes).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(rows: bytes, *, size: tuple[int, int] = SIZE, more: bytes = b"", stream: bytes | None = None) -> bytes:
    """An 8-bit grey PNG of filtered rows, with other chunks before them or another compressed stream."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows) if stream is None else stream)
    return b"\x89PNG\r\n\x1a\n" + header + more + data + chunk(b"IEND", b"")


def up(codes: np.ndarray) -> bytes:
    """Rows as differences to the row above, each after its filter's number."""
    rows = np.diff(codes, axis=0, prepend=np.zeros((1, codes.shape[1]), np.uint8))
    return np.pad(rows, ((0, 0), (1, 0)), constant_values=2).tobytes()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 70), width=st.integers(1, 70), smooth=st.booleans())
def test_what_is_written_is_read_through_the_quick_door_and_by_others(
    seed: int, height: int, width: int, smooth: bool
) -> None:
    codes = codes_of(seed, (height, width))
    if smooth:
        codes = cv2.GaussianBlur(codes, (0, 0), 5)
    data = encode_map_png(codes)
    rows = read_map_png(data)
    # libpng has no use for filters where there is but one row
    assert rows.shape == codes.shape and isinstance(rows, MapRows) == (height > 1)
    np.testing.assert_array_equal(decode_map_png(data), codes)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), codes)
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), codes)


def paeth(codes: np.ndarray) -> bytes:
    """As label shards were written before rows were stored as differences."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, 9, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_PAETH]
    return cv2.imencode(".png", codes, options)[1].tobytes()


OTHERS: dict[str, Callable[[np.ndarray], bytes]] = {
    "paeth": paeth,
    "pillow": pillow,
    "a comment": lambda codes: png(up(codes), more=chunk(b"tEXt", b"Comment\0hello")),
    "one row unfiltered": lambda codes: png(b"\0" + up(codes)[1:]),
    "two chunks": lambda codes: png(b"", more=chunk(b"IDAT", zlib.compress(up(codes))), stream=b""),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_pngs_are_read_as_libpng_reads_them(kind: str) -> None:
    codes = cv2.GaussianBlur(codes_of(1), (0, 0), 3)
    data = OTHERS[kind](codes)
    found = read_map_png(data)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(decode_map_png(data), codes)


def test_a_batch_is_stacked_whatever_its_maps_come_as() -> None:
    codes = np.stack([cv2.GaussianBlur(codes_of(n), (0, 0), 2) for n in range(5)])
    for doors in ([encode_map_png] * 5, [encode_map_png, paeth] * 2 + [encode_map_png], [paeth] * 5):
        maps = [read_map_png(write(one)) for write, one in zip(doors, codes, strict=True)]
        out = np.full((5, *SIZE), 7, dtype=np.uint8)
        stack_codes(maps, out)
        np.testing.assert_array_equal(out, codes)


def test_damage_is_no_map() -> None:
    """Flips in the compressed rows and their checksum, rows too few and too many, and sizes that cannot be."""
    codes = cv2.GaussianBlur(codes_of(2), (0, 0), 3)
    whole, rows = encode_map_png(codes), up(codes)
    stream = zlib.compress(rows)
    for place in range(41, len(whole) - 16, 23):
        spoiled = bytearray(whole)
        spoiled[place] ^= 0x10
        assert not isinstance(attempt(bytes(spoiled)), MapRows)
    for short in (rows[:-1], rows[:-57], rows + b"\0", rows * 3000):
        assert not isinstance(attempt(png(short)), MapRows)
    assert not isinstance(attempt(png(b"", stream=stream[:-1])), MapRows)
    assert not isinstance(attempt(png(b"", stream=stream[:-4] + b"\0\0\0\0")), MapRows)
    for size in ((0, 56), (56, 0), (60_000, 60_000), (5000, 1)):
        with pytest.raises(ValueError, match="no PNG of a sensible size"):
            read_map_png(png(rows, size=size))
    for data in (b"", whole[:20], whole[:40], b"GIF89a" + whole[6:]):
        with pytest.raises(ValueError, match=r"no PNG of a sensible size|damaged PNG"):
            read_map_png(data)


def attempt(data: bytes) -> object:
    try:
        return read_map_png(data)
    except ValueError as error:
        return error


def test_even_codes_keep_a_labels_precision() -> None:
    """A label's codes are even, its peak the largest of them, and each within one step of the finer code."""
    density = np.random.default_rng(0).gamma(0.5, size=SIZE)
    codes, fine = decode_map_png(encode_label(density)), encode_map_np(density)
    assert (codes % 2 == 0).all() and codes.max() == 254
    assert np.abs(codes / 254 - fine / 255).max() <= 0.5 / 127 + 0.5 / 255
    assert np.abs(decode_map_np(codes) - density / density.sum()).max() < 0.01 * density.max() / density.sum()
