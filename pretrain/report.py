"""Compare pretrained runs in one page: `python pretrain/report.py --config configs/report/demo.yaml`."""

from engine.program import run_program
from pretrain.report_config import DEFAULT_CONFIG, ReportConfig


def main(config: ReportConfig) -> None:
    """Write `summary.json`, `report/index.html` and `report/summary.md`, and print the table."""
    # imported after the options are read, so that --help answers at once
    from pretrain.comparison import compare

    compare(config)


if __name__ == "__main__":
    run_program(main, ReportConfig, description="Compare pretrained runs in one report.", default_config=DEFAULT_CONFIG)
