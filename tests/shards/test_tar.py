"""Tars: stock tools read what is written; whatever is not a plain, whole archive is refused."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from shards.keys import MAX_KEY_BYTES, check_key, make_key
from shards.tar import END, TarError, header_of, scan
from tests.shards.damage import tar_of


def members(path: Path, *, foreign: bool = False) -> list[tuple[str, bytes]]:
    with open(path, "rb") as file:
        return [
            (member.name, os.pread(file.fileno(), member.size, member.offset)) for member in scan(file, foreign=foreign)
        ]


def written(path: Path, contents: dict[str, bytes]) -> Path:
    path.write_bytes(tar_of(contents))
    return path


LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\n")
NAMES = st.text(LETTERS, min_size=1, max_size=150).filter(
    lambda text: not text.startswith("/") and not text.endswith("/")
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.dictionaries(NAMES, st.binary(max_size=1200), min_size=1, max_size=5))
def test_what_is_written_is_read_back_here_and_by_tarfile(tmp_path: Path, contents: dict[str, bytes]) -> None:
    path = written(tmp_path / "a.tar", contents)
    assert members(path) == list(contents.items())
    with tarfile.open(path, "r:") as archive:
        found = [(info.name, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
        assert found == list(contents.items())
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in archive} == {
            (0, 0, 0, "", "", 0o644)
        }


def test_archives_of_other_tools_are_read(tmp_path: Path) -> None:
    """GNU and PAX long names, folders, and the names of `tar c .`."""
    long_name = "folder/" + "x" * 200 + ".jpg"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as archive:
            directory = tarfile.TarInfo("folder")
            directory.type = tarfile.DIRTYPE
            archive.addfile(directory)
            names = ["./a.jpg"] if form == tarfile.USTAR_FORMAT else ["./a.jpg", long_name]
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 3
                archive.addfile(info, io.BytesIO(b"abc"))
        assert members(path, foreign=True) == [(name, b"abc") for name in names]
        with pytest.raises(TarError, match="not a plain file"):
            members(path)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_devices_and_sparse_members_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("innocent.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    (tmp_path / "a.tar").write_bytes(info.tobuf() + END)
    for foreign in (False, True):
        with pytest.raises(TarError, match="not a plain file"):
            members(tmp_path / "a.tar", foreign=foreign)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", {"a.jpg": b"x" * 700, "b.jpg": b"y" * 100})
    whole = path.read_bytes()
    for length in range(0, len(whole) - 512, 64):
        path.write_bytes(whole[:length])
        with pytest.raises(TarError):
            members(path)


def test_every_flipped_header_bit_is_noticed(tmp_path: Path) -> None:
    """Bits of the first header; the checksum covers them all. Leading zeros of a field may be blanks."""
    path = written(tmp_path / "a.tar", {"a.jpg": b"x" * 700, "b.jpg": b"y" * 100})
    whole = path.read_bytes()
    for position in range(0, 512, 3):
        for bit in (0, 4):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert members(path) == [("a.jpg", b"x" * 700), ("b.jpg", b"y" * 100)]
            except TarError:
                continue
            assert 148 <= position < 156  # the checksum's own text: spaces and zeros read alike


def test_a_negative_size_ends_in_an_error_and_not_in_a_loop(tmp_path: Path) -> None:
    """The standard library before 3.11.14 reads such an archive for ever (CVE-2025-8194)."""
    info = tarfile.TarInfo("a.jpg")
    header = bytearray(info.tobuf())
    header[124:136] = b"\xff" * 12
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    (tmp_path / "a.tar").write_bytes(bytes(header) + END)
    with pytest.raises(TarError, match="the archive ends before"):
        members(tmp_path / "a.tar")


def test_data_behind_the_end_mark_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", {"a.jpg": b"x"})
    path.write_bytes(path.read_bytes() + header_of("hidden.jpg", 0))
    with pytest.raises(TarError, match="after the end mark"):
        members(path)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cat/0.jpg", "cat/0"),
        ("a.b/c.d.tar.jpeg", "a.b/c_d_tar"),
        ("plain.png", "plain"),
        ("x/日本.jpg", "x/日本"),
        ("caf\udce9.jpg", "caf\\udce9"),
    ],
)
def test_keys_of_file_names(name: str, key: str) -> None:
    assert check_key(make_key(name)) == key


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a//b", "a/", "../a", "a/../b", "./a", "a\0b", "a\nb", "a.b", "x" * (MAX_KEY_BYTES + 1), "\udce9",
     "__meta__/a"],
)  # fmt: skip
def test_unusable_keys_are_refused(key: str) -> None:
    with pytest.raises(InputError, match="rename the file"):
        check_key(key)
