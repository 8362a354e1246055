"""A run without training: a tiny student with its folder, and probes of it on the generated sample."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.program import config_to_dict
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.config import AttentionConfig, Config, DataConfig, ModelConfig
from pretrain.encoder import write_encoder
from pretrain.evaluators.base import Subject
from pretrain.evaluators.subjects import open_subject
from pretrain.model import Student
from pretrain.probe_config import FinetuneConfig, KnnConfig, LinearConfig, ProbeConfig
from tests.conftest import TinySample


def write_run(
    path: Path, sample: TinySample, *, arm: Any = "contrastive+attention", options: dict[str, Any] | None = None
) -> RunFolder:
    """A run folder with config and encoder, as a training of no steps would leave it; `options` are the backbone's."""
    config = Config(
        run=path.name,
        runs=path.parent,
        arm=arm,
        data=DataConfig(shards=sample.train, labels=sample.labels, batch_size=12, image_size=32),
        model=ModelConfig(backbone="test_resnet", backbone_options=options or {}, projector_hidden=16, projector_out=8),
        attention=AttentionConfig(channels=8, stages=[1]),
    )
    torch.manual_seed(0)
    student = Student(config, num_classes=4).eval()
    run = RunFolder(path)
    run.claim(config_to_dict(config))
    write_encoder(path / "encoder", student.backbone, config=config, student=student.state_dict())
    return run


def tiny_probe(run: Path | None, sample: TinySample, **changes: Any) -> ProbeConfig:
    """Options of a probe that takes a moment."""
    probe = ProbeConfig(
        run=run,
        train=sample.train,
        val=sample.val,
        gaze=sample.gaze,
        num_workers=0,
        linear=LinearConfig(epochs=10, rates=[0.1]),
        knn=KnnConfig(k=5),
        finetune=FinetuneConfig(epochs=1, fractions=[0.2]),
    )
    return replace(probe, **changes)


@pytest.fixture(scope="session")
def tiny_run(tiny_sample: TinySample, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A student with an attention head; read only."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_sample)


@pytest.fixture
def probe(tiny_run: RunFolder, tiny_sample: TinySample, tmp_path: Path) -> Callable[..., ProbeConfig]:
    """Makes probes of `tiny_run` that write elsewhere."""

    def make(**changes: Any) -> ProbeConfig:
        return tiny_probe(tiny_run.path, tiny_sample, **({"output": tmp_path / "out"} | changes))

    return make


@pytest.fixture
def open_tiny(probe: Callable[..., ProbeConfig], tmp_path: Path) -> Callable[..., tuple[Subject, ProbeConfig]]:
    """The subject of a probe, with a cache, and the probe."""

    def make(*, cache: Path | None = None, **changes: Any) -> tuple[Subject, ProbeConfig]:
        config = probe(**changes)
        subject = open_subject(config, ranks=Ranks(), device=torch.device("cpu"))
        return replace(subject, cache=cache or tmp_path / "cache"), config

    return make
