"""Train a saliency teacher: `accelerate launch teacher/main.py --config configs/teacher/<recipe>.yaml`."""

from engine.program import run_program
from teacher.config import DEFAULT_CONFIG, Config


def main(config: Config) -> None:
    """Train, or go on with, the run that `config` names."""
    # torch and timm are imported after the options are read, so that --help answers at once
    from teacher.trainer import train

    train(config)


def check(config: Config) -> list[str]:
    """What `--check` prints; raises InputError for whatever would stop the training."""
    from teacher.trainer import check

    return check(config)


if __name__ == "__main__":
    run_program(
        main,
        Config,
        description="Train a saliency model on human gaze and keep the best one as the teacher.",
        default_config=DEFAULT_CONFIG,
        check=check,
    )
