"""Shared by the tests of `attention/`: the reference library and OSIE's gaze."""

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import loadmat

OSIE_SIZE = (600, 800)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small maps gain nothing from threads, and on a busy machine waiting for them costs most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pysaliency() -> types.ModuleType:
    """pysaliency 0.2, which needs two names that current setuptools and numpy no longer have."""
    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # type: ignore[attr-defined]
    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_string = stand_in.resource_listdir = None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        # for the import alone: whoever finds the name later, pytest among them, takes it for the real one
        if "pkg_resources" not in sys.modules:
            patch.setitem(sys.modules, "pkg_resources", stand_in)
        return pytest.importorskip("pysaliency")


@pytest.fixture(scope="session")
def osie() -> list[list[np.ndarray]]:
    """OSIE's fixations: per image, per observer `(num_fixations, 2)` x, y in pixels of 800x600 images."""
    root = os.environ.get("SACCADE_DATA")
    path = Path(root or "") / "osie" / "data" / "eye" / "fixations.mat"
    if not root or not path.is_file():
        pytest.skip("OSIE is not at hand: SACCADE_DATA names no folder that holds osie/data/eye/fixations.mat")
    return [
        [np.stack([np.atleast_1d(one[axis]) for axis in ("fix_x", "fix_y")], axis=1) for one in image["subjects"]]
        for image in loadmat(path, simplify_cells=True)["fixations"]
    ]
