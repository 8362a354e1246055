"""Shared by the tests of `attention/`: the reference library and OSIE's gaze."""

import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.attention.reference import import_pysaliency, osie_gaze


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small maps gain nothing from threads, and on a busy machine waiting for them costs most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pysaliency() -> types.ModuleType:
    """The reference library."""
    try:
        return import_pysaliency()
    except ImportError as error:
        pytest.skip(f"pysaliency is not installed: {error}")


@pytest.fixture(scope="session")
def osie() -> list[list[np.ndarray]]:
    """OSIE's fixations: per image, per observer `(num_fixations, 2)` x, y in pixels of 800x600 images."""
    gaze = osie_gaze()
    if gaze is None:
        pytest.skip("OSIE is not at hand: SACCADE_DATA names no folder that holds osie/data/eye/fixations.mat")
    return gaze
