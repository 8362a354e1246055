"""The demo recipe's data, made when it is missing, so that `accelerate launch pretrain/main.py` works by itself."""

from engine.chain import read_chain, run_chain
from engine.program import REPOSITORY
from pretrain.config import Config, DataConfig

CHAIN = REPOSITORY / "configs" / "chain" / "demo.yaml"


def prepare_sample(config: Config) -> None:
    """Generate, pack and label the demo sample if `config` reads it and it is not there.

    The teacher is run as a program: pretraining knows of it only the label shards it writes.

    Raises:
        InputError: a step failed.
    """
    demo = DataConfig()
    if config.data.shards != demo.shards or config.data.labels not in (None, demo.labels):
        return
    run_chain(read_chain(CHAIN), variables={"data": "data/demo", "runs": str(config.runs)}, until="students")
