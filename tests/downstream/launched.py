"""Fine-tunes inside the ranks of `run_distributed`: one start of the ranks for several launchers."""

from dataclasses import replace

import pytest

from downstream.config import DownstreamConfig
from downstream.main import main
from tests.pretrain.launched import join


def finetune(rank: int, world_size: int, config: DownstreamConfig, stages: list[int]) -> None:
    """Run `config` under each of DeepSpeed's ZeRO stages, 0 meaning DDP; the runs are called `zero<stage>`."""
    with pytest.MonkeyPatch.context() as patch:
        leave_java_out(patch)
        for stage in stages:
            join(rank, world_size, zero=stage)
            main(replace(config, run=f"zero{stage}"))


def leave_java_out(patch: pytest.MonkeyPatch) -> None:
    """METEOR takes seconds to start; captioning's test_metrics.py has it."""
    for module in ("metrics", "scoring"):
        patch.setattr(f"downstream.captioning.{module}.java_works", lambda: False)
