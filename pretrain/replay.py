"""Look at one step of a run again: `python pretrain/replay.py --run runs/NAME --step N`.

Reads the samples of the step, gaze images included, as its line in `bad_batches.jsonl` names them (without a line: as
their order says), and passes them through the newest checkpoint before it: which samples give what is not finite, the
terms of the loss, the norm of the gradient. Trains nothing.
"""

from engine.program import run_program
from pretrain.replay_config import ReplayConfig


def main(config: ReplayConfig) -> None:
    """Print what the step's samples do."""
    # imported after the options are read, so that --help answers at once
    from pretrain.replayed import replay

    replay(config)


if __name__ == "__main__":
    run_program(main, ReplayConfig, description="Look at one step of a run again, sample by sample.")
