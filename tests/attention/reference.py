"""pysaliency and OSIE's gaze, for the tests of `attention/` and for the benchmark of the metrics."""

import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat


def import_pysaliency() -> Any:
    """Import pysaliency 0.2, which needs two names that current setuptools and numpy no longer have."""
    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # type: ignore[attr-defined]
    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_string = stand_in.resource_listdir = None  # type: ignore[attr-defined]
    needed = "pkg_resources" not in sys.modules
    if needed:
        sys.modules["pkg_resources"] = stand_in
    try:
        import pysaliency
    finally:
        # For the import alone: whoever finds the name later, pytest among them, takes it for the real one.
        if needed:
            del sys.modules["pkg_resources"]
    return pysaliency


def stored_model(pysaliency: Any, stimuli: Any, maps: Sequence[np.ndarray]) -> Any:
    """A saliency model of pysaliency's whose maps, one per stimulus, lie in its cache."""

    class Stored(pysaliency.SaliencyMapModel):  # type: ignore[misc]
        def _saliency_map(self, stimulus: np.ndarray) -> np.ndarray:
            raise LookupError("every map is stored")

    model = Stored()
    for stimulus, each in zip(stimuli, maps, strict=True):
        model._cache[stimulus.stimulus_id] = each
    return model


def as_fixations(pysaliency: Any, points: Sequence[np.ndarray]) -> Any:
    """Points `(num_points, 2)` x, y per image as pysaliency's fixations."""
    owner = np.repeat(np.arange(len(points)), [len(each) for each in points])
    x, y = np.concatenate(points).T
    return pysaliency.Fixations.create_without_history(x=x, y=y, n=owner)


def osie_gaze() -> list[list[np.ndarray]] | None:
    """OSIE's fixations: per image, per observer `(num_fixations, 2)` x, y in pixels; None where it is not at hand."""
    root = os.environ.get("SACCADE_DATA")
    path = Path(root or "") / "osie" / "data" / "eye" / "fixations.mat"
    if not root or not path.is_file():
        return None
    return [
        [np.stack([np.atleast_1d(one[axis]) for axis in ("fix_x", "fix_y")], axis=1) for one in image["subjects"]]
        for image in loadmat(path, simplify_cells=True)["fixations"]
    ]
