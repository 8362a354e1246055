"""Sample keys: what a key may look like, how one is made from a file name, and the digest of a shard's keys."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from engine.errors import InputError

MAX_KEY_BYTES = 4096

# webdataset drops members whose path holds a part such as `__meta__` without a word: such a key would vanish.
_SKIPPED_BY_WEBDATASET = re.compile(r"__[^/]*__($|/)")


def make_key(name: str) -> str:
    """Key of a file: its relative path without the extension, dots of the last part replaced by `_`.

    webdataset ends a key at the first dot of the last path component, so no other dot may stay there.
    Bytes that are not UTF-8 (seen by Python as lone surrogates) are spelled out, e.g. `\\udce9`.
    """
    folder, _, last = name.rpartition("/")
    stem = last.rpartition(".")[0] or last
    key = f"{folder}/{stem.replace('.', '_')}" if folder else stem.replace(".", "_")
    return key.encode("utf-8", "backslashreplace").decode("utf-8")


def key_fault(key: str) -> str | None:
    """Why `key` must not be used as a key or member name, or None when it is fine."""
    parts = key.split("/")
    try:
        num_bytes = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if num_bytes > MAX_KEY_BYTES:
        return f"is longer than {MAX_KEY_BYTES} bytes"
    if not key or "" in parts:
        return "is empty, absolute or has an empty part"
    if "." in parts or ".." in parts:
        return "has a '.' or '..' part"
    if "\0" in key or "\n" in key:
        return "holds a NUL or a line break"
    if "." in parts[-1]:
        return "has a dot in its last part"
    if _SKIPPED_BY_WEBDATASET.match(key):
        return "starts with a '__name__' part, which webdataset skips"
    return None


def check_key(key: str) -> str:
    """Return `key` when it may be written.

    Raises:
        InputError: the key is empty, absolute, too long, holds `..`, or would be read as another key.
    """
    fault = key_fault(key)
    if fault is not None:
        raise InputError(f"key {key[:80]!r} {fault}: rename the file")
    return key


def pack_keys(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Keys as two arrays: the end of each key in bytes (int64) and all keys' UTF-8 bytes (uint8)."""
    encoded = [key.encode("utf-8") for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype=np.int64) if encoded else np.zeros(0, dtype=np.int64)
    return ends, np.frombuffer(b"".join(encoded), dtype=np.uint8)


def keys_digest(key_end: np.ndarray, key_data: np.ndarray) -> str:
    """Hexadecimal SHA-256 of a shard's keys in order; the lengths are part of it, so no two lists share it."""
    digest = hashlib.sha256(np.ascontiguousarray(key_end, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(key_data).tobytes())
    return digest.hexdigest()
