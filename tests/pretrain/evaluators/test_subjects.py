"""Encoders from elsewhere: names of other libraries, sizes, statistics, and files that must not be trusted."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import InputError
from engine.ranks import Ranks
from engine.runs import RunFolder
from pretrain.evaluators.base import Subject
from pretrain.evaluators.subjects import open_subject
from pretrain.probe_config import LoadConfig, ProbeConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def torchvision_resnet() -> nn.Module:
    """torchvision's ResNet-18 with random weights."""
    torch.manual_seed(1)
    model: nn.Module = torchvision.models.resnet18().eval()
    return model


def opened(encoder: str | Path | None, **load: Any) -> Subject:
    return open_subject(ProbeConfig(run=None, encoder=str(encoder), load=LoadConfig(**load)), ranks=Ranks(), device=CPU)


def as_moco(state: dict[str, Tensor]) -> dict[str, Any]:
    named = {f"module.encoder_q.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    queue = {"module.queue": torch.zeros(3), "module.encoder_q.fc.0.weight": torch.zeros(3, 3)}
    keys = {f"module.encoder_k.{name}": torch.zeros_like(value) for name, value in state.items()}
    return {"epoch": 3, "state_dict": keys | named | queue, "arch": "resnet18"}


def as_vissl(state: dict[str, Tensor]) -> dict[str, Any]:
    trunk = {f"_feature_blocks.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    return {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {}}}}}


def as_lightly(state: dict[str, Tensor]) -> dict[str, Any]:
    """`nn.Sequential(*list(resnet18.children())[:-1])` as backbone of a Lightning module."""
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    split = {name: name.split(".", 1) for name in state}
    named = {f"backbone.{places[a]}.{b}": state[n] for n, (a, b) in split.items() if a in places}
    return {"state_dict": named | {"projection_head.layers.0.weight": torch.zeros(2, 2)}}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "torchvision": lambda state: state,
    "moco": as_moco,
    "vissl": as_vissl,
    "lightly": as_lightly,
    "dino": lambda state: {"teacher": {f"backbone.{name}": value for name, value in state.items()}},
    "simsiam": lambda state: {"model": {f"module.encoder.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_checkpoints_of_other_libraries(
    torchvision_resnet: nn.Module, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The features are those of the model that the weights came from."""
    file = tmp_path / "checkpoint.pth"
    torch.save(LAYOUTS[layout](dict(torchvision_resnet.state_dict())), file)
    subject = opened(file, architecture="resnet18")
    images = torch.randn(2, 3, 64, 64)
    body = nn.Sequential(*list(torchvision_resnet.children())[:-1])
    with torch.no_grad():
        expected = body(images).flatten(1)
        found = subject.backbone.forward_head(subject.backbone.forward_features(images), pre_logits=True)
    assert torch.allclose(found, expected, atol=1e-5)
    assert subject.image_size == 224 and not any(p.requires_grad for p in subject.backbone.parameters())
    if layout != "vissl":
        assert "not used by the encoder" in capsys.readouterr().out


def test_a_key_map_for_names_that_nobody_knows(torchvision_resnet: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "odd.safetensors"
    save_file({f"tower/{name}": value for name, value in torchvision_resnet.state_dict().items()}, file)
    with pytest.raises(InputError, match=r"begin with .*tower/conv1.*key_map"):
        opened(file, architecture="resnet18")
    subject = opened(file, architecture="resnet18", key_map={"tower/": ""})
    assert torch.equal(subject.backbone.conv1.weight, torchvision_resnet.state_dict()["conv1.weight"])
    with pytest.raises(InputError, match="begins with 'towr/'"):
        opened(file, architecture="resnet18", key_map={"towr/": ""})


def test_weights_of_another_architecture_name_the_first_misfit(torchvision_resnet: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pth"
    torch.save(torchvision_resnet.state_dict(), file)
    with pytest.raises(
        InputError, match=r"tensors do not fit, the first is layer1.*resnet18.pth|resnet18.pth: .*first"
    ):
        opened(file, architecture="resnet50")
    with pytest.raises(InputError, match=r"did you mean .*resnet18"):
        opened(file, architecture="resnt18")
    with pytest.raises(InputError, match=r"--load\.architecture"):
        opened(file)
    assert opened("timm:resnet18", weights=str(file)).hash == opened(file, architecture="resnet18").hash


class Payload:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("content", ["code", "text", "empty", "no tensors"])
def test_files_that_are_no_checkpoints(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "checkpoint.pth"
    if content == "code":
        file.write_bytes(pickle.dumps({"state_dict": Payload()}))
    elif content == "no tensors":
        torch.save({"epoch": 3}, file)
    else:
        file.write_text("hello" if content == "text" else "")
    with pytest.raises(InputError, match=r"checkpoint\.pth") as error:
        opened(file, architecture="resnet18")
    assert "\n" not in str(error.value) and not (tmp_path / "pwned").exists()


def test_a_timm_name_alone_is_random_and_the_same_every_time() -> None:
    before = torch.get_rng_state()
    first, second = opened("timm:test_resnet", image_size=32), opened("timm:test_resnet", image_size=32)
    assert (
        first.hash == second.hash and first.name == "test_resnet-random" and torch.equal(before, torch.get_rng_state())
    )
    vit = opened("timm:test_vit", image_size=32)
    assert vit.image_size == 32 and vit.backbone.patch_embed.img_size == (32, 32)


def test_an_encoder_folder_is_the_runs_own(tiny_run: RunFolder, probe: Callable[..., ProbeConfig]) -> None:
    folder = tiny_run.path / "encoder"
    alone = opened(folder)
    of_run = open_subject(probe(), ranks=Ranks(), device=CPU)
    assert alone.hash == of_run.hash and alone.image_size == of_run.image_size == 32
    assert alone.heads.keys() == of_run.heads.keys() and alone.statistics == of_run.statistics


def test_the_folders_statistics_are_used(tiny_run: RunFolder, tmp_path: Path) -> None:
    folder = copy_encoder(tiny_run, tmp_path, pretrained_cfg={"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]})
    assert opened(folder).statistics == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert opened(folder, mean=[0.0, 0.0, 0.0]).statistics[0] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "load", "words"),
    [
        ({"mean": [123.7, 116.3, 103.5]}, {}, "divided by 255"),
        ({"std": [0.2, 0.2]}, {}, "3 values"),
        ({"std": [0.2, 0.2, 0.0]}, {}, "std above 0"),
        ({"input_size": [3, 32, 48]}, {}, "input_size"),
        ({"input_size": [1, 32, 32]}, {}, "input_size"),
        ({"input_size": 32}, {}, "input_size"),
        ({}, {"mean": [0.5]}, "3 values"),
    ],
)
def test_statistics_and_sizes_that_cannot_be_right(
    tiny_run: RunFolder, tmp_path: Path, settings: dict[str, Any], load: dict[str, Any], words: str
) -> None:
    folder = copy_encoder(tiny_run, tmp_path, pretrained_cfg=settings)
    with pytest.raises(InputError, match=words):
        opened(folder, **load)


def test_a_backbone_of_one_size_refuses_another(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    settings = {
        "architecture": "test_vit",
        "model_args": {"img_size": 32},
        "pretrained_cfg": {"input_size": [3, 32, 32]},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert opened(tmp_path).image_size == 32
    with pytest.raises(InputError, match="takes 32x32 only"):
        opened(tmp_path, image_size=48)


def test_heads_or_folders_of_another_run_are_refused(
    tiny_run: RunFolder, tmp_path: Path, probe: Callable[..., ProbeConfig]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    content = tiny_run.config_file.read_text()
    (run / "config.yaml").write_text(content.replace("test_resnet", "resnet18"))
    copy_encoder(tiny_run, run)
    with pytest.raises(InputError, match="belongs to another run"):
        open_subject(dataclasses.replace(probe(), run=run), ranks=Ranks(), device=CPU)
    with pytest.raises(InputError, match=r"absent: no such encoder"):
        opened("absent")


def copy_encoder(run: RunFolder, where: Path, **changes: dict[str, Any]) -> Path:
    """A copy of a run's encoder folder with other settings."""
    folder = where / "encoder"
    folder.mkdir()
    for file in (run.path / "encoder").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    for name, values in changes.items():
        settings[name] |= values
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
