"""The surrogate miner against probing one mask at a time, on this device."""

import torch
from common import ratio_of_pairs, time_pairs

from downstream.masks import grid_masks
from downstream.miner import mine, true_class_score
from downstream.models.image import SmallAttentionNetwork

NUM_IMAGES = 4


def miner_ratio(pairs: int) -> float:
    """Times as fast over `pairs` turns: 4 images of 32x32 pixels with 501 masks in batches, and each by itself."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SmallAttentionNetwork(num_classes=10).to(device).eval()
    images = torch.randint(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=torch.uint8, device=device)
    inputs, targets = {"images": images}, torch.arange(NUM_IMAGES, device=device)
    masks = grid_masks((8, 8), count=500, scale=2, seed=0).to(device)

    def batched() -> None:
        mine(model, inputs, targets, modality="image", masks=lambda row: masks)
        _wait(device)

    @torch.inference_mode()
    def one_by_one() -> None:
        for row in range(len(targets)):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            best = -1.0
            for mask in masks:
                features = model.encode(one)
                found = model.attend({"image": features["image"] * mask.unsqueeze(-1)}, one)
                best = max(best, float(true_class_score(found.logits, targets[row : row + 1])))
        _wait(device)

    return ratio_of_pairs(*time_pairs(batched, one_by_one, num_pairs=pairs))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
