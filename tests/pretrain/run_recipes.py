"""Run under a launcher: trains one recipe after the other in the same processes, which costs one start for all.

`run_recipes.py JOBS` reads a JSON list of argument lists, each what would stand behind `pretrain/main.py`.
"""

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from engine.errors import Requeue
from engine.program import parse_config
from pretrain.config import Config
from pretrain.trainer import train


def main(jobs: Path) -> None:
    """Train each; the next one may have another precision and optimiser."""
    for argv in json.loads(jobs.read_text()):
        config, _ = parse_config(Config, argv=argv)
        try:
            train(config)
        except Requeue as stopped:
            print(f"stopped: {stopped}", flush=True)
        AcceleratorState._reset_state(reset_partial_state=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
