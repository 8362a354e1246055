"""Evaluators on a finished run."""

import time
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from safetensors.numpy import save_file

from engine.errors import InputError
from engine.launch import build_accelerator
from engine.progress import report
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.config import Config
from pretrain.encoder import encoder_hash, load_encoder
from pretrain.evaluators.base import Result, Subject, pick
from pretrain.probe_config import ProbeConfig
from shards.reader import ShardSet


def read_run_config(run: RunFolder) -> Config:
    """The config that a pretraining run was started with.

    Raises:
        InputError: no run there, or one of another program or version.
    """
    values = run.read_config()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config)
    try:
        namespace = parser.instantiate(parser.parse_object(values))
    except Exception as error:
        raise InputError(f"{run.config_file} is no pretraining config: {' '.join(str(error).split())}") from error
    return Config(**{name: namespace[name] for name in values})


def probe_run(config: ProbeConfig) -> None:
    """Run the chosen evaluators; metrics go to `summary.json`, predicted maps to `probe/<evaluator>.safetensors`.

    Raises:
        InputError: unknown evaluator, unfinished run, shards that do not fit.
    """
    chosen = pick(config.evaluators)
    run = RunFolder(config.run)
    accelerator = build_accelerator(seed=config.seed)
    ranks = Ranks()
    subject = _subject(config, run, ranks=ranks, device=accelerator.device)
    for name, evaluator in chosen.items():
        started = time.monotonic()
        subject.report(f"{name}: {run.path}")
        result = evaluator(subject, config)
        if ranks.is_main:
            _write(run, name, result, subject)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items())
        subject.report(f"{name}: {shown} ({time.monotonic() - started:.0f} s)")
    ranks.barrier()


def check_probe(config: ProbeConfig) -> list[str]:
    """Validate evaluators, run and shards without evaluating."""
    chosen = pick(config.evaluators)
    run = RunFolder(config.run)
    read_run_config(run)
    load_encoder(run.path / "encoder")
    sets = {"linear_probe": (config.train, config.val), "alignment": (config.gaze,)}
    lines = [f"run: {run.path}, encoder {encoder_hash(run.path / 'encoder')[:12]}"]
    for path in dict.fromkeys(path for name in chosen for path in sets.get(name, ())):
        lines.append(f"shards: {path}, {ShardSet(path).num_samples} samples")
    return lines


def _subject(config: ProbeConfig, run: RunFolder, *, ranks: Ranks, device: Any) -> Subject:
    pretraining = read_run_config(run)
    encoder = run.path / "encoder"
    return Subject(
        config=pretraining,
        backbone=load_encoder(encoder).to(device),
        encoder=encoder,
        step=int(run.read_summary().get("step", 0)),
        device=device,
        ranks=ranks,
        report=report if ranks.is_main else lambda line: None,
    )


def _write(run: RunFolder, name: str, result: Result, subject: Subject) -> None:
    prefix = "attention" if name == "alignment" else name
    assert subject.encoder is not None
    protocols = run.read_summary().get("protocols", {})
    protocols[name] = {"encoder": encoder_hash(subject.encoder), **result.protocol}
    run.write_summary(
        {f"{prefix}/{key}": value for key, value in result.metrics.items()}, step=subject.step, protocols=protocols
    )
    if result.maps:
        folder = run.path / "probe"
        folder.mkdir(exist_ok=True)
        save_file(
            {key: np.ascontiguousarray(m, dtype=np.float32) for key, m in result.maps.items()},
            folder / f"{name}.safetensors",
        )
