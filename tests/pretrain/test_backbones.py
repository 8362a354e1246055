"""timm's families as students: each trains with an attention head, and its encoder file tells the features' width."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from engine.errors import InputError
from pretrain.assemble import assemble_student
from pretrain.config import AttentionConfig, Config, DataConfig, ModelConfig
from pretrain.encoder import feature_width, load_encoder, write_encoder
from pretrain.evaluators.finetune import _Classifier

SIZE = 64
# the smallest of each family, made narrow where there is no small one; and the grid of its last stage
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet": ("test_resnet", {}, 2),
    "mobilenetv3": ("mobilenetv3_small_050", {}, 2),
    "vgg": ("vgg11", {"mlp_ratio": 0.01}, 2),
    "convnext": ("test_convnext", {}, 2),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": [1] * 4, "num_heads": [1, 2, 2, 2]}, 2),
    "efficientnet": ("test_efficientnet", {}, 2),
    "densenet": ("densenet121", {"growth_rate": 8, "block_config": [1, 1, 1, 1]}, 2),
    "ghostnet": ("ghostnet_050", {}, 2),
    "mambaout": ("test_mambaout", {}, 2),
    "vit with a class token": ("test_vit", {}, 4),
    "vit with registers": ("test_vit", {"reg_tokens": 3}, 4),
    "vit with two tokens": ("deit_tiny_distilled_patch16_224", {"embed_dim": 48, "depth": 2}, 4),
}


def make_config(backbone: str, **options: Any) -> Config:
    return Config(
        data=DataConfig(image_size=SIZE),
        model=ModelConfig(backbone=backbone, backbone_options=options, projector_hidden=16, projector_out=8),
        attention=AttentionConfig(channels=4, stages=[0, -1]),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_an_attention_head(family: str, tmp_path: Path) -> None:
    name, options, grid = FAMILIES[family]
    config = make_config(name, **options)
    student = assemble_student(config, num_classes=0, accelerator=Accelerator(cpu=True))
    assert student.training
    images = torch.randn(2, 3, SIZE, SIZE)
    output = student(images)
    width = feature_width(student.backbone)
    assert output.features.shape == (2, width) and output.embeddings.shape == (2, 8)
    assert len(output.attention) == 2 and output.attention[-1].shape == (2, grid, grid)
    assert all(len(one) == 2 and one.isfinite().all() for one in output.attention)
    (output.embeddings.sum() + sum(one.square().sum() for one in output.attention)).backward()
    assert all(head.predict.weight.grad.abs().sum() > 0 for head in student.attention_heads)
    # the encoder file, and fine-tuning from it
    write_encoder(tmp_path / "encoder", student.backbone, config=config, student=student.state_dict())
    assert json.loads((tmp_path / "encoder" / "config.json").read_text())["num_features"] == width
    encoder = load_encoder(tmp_path / "encoder")
    assert encoder(images).shape == (2, width)
    assert _Classifier(encoder, 3)(images).shape == (2, 3)


@pytest.mark.parametrize(
    ("backbone", "words"),
    [("coat_tiny", "Input height .64. doesn't match model .224."), ("halonet_h1", "AssertionError")],
)
def test_a_backbone_that_does_not_take_the_size_is_refused_in_one_line(backbone: str, words: str) -> None:
    with pytest.raises(InputError, match=f"'{backbone}' gives no feature maps of images of 64 px .*{words}") as caught:
        assemble_student(make_config(backbone), num_classes=0, accelerator=Accelerator(cpu=True))
    assert "\n" not in str(caught.value)
