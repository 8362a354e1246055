"""Reading MATLAB files: any fault in one becomes one line."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from engine.errors import InputError
from shards.plain import read_plain
from shards.sources.base import refuse_passing


def load_mat(path: Path) -> dict[str, Any]:
    """Variables of a MATLAB file up to version 7.2; structs as objects with attributes, size-1 dimensions dropped.

    Raises:
        InputError: missing, damaged, or of version 7.3 (which is HDF5).
        Fault: it cannot be read for now.
    """
    try:
        data = io.BytesIO(read_plain(path))
        content: dict[str, Any] = loadmat(data, squeeze_me=True, struct_as_record=False)
    except NotImplementedError as error:
        raise InputError(f"{path}: is a MATLAB 7.3 file: save it in MATLAB with the option '-v7'") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: unpack the gaze files") from error
    except (
        OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError, EOFError,
        UnicodeError, struct.error, zlib.error, MatReadError,
    ) as error:  # fmt: skip
        refuse_passing(error, path)
        raise InputError(f"{path}: damaged MATLAB file ({type(error).__name__}: {str(error)[:80]})") from error
    return content
