"""One real Slurm for all tests of the batch scripts."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, running_cluster, why_not
from tests.tools import REPOSITORY


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two virtual nodes, on which `python` is the one that runs the tests, wherever it is installed."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("slurm")) as found:
        found.environment |= {"SACCADE_ROOT": str(REPOSITORY), "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(REPOSITORY)}
        found.environment["PATH"] = f"{Path(sys.executable).parent}:{found.environment['PATH']}"
        yield found
