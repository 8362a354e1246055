"""The attention branch network: its layers, its weights, and the masked pass of the mining branch, by value."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from downstream.branch.backbone import build_backbone
from downstream.branch.config import BranchConfig
from downstream.branch.model import AttentionBranchNetwork
from engine.errors import InputError

TINY = BranchConfig(backbone="test_resnet", size=64, sigma=0.5)


def make(config: BranchConfig = TINY, *, mining: bool = False, num_classes: int = 5) -> AttentionBranchNetwork:
    torch.manual_seed(0)
    return AttentionBranchNetwork(config, num_classes=num_classes, mining=mining)


def test_resnet50_is_cut_where_the_paper_cuts_it() -> None:
    """F is 1024x14x14; the attention branch has three bottlenecks of its own at stride 1."""
    network = make(BranchConfig(backbone="resnet50"), num_classes=7).eval()
    features = network.shared(torch.zeros(1, 3, 224, 224))
    assert features.shape == (1, 1024, 14, 14) and network.grid == (14, 14)
    blocks = network.attention.last[0]
    assert len(blocks) == 3 and blocks[0].conv2.out_channels == 512
    logits, maps = network.attention(features)
    assert logits.shape == (1, 7) and maps.shape == (1, 1, 14, 14)
    assert network.perception.last(features).shape == (1, 2048, 7, 7)
    mine, theirs = blocks[0].conv2.weight, network.perception.last[0][0].conv2.weight
    assert mine.data_ptr() != theirs.data_ptr() and not torch.equal(mine, theirs), "own random weights"


@pytest.mark.parametrize(("depth", "channels", "bottleneck"), [(20, 32, False), (56, 128, True)])
def test_the_cifar_variant_has_maps_of_sixteen(depth: int, channels: int, bottleneck: bool) -> None:
    network = make(BranchConfig(backbone=f"cifar_resnet{depth}", size=32), num_classes=10).eval()
    features = network.shared(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, channels, 16, 16)
    assert len(network.attention.last[0]) == (depth - 2) // 6
    assert hasattr(network.attention.last[0][0], "conv3") == bottleneck
    out = network(torch.rand(2, 3, 32, 32))
    assert out.maps.shape == (2, 16, 16) and out.logits.shape == out.attention_logits.shape == (2, 10)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_timm_weights_give_timm_features(name: str, tmp_path: Path) -> None:
    """Shared part and last stage in a row are timm's own model; the attention branch starts from the same stage."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=0).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.2, 0.2)  # so that the statistics are seen to load too
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    images = torch.rand(2, 3, 64, 64)
    for file in ("w.safetensors", "w.pth"):
        network = make(replace(TINY, backbone=name, weights=str(tmp_path / file))).eval()
        shared = network.shared(images)
        assert torch.allclose(network.perception.last(shared), model.forward_features(images), atol=1e-5)
        ours, theirs = network.attention.last.state_dict(), network.perception.last.state_dict()
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)
        assert network.attention.last(shared).shape[2:] == shared.shape[2:]


def test_attention_is_residual() -> None:
    network = make().eval()
    images = torch.rand(2, 3, 64, 64)
    out = network(images)
    features = network.shared((images - network.mean) / network.std)
    wanted = network.perception(features * (1 + out.maps[:, None]))
    assert torch.allclose(out.logits, wanted, atol=1e-5)
    assert ((out.maps > 0) & (out.maps < 1)).all() and out.masked_logits is None


def test_the_masked_pass_is_the_papers_formula_and_leaves_statistics_alone() -> None:
    """With and without mining, a training forward leaves the same running statistics and the same answer."""
    plain, mining = make(), make(mining=True)
    images = torch.rand(4, 3, 64, 64)
    for _ in range(2):  # statistics that are not the first ones
        first, second = plain(images), mining(images)
    assert torch.equal(first.logits, second.logits) and first.masked_logits is None
    ours, theirs = mining.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(norm.training for norm in mining.modules()), "left in training mode"
    normed = (images - mining.mean) / mining.std
    features, out = mining.shared(normed), mining(images)
    hidden = 1 / (1 + torch.exp(-100 * (out.maps[:, None] - 0.5)))
    wanted = mining.perception.eval()(features - hidden * features)
    assert torch.allclose(out.masked_logits, wanted, atol=1e-4)


def test_a_masked_score_does_not_depend_on_the_other_images() -> None:
    """No batch statistics of the masked pass mix in: given the same features, alone or among others."""
    network = make(mining=True)
    network(torch.rand(4, 3, 64, 64))
    images = torch.rand(4, 3, 64, 64)
    network.shared.eval(), network.attention.eval()
    for norm in network.perception.modules():
        norm.momentum = 0.0  # else the plain pass before it moves the statistics that it is normalised with
    whole, part = network(images), network(images[:2])
    assert torch.allclose(whole.masked_logits[:2], part.masked_logits, atol=1e-5)
    assert not torch.allclose(whole.logits[:2], part.logits, atol=1e-5), "while the plain pass is in training mode"


def test_the_masked_score_teaches_all_three_parts() -> None:
    network = make(mining=True)
    network(torch.rand(4, 3, 64, 64)).masked_logits.softmax(1)[:, 0].sum().backward()
    for part in (network.shared, network.attention, network.perception):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"backbone": "resnet1818"}, r"'resnet1818' is no timm model"),
        ({"backbone": "vit_tiny_patch16_224"}, "neither ResNet nor EfficientNet"),
        ({"backbone": "cifar_resnet21"}, r"6n \+ 2"),
        ({"backbone": "cifar_resnet20", "weights": "x"}, "trained from scratch"),
        ({"size": 16}, "makes a 1x1 map"),
        ({"weights": "nowhere.safetensors"}, "no such weights"),
        ({"weights": "efficientnet_lite0_pypi"}, "set branch.backbone"),
    ],
)
def test_refusals(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        make(replace(TINY, **change))


def test_other_weights_and_damaged_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    for name, complaint in (("other.safetensors", "does not fit"), ("damaged.pth", "holds no weights"),
                            ("damaged.safetensors", "holds no weights")):  # fmt: skip
        with pytest.raises(InputError, match=complaint):
            build_backbone("test_resnet", weights=str(tmp_path / name))
    with pytest.raises(InputError, match="no encoder"):
        build_backbone("test_resnet", weights=str(tmp_path))
