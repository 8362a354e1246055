"""The loss scale of fp16, which grows and shrinks: torch's own where there is one, and ours under DeepSpeed."""

from typing import Any

from accelerate import Accelerator

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000

ScaleState = dict[str, float]


class LossScale:
    """torch's rule for the scale (`torch.amp.GradScaler`), told to DeepSpeed's optimiser from outside.

    DeepSpeed's own scaling belongs to weights in fp16, batch norm's among them; with its autocast it clips gradients
    that are still scaled, and keeps a scale that overflows. So weights stay in fp32, the module computes under autocast
    as it does under DDP, and DeepSpeed divides the gradients by this scale before it clips them.

    Attributes:
        value: what losses are multiplied with.
        good_steps: steps without overflow since it last changed.
    """

    def __init__(self) -> None:
        self.value, self.good_steps = FIRST_SCALE, 0

    def attach(self, zero: Any) -> None:
        """Make DeepSpeed's optimiser scale losses by the present value, and gradients back."""
        zero.override_loss_scale(self.value)

    def update(self, zero: Any, *, overflow: bool) -> None:
        """After a step: halve the scale where a gradient overflowed, double it after 2,000 steps without."""
        if overflow:
            self.value, self.good_steps = self.value / 2, 0
        else:
            self.good_steps += 1
            if self.good_steps == GROWTH_STEPS:
                self.value, self.good_steps = 2 * self.value, 0
        self.attach(zero)


def scale_state(accelerator: Accelerator, scale: LossScale | None) -> ScaleState:
    """The scale as plain numbers, for checkpoints, whoever keeps it; empty where nothing is scaled."""
    if scale is not None:
        return {"scale": scale.value, "good_steps": scale.good_steps}
    if accelerator.scaler is None:
        return {}
    state = accelerator.scaler.state_dict()
    return {"scale": float(state["scale"]), "good_steps": int(state["_growth_tracker"])}


def load_scale(accelerator: Accelerator, scale: LossScale | None, zero: Any, state: ScaleState) -> None:
    """Go on with the scale that `scale_state` returned, under any launcher; an empty one changes nothing.

    Args:
        zero: DeepSpeed's optimiser, where `scale` is given.
    """
    if not state:
        return
    if scale is not None:
        scale.value, scale.good_steps = state["scale"], int(state["good_steps"])
        scale.attach(zero)
    elif accelerator.scaler is not None:
        known = accelerator.scaler.state_dict()
        given = {"scale": state["scale"], "_growth_tracker": int(state["good_steps"])}
        accelerator.scaler.load_state_dict(known | given)
