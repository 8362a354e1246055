"""Pretrain a student: `accelerate launch pretrain/main.py --config configs/pretrain/<recipe>.yaml`."""

from engine.program import run_program
from pretrain.config import DEFAULT_CONFIG, Config


def main(config: Config) -> None:
    """Train, or go on with, the run that `config` names."""
    # torch, timm and DeepSpeed are imported after the options are read, so that --help answers at once
    from pretrain.trainer import train

    train(config)


def check(config: Config) -> list[str]:
    """What `--check` prints; raises InputError for whatever would stop the training."""
    from pretrain.trainer import check

    return check(config)


if __name__ == "__main__":
    run_program(
        main,
        Config,
        description="Pretrain a vision encoder on images and, in attention arms, on where people look.",
        default_config=DEFAULT_CONFIG,
        check=check,
    )
