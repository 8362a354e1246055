"""One task of an array of evaluations: `python pretrain/probe_array.py --runs '[runs/a,runs/b]'`."""

from engine.program import run_program
from pretrain.probe_array_config import ProbeArrayConfig
from pretrain.probe_config import DEFAULT_CONFIG


def main(config: ProbeArrayConfig) -> None:
    """Do what is missing of this task's share, and merge whatever has finished."""
    # imported after the options are read, so that --help answers at once
    from pretrain.evaluators.shared_work import run_share

    run_share(config)


def check(config: ProbeArrayConfig) -> list[str]:
    """What `--check` prints: every piece of work, and which are still to be done."""
    from pretrain.evaluators.shared_work import describe_share

    return describe_share(config)


if __name__ == "__main__":
    run_program(
        main,
        ProbeArrayConfig,
        description="Evaluate many pretrained encoders as one task of an array.",
        default_config=DEFAULT_CONFIG,
        check=check,
    )
