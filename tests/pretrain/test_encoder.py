"""The encoder file loads in plain timm, with Saccade out of reach, and gives the student's features."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.errors import InputError
from engine.program import parse_config
from pretrain.config import Config
from pretrain.encoder import load_encoder
from pretrain.trainer import train
from tests.tools import run_python

PLAIN = """
import sys, timm, torch
assert not any(name in sys.modules for name in ("saccade", "engine", "pretrain"))
one = timm.create_model({name!r}, num_classes=0, checkpoint_path={weights!r}{more})
two = timm.create_model("local-dir:" + {folder!r}, pretrained=True, num_classes=0)
torch.manual_seed(0)
x = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    a, b = one.eval()(x), two.eval()(x)
assert torch.equal(a, b)
torch.save(a, {output!r})
"""


@pytest.mark.parametrize(("name", "more"), [("test_resnet", ", output_stride=8"), ("test_vit", ", img_size=32")])
def test_plain_timm_loads_it_both_documented_ways(
    student_config: Callable[..., Path], tmp_path: Path, name: str, more: str
) -> None:
    norm = "batch" if name == "test_resnet" else "none"
    options = {"output_stride": 8} if name == "test_resnet" else {}
    config = student_config(model__backbone=name, model__head_norm=norm, model__backbone_options=options, max_steps=2)
    train(parse_config(Config, argv=["--config", str(config)])[0])
    folder = tmp_path / "runs" / "student" / "encoder"
    output = tmp_path / "features.pt"
    weights = str(folder / "model.safetensors")
    script = PLAIN.format(name=name, weights=weights, folder=str(folder), output=str(output), more=more)
    loaded = run_python("-I", "-c", script, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    encoder = load_encoder(folder)
    torch.manual_seed(0)
    # the other process may sum in another order: it has another number of threads
    torch.testing.assert_close(torch.load(output, weights_only=True), encoder(torch.randn(2, 3, 32, 32)))


def test_a_missing_or_foreign_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no encoder in"):
        load_encoder(tmp_path)
