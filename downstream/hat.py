"""A run's attention against people's: `python downstream/hat.py --run runs/vqa-adversarial-seed0 --maps FOLDER`."""

from downstream.hat_config import HatConfig
from engine.program import run_program


def main(config: HatConfig) -> None:
    """Write rank correlation and earth mover's distance into the run's `summary.json`."""
    # imported after the options are read, so that --help answers at once
    from downstream.human_attention import evaluate_run

    evaluate_run(config)


if __name__ == "__main__":
    run_program(main, HatConfig, description="Compare a run's attention with human attention (VQA-HAT).")
