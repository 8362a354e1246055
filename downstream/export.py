"""Mined surrogates as label shards: `python downstream/export.py --run runs/cifar10-step1-seed0 --output FOLDER`."""

from downstream.export_config import ExportConfig
from engine.program import run_program


def main(config: ExportConfig) -> None:
    """Write the label set beside the image shards that the run was trained on."""
    # imported after the options are read, so that --help answers at once
    from downstream.exporter import export

    export(config)


if __name__ == "__main__":
    run_program(main, ExportConfig, description="Write mined surrogates as label shards.")
