"""Fine-tune with attention supervision: `accelerate launch downstream/main.py --config configs/downstream/....yaml`."""

from downstream.config import DEFAULT_CONFIG, DownstreamConfig
from engine.program import run_program


def main(config: DownstreamConfig) -> None:
    """Run the arms and seeds that `config` names, and write their table."""
    # imported after the options are read, so that --help answers at once
    from downstream.pipeline import run_pipeline

    run_pipeline(config)


if __name__ == "__main__":
    run_program(
        main,
        DownstreamConfig,
        description="Fine-tune a supervised task with attention supervision.",
        default_config=DEFAULT_CONFIG,
    )
