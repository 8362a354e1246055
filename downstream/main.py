"""Fine-tune with attention supervision: `accelerate launch downstream/main.py --config configs/downstream/....yaml`."""

from downstream.config import DEFAULT_CONFIG, DownstreamConfig
from engine.program import run_program


def main(config: DownstreamConfig) -> None:
    """Run the arms and seeds that `config` names, and write their table."""
    # imported after the options are read, so that --help answers at once
    if config.task == "abn":
        from downstream.branch.pipeline import run_branch

        run_branch(config)
        return
    if config.task == "caption":
        from downstream.captioning.trainer import run_captioning

        run_captioning(config)
        return
    from downstream.pipeline import run_pipeline

    run_pipeline(config)


def check(config: DownstreamConfig) -> list[str]:
    """What `--check` prints."""
    if config.task == "caption":
        from downstream.captioning.trainer import check_captioning

        return check_captioning(config)
    if config.task == "abn":
        from downstream.branch.pipeline import check_branch

        return check_branch(config)
    from downstream.pipeline import check_pipeline

    return check_pipeline(config)


if __name__ == "__main__":
    run_program(
        main,
        DownstreamConfig,
        description="Fine-tune a supervised task with attention supervision.",
        default_config=DEFAULT_CONFIG,
        check=check,
    )
