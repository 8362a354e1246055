"""Evaluate a pretrained run: `accelerate launch pretrain/probe.py --run runs/NAME --evaluators linear_probe`."""

from engine.program import run_program
from pretrain.probe_config import DEFAULT_CONFIG, ProbeConfig


def main(config: ProbeConfig) -> None:
    """Run the evaluators and write their numbers into the run's `summary.json`."""
    # imported after the options are read, so that --help answers at once
    from pretrain.evaluators.offline import probe_run

    probe_run(config)


def check(config: ProbeConfig) -> list[str]:
    """What `--check` prints; raises InputError for whatever would stop the probe."""
    from pretrain.evaluators.offline import check_probe

    return check_probe(config)


if __name__ == "__main__":
    run_program(
        main,
        ProbeConfig,
        description="Evaluate a pretrained encoder with frozen weights.",
        default_config=DEFAULT_CONFIG,
        check=check,
    )
