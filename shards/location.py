"""Where a set lies: a local folder, or a URL such as s3://bucket/train, gs://bucket/train, https://host/train.

A URL may come as text or as a `pathlib.Path`, which keeps one of its two slashes (`s3:/bucket`): config fields of
either type hold one. Credentials never stand in it: the clients take them from the environment.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from engine.errors import InputError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_COLLAPSED = re.compile(r"(s3a?|gc?s|https?|abfs|az|hdfs|hf|memory):/(?=[^/])(.*)", re.DOTALL)
_LOCAL = ("file", "local")


def is_remote(where: Path | str) -> bool:
    """Whether `where` is a URL rather than a local path."""
    return bool(_URL.match(str(where)) or _COLLAPSED.match(str(where)))


def url_of(where: Path | str) -> str:
    """The URL with both slashes and without one at its end, fit to be printed.

    Raises:
        InputError: credentials, a query or control characters in it, no host, or a protocol that fsspec does not know.
    """
    match = _COLLAPSED.match(str(where)) or _URL.match(str(where))
    if match is None:
        raise InputError(f"{str(where)[:80]!r} is no URL: give one such as s3://bucket/folder")
    scheme, rest = match[1].lower(), match[2].rstrip("/")
    shown = f"{scheme}://{re.split('[?#]', rest.rpartition('@')[2])[0][:200]}"
    if not rest.isprintable():
        raise InputError(f"{shown!r}: control characters in a URL: correct it")
    if scheme in _LOCAL:
        raise InputError(f"{shown}: give local folders as plain paths")
    if scheme not in fsspec.available_protocols() or "::" in rest:
        raise InputError(f"{shown}: unknown protocol: give a local path or a URL of s3://, gs:// or https://")
    url = f"{scheme}://{rest}"
    parts = urlsplit(url)
    secret = "@" in (rest if scheme.startswith("http") else parts.netloc)
    if secret or parts.query or parts.fragment or "?" in rest:
        raise InputError(
            f"{shown}: a URL with a user name, password or query in it would end up in logs: give the plain URL, and "
            "credentials through the environment (docs/shards.md)"
        )
    if not rest or rest.startswith("/"):
        raise InputError(f"{shown}: names no host or bucket: give one such as s3://bucket/folder")
    return url


def local_folder(where: Path | str, *, what: str) -> Path:
    """`where` as a local path, for programs that write.

    Raises:
        InputError: it is a URL.
    """
    if is_remote(where):
        raise InputError(f"{url_of(where)}: {what} can only be written to a local folder: write there, then copy it")
    return Path(where)
