"""The PNG of a label map: any PNG is read, and the kind that is written is read quickly.

libpng takes 25 microseconds over a map of 56x56 beside its decompression, most of them for Paeth's filter, which
predicts each value from three others. So maps are written with the filter "up" alone: each row is stored as its
difference to the row above. Summing them takes numpy one call a row for all maps of a batch.
"""

import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from isal import igzip_lib, isal_zlib

from shards.decode import MAX_MAP_SIDE, PNG_SIGNATURE

_OPTIONS = [
    cv2.IMWRITE_PNG_COMPRESSION,
    9,
    cv2.IMWRITE_PNG_FILTER,
    cv2.IMWRITE_PNG_FILTER_UP,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_FILTERED,  # a few per cent larger than the default, and quicker to decompress
]
_GREY_8_BIT = bytes((8, 0, 0, 0, 0))  # bit depth, colour type; methods of compression, filtering and interlacing
_UP = b"\x02"
_END = b"\0\0\0\0IEND\xaeB`\x82"
# Signature, IHDR and the head of IDAT come before the compressed rows; IDAT's checksum and IEND after them.
_HEADER_BYTES, _ROWS_FROM, _AFTER_ROWS = 33, 41, 16


class MapRows(NamedTuple):
    """Codes of a map whose rows are not summed up yet; `stack_codes` does it.

    `data`: for each row one byte for its filter, "up", and its `shape[1]` differences to the row above.
    """

    shape: tuple[int, int]
    data: bytes


Codes = np.ndarray | MapRows
"""8-bit codes of a map, `(height, width)` uint8, or the rows that they are made from."""


def encode_map_png(codes: np.ndarray) -> bytes:
    """PNG of codes `(height, width)` uint8.

    Raises:
        ValueError: not such an array.
    """
    written, data = cv2.imencode(".png", codes, _OPTIONS)
    if not written:
        raise ValueError(f"map of shape {codes.shape} and type {codes.dtype} cannot be written as PNG")
    return data.tobytes()


def decode_map_png(data: bytes) -> np.ndarray:
    """Codes of a stored label map, `(height, width)` uint8.

    Raises:
        ValueError: no PNG, damaged, or with a side of more than `MAX_MAP_SIDE`.
    """
    return summed(read_map_png(data))


def read_map_png(data: bytes) -> Codes:
    """What `decode_map_png` reads, its rows not summed up yet where it is of the kind that is written here.

    Raises:
        ValueError: as `decode_map_png`.
    """
    shape = _plain_shape(data[:_HEADER_BYTES])
    if shape is not None and data[_HEADER_BYTES:_ROWS_FROM] == _rows_head(len(data)) and data[-12:] == _END:
        height, stride, stream = shape[0], shape[1] + 1, isal_zlib.decompressobj()
        try:
            rows = stream.decompress(data[_ROWS_FROM:-_AFTER_ROWS], height * stride + 1)
        except igzip_lib.IsalError:  # type: ignore[misc]  # its stub does not say that it is an exception
            rows = b""
        # at its end the stream's own checksum has been compared; that of the chunk around it is not looked at
        if stream.eof and len(rows) == height * stride and rows[::stride] == _UP * height:
            return MapRows(shape, rows)
    return _decode_any(data)


def _rows_head(num_bytes: int) -> bytes:
    """Length and name of the IDAT chunk of a file of so many bytes that has no other chunk but IHDR and IEND."""
    return (num_bytes - _ROWS_FROM - _AFTER_ROWS).to_bytes(4, "big", signed=True) + b"IDAT"


def stack_codes(maps: Sequence[Codes], out: np.ndarray) -> None:
    """Put the codes of maps of one shape into `out`, uint8 `(num_maps, height, width)`."""
    if not all([isinstance(one, MapRows) for one in maps]):
        for one, codes in zip(maps, out, strict=True):
            codes[:] = summed(one)
        return
    joined = np.frombuffer(b"".join([one.data for one in maps if isinstance(one, MapRows)]), dtype=np.uint8)
    stored = joined.reshape(len(out), out.shape[1], -1)[:, :, 1:]
    out[:, 0] = stored[:, 0]
    for row in range(1, out.shape[1]):
        np.add(out[:, row - 1], stored[:, row], out=out[:, row])


def summed(codes: Codes) -> np.ndarray:
    """The codes of one map, `(height, width)` uint8."""
    if not isinstance(codes, MapRows):
        return codes
    stored = np.frombuffer(codes.data, dtype=np.uint8).reshape(codes.shape[0], -1)[:, 1:]
    return np.add.accumulate(stored, axis=0, dtype=np.uint8)


@lru_cache(maxsize=16)
def _plain_shape(header: bytes) -> tuple[int, int] | None:
    """Height and width of an 8-bit grey PNG that is not interlaced, from signature and IHDR; None for all others."""
    if len(header) < _HEADER_BYTES or header[:16] != PNG_SIGNATURE + b"\0\0\0\rIHDR" or header[24:29] != _GREY_8_BIT:
        return None
    width, height, checksum = struct.unpack(">II5xI", header[16:])
    sensible = 0 < width <= MAX_MAP_SIDE and 0 < height <= MAX_MAP_SIDE
    return (height, width) if sensible and zlib.crc32(header[12:29]) == checksum else None


def _decode_any(data: bytes) -> np.ndarray:
    width, height = struct.unpack_from(">II", data.ljust(24, b"\0"), 16)
    if data[:8] != PNG_SIGNATURE or not (0 < width <= MAX_MAP_SIDE and 0 < height <= MAX_MAP_SIDE):
        raise ValueError("no PNG of a sensible size")
    codes = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)
    if codes is None:
        raise ValueError("damaged PNG")
    return codes
