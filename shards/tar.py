"""Tar headers, written and read strictly: plain files only, no clock, no user, nothing skipped in silence.

The standard library's reader stops without a word at a damaged header and follows negative sizes for ever; here
both are errors. Payloads are never read while scanning, only the 512-byte headers.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_EXTENDED_HEADER = 1 << 16


class TarError(ValueError):
    """The archive is damaged, cut short, or holds something other than plain files."""


@dataclass(frozen=True, slots=True)
class Member:
    """One plain file of an archive: its name and where its bytes lie."""

    name: str
    offset: int
    size: int


def padded(size: int) -> int:
    """Bytes that a payload of `size` bytes takes in the archive."""
    return -(-size // BLOCK) * BLOCK


def header_of(name: str, size: int) -> bytes:
    """Header blocks of one member: time 0, user and group 0 and unnamed, mode 0644."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info.tobuf(format=tarfile.PAX_FORMAT, encoding="utf-8", errors="strict")


def scan(file: BinaryIO, *, foreign: bool = False) -> Iterator[Member]:
    """Yield the plain files of an archive in order.

    Args:
        foreign: the archive was made by another tool: directories are passed over.

    Raises:
        TarError: damaged header, cut archive, link, device or any other member that is not a plain file.
    """
    total = os.fstat(file.fileno()).st_size
    position, long_name, long_size = 0, None, None
    while True:
        header = os.pread(file.fileno(), BLOCK, position)
        if len(header) < BLOCK:
            raise TarError(f"cut short at byte {position}: the end mark is missing")
        if header == bytes(BLOCK):
            _check_tail(file, position, total)
            return
        info = parse_header(header, position)
        payload = position + BLOCK
        size = info.size if long_size is None else long_size
        if size < 0 or payload + size > total:
            raise TarError(f"member at byte {position} says {size} bytes, the archive ends before")
        position = payload + padded(size)
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            found = _extended(os.pread(file.fileno(), min(size, MAX_EXTENDED_HEADER + 1), payload), info.type)
            if info.type != tarfile.XGLTYPE:
                long_name, long_size = found
            continue
        name, long_name, long_size = (long_name if long_name is not None else info.name), None, None
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield Member(name, payload, size)
        elif not (foreign and info.type == tarfile.DIRTYPE):
            raise TarError(f"member {name[:80]!r} is not a plain file (type {info.type!r})")


def parse_header(header: bytes, position: int = 0) -> tarfile.TarInfo:
    """One header block, its checksum compared; `position` is for messages.

    Raises:
        TarError: damaged.
    """
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise TarError(f"damaged header at byte {position}: {error}") from error


def _check_tail(file: BinaryIO, position: int, total: int) -> None:
    """After the end mark only zero bytes may follow: anything else is a hidden or lost member."""
    while position < total:
        chunk = os.pread(file.fileno(), 1 << 20, position)
        if chunk.strip(b"\0"):
            raise TarError(f"data after the end mark at byte {position}")
        if not chunk:
            return
        position += len(chunk)


def _extended(data: bytes, kind: bytes) -> tuple[str | None, int | None]:
    """Name and size from an extended header: GNU long name, or the records `length key=value` of PAX."""
    if len(data) > MAX_EXTENDED_HEADER:
        raise TarError(f"extended header of more than {MAX_EXTENDED_HEADER} bytes")
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape"), None
    name, size, position = None, None, 0
    try:
        while position < len(data):
            space = data.index(b" ", position, position + 8)
            length = int(data[position:space])
            if length <= space - position or position + length > len(data):
                raise ValueError("record length")
            key, _, value = data[space + 1 : position + length - 1].partition(b"=")
            if key == b"path":
                name = value.decode("utf-8")
            elif key == b"size":
                size = int(value)
            elif key.startswith(b"GNU.sparse"):
                raise ValueError("sparse file")
            position += length
    except ValueError as error:
        raise TarError(f"damaged extended header: {error}") from error
    return name, size
