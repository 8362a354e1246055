"""What a GPU computes, against the CPU and against references; skipped where there is none.

`SACCADE_TEST_DEVICE=cpu` runs the bodies of these tests on the CPU, for whoever changes them without a GPU at hand.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

DEVICE = os.environ.get("SACCADE_TEST_DEVICE", "cuda")
HERE = Path(__file__).parent
CUDNN_TF32 = torch.backends.cudnn.allow_tf32  # as torch sets it, and so as it is in the programs that tests start
# before the first matrix product: programs with loop.deterministic set it, and what they are compared with must have it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip before any fixture trains something."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a GPU that torch.cuda sees"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fp32 in convolutions too, which torch computes in TF32 by itself; and nothing is left behind."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the programs that the tests start
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    for kernel in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def programs_arithmetic(exact_arithmetic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions as in the programs that a test starts, to whose bits it compares a run of this process."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", CUDNN_TF32)


@contextmanager
def only_cpu() -> Iterator[None]:
    """Within the context programs in this process take the CPU, as under `configs/accelerate/cpu.yaml`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def on_cpu() -> Callable[[], AbstractContextManager[None]]:
    return only_cpu
