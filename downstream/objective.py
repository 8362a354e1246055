"""The loss of a fine-tune: classification, plus gamma times the attention loss of every supervised modality."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.adversary import Adversary
from attention.supervision import supervise
from downstream.config import SupervisionConfig
from downstream.data import Batch
from downstream.protocol import Attended, AttentionModel, Inputs
from engine.errors import InputError
from engine.passes import Backward
from engine.ranks import Ranks

ADVERSARIAL = "adversarial"


class Learner(nn.Module):
    """A model and, in the adversarial arm, one discriminator per supervised modality."""

    def __init__(self, model: AttentionModel, *, arm: str, modalities: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.model = model
        chosen = modalities if arm == ADVERSARIAL else {}
        self.adversaries = nn.ModuleDict({name: Adversary(shape) for name, shape in chosen.items()})

    def forward(self, inputs: Inputs) -> Attended:
        """The model's output."""
        return self.model(inputs)


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy `(batch,)` with classes, or with answer shares (soft targets) that need not sum to 1."""
    if targets.dim() == 1:
        return functional.cross_entropy(logits.float(), targets, reduction="none")
    return -(logits.float().log_softmax(1) * targets).sum(1)


def classification_score(logits: Tensor, targets: Tensor) -> Tensor:
    """Per example `(batch,)`: 1 where the class is right; with answer shares n/10, the official accuracy of VQA.

    That is the mean of min(1, matches / 3) over the ten subsets of nine answers, which is min(1, 0.3 n).
    """
    chosen = logits.argmax(1)
    if targets.dim() == 1:
        return (chosen == targets).float()
    shares = targets.gather(1, chosen.unsqueeze(1)).squeeze(1)
    return (3 * shares).clamp(max=1)


@dataclass
class SupervisedObjective:
    """Computes the loss of a batch; called by the training loop once per step.

    Attributes:
        module: the `Learner` as prepared for the launcher; `learner` is the same without wrapping.
        arm: "baseline", "adversarial", or a name of `attention.supervision.SUPERVISION`.
        modalities: supervised ones, the first weighted by gamma, the second by beta.
        balance_steps: steps over which the balance is measured, without attention loss; 0 for a fixed weight.
        state: where weights and sums live, to be kept in checkpoints.
    """

    module: nn.Module
    learner: Learner
    arm: str
    modalities: list[str]
    config: SupervisionConfig
    balance_steps: int
    state: dict[str, Any]
    ranks: Ranks
    device: torch.device

    def __call__(self, batch: Batch, *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Gradients of this rank's `batch`, and named scalars."""
        batch = batch.on(self.device)
        found: Attended = self.module(batch.inputs)
        loss = classification_loss(found.logits, batch.targets).mean()
        scalars = {
            "classification": loss,
            "score": classification_score(found.logits.detach(), batch.targets).mean(),
        }
        supervised = self.modalities if self.arm != "baseline" else []
        for name in supervised:
            attention = self._attention(found, batch, name)
            weight = self._weight(name, step, attention=attention, classification=scalars["classification"])
            scalars[f"attention_{name}"] = attention
            loss = loss + weight * attention
        backward(loss)
        if self.arm == ADVERSARIAL:  # after the backward, which needs the discriminators as they were
            for name in supervised:
                rows = _rows(batch.use[name], self.device)
                self._adversary(name).learn(batch.maps[name][rows], found.maps[name][rows])
        return {"loss": loss, **scalars}

    def _attention(self, found: Attended, batch: Batch, name: str) -> Tensor:
        """One modality's loss summed over the supervised examples, divided by the batch."""
        rows = _rows(batch.use[name], self.device)
        if not len(rows):
            return found.logits.sum() * 0
        pred, target = found.maps[name].float()[rows], batch.maps[name][rows]
        if self.arm == ADVERSARIAL:
            losses = self._adversary(name).loss(pred)
        else:
            mask = found.masks[name][rows] if name in found.masks else None
            losses = supervise(self.arm, pred, target, mask=mask, checked=True)  # when the surrogates were loaded
        return losses.sum() / len(batch.use[name])

    def _adversary(self, name: str) -> Adversary:
        adversary = self.learner.adversaries[name]
        assert isinstance(adversary, Adversary)
        return adversary

    def _weight(self, name: str, step: int, *, attention: Tensor, classification: Tensor) -> float:
        asked = self.config.gamma if name == self.modalities[0] else self.config.beta
        if self.config.balance == "fixed":
            return asked
        balance = self.state.setdefault(f"balance_{name}", {"attention": 0.0, "classification": 0.0, "weight": None})
        if step < self.balance_steps:
            values = torch.stack([attention.detach().abs(), classification.detach()]).tolist()
            balance["attention"] += values[0]
            balance["classification"] += values[1]
            return 0.0
        if balance["weight"] is None:
            means = self.ranks.mean({key: balance[key] for key in ("attention", "classification")})
            if means["attention"] <= 1e-12 * max(self.balance_steps, 1):
                raise InputError(
                    f"the attention loss of '{name}' was 0 over the first epoch, so no weight balances it: no example "
                    f"is supervised (supervision.only_better, supervision.margin), or the surrogates equal the model's "
                    f"own maps; set supervision.balance fixed"
                )
            weight = asked * means["classification"] / means["attention"]
            balance["weight"] = min(weight, self.config.max_weight)
        return float(balance["weight"])


def _rows(use: Tensor, device: torch.device) -> Tensor:
    """Numbers of the supervised rows, on `device`; found on the host, where `use` is, so that no GPU is waited for."""
    return use.nonzero().flatten().to(device, non_blocking=True)
