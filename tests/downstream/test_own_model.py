"""The example of docs/downstream.md: a model of the user's own is mined and supervised."""

import re
from typing import Any

import torch

from attention.supervision import supervise
from downstream.masks import grid_masks
from downstream.miner import mine
from tests.tools import REPOSITORY


def test_the_documented_model_is_mined_and_learns_its_surrogates() -> None:
    code = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / "downstream.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(compile(code[1], "docs/downstream.md", "exec"), names)
    lines = [line for line in code[1].splitlines() if line.strip()]
    assert len(lines) <= 36, "the page promises a short example"
    torch.manual_seed(0)
    model = names["ClassTokenAttention"]("test_vit", num_classes=3, image_size=64)
    inputs, targets = {"images": torch.randn(4, 3, 64, 64)}, torch.tensor([0, 1, 2, 0])
    output = model.eval()(inputs)
    assert torch.allclose(output.logits, model.vit(inputs["images"]), atol=1e-5), "the split changes nothing"
    grid = tuple(output.maps["image"].shape[1:])
    masks = grid_masks((grid[0], grid[1]), count=30, scale=2, seed=0)
    found = mine(model, inputs, targets, modality="image", masks=lambda row: masks)
    assert found.maps.shape == (4, *grid) and (found.scores >= found.unmasked).all()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = supervise("kld", model(inputs).maps["image"], found.maps.clone()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
