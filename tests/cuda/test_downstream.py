"""Fine-tunes on the device: train, mine, train again; and what is mined from the same weights on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from downstream.config import DataConfig, DownstreamConfig, SupervisionConfig, TextConfig
from downstream.pipeline import mine_all, run_pipeline
from downstream.stage import stage_folder
from downstream.tasks.registry import open_task
from engine.errors import Requeue
from engine.ranks import Ranks
from engine.settings import LoopConfig, OptimConfig
from tests.downstream.test_pipeline import write_trec

KINDS = ("transformer", "self_attentive")


@pytest.fixture
def config(tmp_path: Path) -> DownstreamConfig:
    return DownstreamConfig(
        run="t",
        runs=tmp_path / "runs",
        arm="baseline,mse,adversarial",
        epochs=6,
        retrain_epochs=2,
        data=DataConfig(path=write_trec(tmp_path / "trec"), batch_size=6),
        text=TextConfig(kind="transformer", width=16, heads=2, dropout=0.1),
        supervision=SupervisionConfig(balance="fixed"),
        optim=OptimConfig(name="adamw", lr=0.01, lr_scaling="none", warmup_epochs=0),
        loop=LoopConfig(num_workers=1, tracker="none", checkpoint_every=7, log_every=3),
    )


def test_it_learns_and_mines_what_the_cpu_mines(config: DownstreamConfig, device: torch.device) -> None:
    results = run_pipeline(config)
    assert set(results) == {(arm, 0) for arm in ("step1", "baseline", "mse", "adversarial")}
    assert results["baseline", 0]["test/accuracy"] > 50, "the first word gives the class away"
    assert (config.runs / "t" / "report" / "index.html").is_file()
    store = stage_folder(config, arm="step1", seed=0).path / "surrogates" / "text"
    task = open_task(config)
    found = mine_all(task, config, "text", seed=0, ranks=Ranks(), device=device)
    store.rename(store.with_name("of-the-device"))
    expected = mine_all(task, config, "text", seed=0, ranks=Ranks(), device=torch.device("cpu"))
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.unmasked, expected.unmasked, rtol=1e-3, atol=1e-4)
    # where two masks score alike, rounding decides between them
    assert ((found.maps - expected.maps).abs().amax(1) < 1e-3).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_table_goes_on(config: DownstreamConfig, kind: str) -> None:
    text = TextConfig(kind=kind, width=16, heads=2, embedding=16, hidden=32)  # type: ignore[arg-type]
    # so small a set may be learnt before any surrogate is better than the model's own map
    config = replace(config, arm="mse", text=text, supervision=SupervisionConfig(balance="fixed"))
    with pytest.raises(Requeue):
        run_pipeline(replace(config, loop=replace(config.loop, stop_after=11)))
    assert ("mse", 0) in run_pipeline(config)
