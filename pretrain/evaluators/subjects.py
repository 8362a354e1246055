"""The encoder under test: a run's, an `encoder/` folder, a timm model, or a checkpoint of another library."""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.package_weights import PYPI, PYPI_BACKBONE, package_weights
from engine.program import config_from_dict
from engine.progress import report, silent
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.config import Config, DataConfig, ModelConfig
from pretrain.encoder import CONFIG, encoder_hash, load_encoder, load_heads
from pretrain.evaluators.base import Statistics, Subject
from pretrain.evaluators.checkpoints import fit_state, read_state
from pretrain.model import build_backbone, input_statistics
from pretrain.probe_config import LoadConfig, ProbeConfig

TIMM = "timm:"


def open_subject(probe: ProbeConfig, *, ranks: Ranks, device: torch.device) -> Subject:
    """The encoder that the probe's config names, frozen and on `device`.

    Raises:
        InputError: nothing there, weights that do not fit, an input size or statistics that cannot be right.
    """
    tell = report if ranks.is_main else silent
    if probe.encoder is None:
        subject = _from_run(probe, ranks=ranks, tell=tell)
    elif probe.encoder.startswith(TIMM):
        subject = _from_timm(probe.encoder.removeprefix(TIMM), probe, ranks=ranks, tell=tell)
    elif (Path(probe.encoder) / CONFIG).is_file():
        subject = _from_folder(Path(probe.encoder), probe, ranks=ranks, tell=tell)
    elif Path(probe.encoder).is_file():
        subject = _from_checkpoint(Path(probe.encoder), probe, ranks=ranks, tell=tell)
    else:
        raise InputError(
            f"encoder {probe.encoder}: no such encoder; give an encoder/ folder, timm:NAME, or a checkpoint file"
        )
    check_statistics(subject.statistics, where=probe.encoder or str(probe.run))
    subject.backbone.eval().requires_grad_(False).to(device)
    return dataclasses.replace(subject, device=device)


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names and bytes of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_run_config(run: RunFolder) -> Config:
    """The config that a pretraining run was started with.

    Raises:
        InputError: no run there, or one of another program or version.
    """
    return config_from_dict(Config, run.read_config(), source=run.config_file, what="pretraining config")


def untrained(subject: Subject, *, seed: int) -> Subject:
    """The same architecture with random weights, as a floor; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = build_backbone(subject.config)
    backbone.eval().requires_grad_(False).to(subject.device)
    return dataclasses.replace(subject, backbone=backbone, hash=state_hash(backbone), heads={}, name="random init")


def check_statistics(statistics: Statistics, *, where: str) -> None:
    """Refuse means and deviations that no input can have.

    Raises:
        InputError: not three of each, a mean outside 0 to 1, a deviation that is not positive.
    """
    mean, std = statistics
    if len(mean) != 3 or len(std) != 3:
        raise InputError(f"{where}: mean {list(mean)} and std {list(std)} must have 3 values each, one a channel")
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise InputError(
            f"{where}: mean {list(mean)}, std {list(std)}: give shares of the full range, mean 0 to 1 and std above 0 "
            "(values counted to 255 have to be divided by 255)"
        )


def _from_run(probe: ProbeConfig, *, ranks: Ranks, tell: Callable[[str], None]) -> Subject:
    if probe.run is None:
        raise InputError("neither a run nor an encoder is given: set --run or --encoder")
    run = RunFolder(probe.run)
    config = read_run_config(run)
    folder = run.path / "encoder"
    subject = _from_folder(folder, probe, ranks=ranks, tell=tell)
    if config.model.backbone != subject.config.model.backbone:
        raise InputError(
            f"{folder}: {subject.config.model.backbone}, but the run trained {config.model.backbone}: the folder "
            "belongs to another run"
        )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=subject.image_size))
    return dataclasses.replace(
        subject, config=config, name=run.name, step=int(run.read_summary().get("step", 0)), heads=load_heads(folder)
    )


def _from_folder(folder: Path, probe: ProbeConfig, *, ranks: Ranks, tell: Callable[[str], None]) -> Subject:
    backbone = load_encoder(folder)
    settings = json.loads((folder / CONFIG).read_text())
    given = settings.get("pretrained_cfg", {})
    default = input_statistics(backbone)
    statistics = (tuple(given.get("mean", default[0])), tuple(given.get("std", default[1])))
    size = given.get("input_size", [3, 224, 224])
    if not (isinstance(size, list) and len(size) == 3 and size[0] == 3 and size[1] == size[2] and _is_size(size[1])):
        raise InputError(f"{folder / CONFIG}: input_size {size} is not [3, side, side]: the encoder needs square RGB")
    options = settings.get("model_args", {})
    config = _config(settings["architecture"], probe, size=size[1], options=options)
    config.model.cifar_stem = bool(settings.get("cifar_stem", False))
    return Subject(
        config=_resized(config, backbone, probe.load),
        backbone=backbone,
        heads=load_heads(folder),
        hash=encoder_hash(folder),
        name=folder.parent.name if folder.name == "encoder" else folder.name,
        step=0,
        statistics=_overridden(statistics, probe.load),
        device=torch.device("cpu"),
        ranks=ranks,
        report=tell,
    )


def _from_timm(name: str, probe: ProbeConfig, *, ranks: Ranks, tell: Callable[[str], None]) -> Subject:
    _check_name(name)
    config = _config(name, probe, size=_timm_size(name))
    with torch.random.fork_rng():
        torch.manual_seed(probe.seed)
        backbone = build_backbone(config)
    weights = probe.load.weights
    if weights is not None:
        state = _from_package(name) if weights == PYPI else read_state(Path(weights), key_map=probe.load.key_map)
        for line in fit_state(backbone, state, where=f"load.weights {weights}"):
            tell(line)
    label = name if weights is not None else f"{name}-random"
    return _foreign(config, backbone, probe, label, ranks=ranks, tell=tell)


def _from_checkpoint(file: Path, probe: ProbeConfig, *, ranks: Ranks, tell: Callable[[str], None]) -> Subject:
    if probe.load.architecture is None:
        raise InputError(f"encoder {file}: say which timm model these weights belong to: --load.architecture resnet50")
    _check_name(probe.load.architecture)
    config = _config(probe.load.architecture, probe, size=_timm_size(probe.load.architecture))
    backbone = build_backbone(config)
    for line in fit_state(backbone, read_state(file, key_map=probe.load.key_map), where=str(file)):
        tell(line)
    return _foreign(config, backbone, probe, file.stem, ranks=ranks, tell=tell)


def _foreign(
    config: Config, backbone: Any, probe: ProbeConfig, label: str, *, ranks: Ranks, tell: Callable[[str], None]
) -> Subject:
    return Subject(
        config=_resized(config, backbone, probe.load),
        backbone=backbone,
        heads={},
        hash=state_hash(backbone),
        name=label,
        step=0,
        statistics=_overridden(input_statistics(backbone), probe.load),
        device=torch.device("cpu"),
        ranks=ranks,
        report=tell,
    )


def _config(name: str, probe: ProbeConfig, *, size: int, options: dict[str, Any] | None = None) -> Config:
    return Config(
        run="foreign",
        arm="contrastive",
        data=DataConfig(shards=probe.train, labels=probe.labels, image_size=probe.load.image_size or size),
        model=ModelConfig(backbone=name, backbone_options=options or {}),
    )


def _resized(config: Config, backbone: Any, load: LoadConfig) -> Config:
    """The config, after making sure that the backbone takes images of its size."""
    fixed = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    size = config.data.image_size
    if fixed is not None and tuple(fixed) != (size, size):
        raise InputError(
            f"load.image_size {size}: {config.model.backbone} here takes {fixed[0]}x{fixed[1]} only; leave it out"
        )
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0][:160]
        raise InputError(f"{config.model.backbone} cannot take {size}x{size} images ({reason}): change the size") from (
            error
        )
    return config


def _overridden(statistics: Statistics, load: LoadConfig) -> Statistics:
    mean = tuple(load.mean) if load.mean is not None else statistics[0]
    std = tuple(load.std) if load.std is not None else statistics[1]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (*mean, *std)):
        raise InputError(f"mean {list(mean)} and std {list(std)} must be numbers")
    return mean, std


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise InputError(f"'{name}' is no timm model; {hint}")


def _timm_size(name: str) -> int:
    settings = timm.get_pretrained_cfg(name)
    return int(settings.input_size[-1]) if settings is not None else 224


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _from_package(name: str) -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from PyPI, under timm's names, which list the same layers in order."""
    if name != PYPI_BACKBONE:
        raise InputError(f"load.weights {PYPI} belongs to {TIMM}{PYPI_BACKBONE}, not to {name}")
    return package_weights("load.weights")
