"""Every file of configs/accelerate, read by accelerate's own parser."""

import argparse
import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType

from tests.tools import REPOSITORY, free_port

FOLDER = REPOSITORY / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
ZERO = {name: int(name[-1]) for name in ("zero1", "zero2", "zero3", "cpu2_zero1", "cpu2_zero2", "cpu2_zero3")}
RANKS = {"gpu8": 8, "zero1": 8, "zero2": 8, "zero3": 8, "nodes": -1}


def launched(monkeypatch: pytest.MonkeyPatch, name: str, *more: object) -> tuple[argparse.Namespace, dict[str, str]]:
    """What `accelerate launch` would hand to torch's launcher, and the environment it would do it in."""
    calls: list[tuple[argparse.Namespace, dict[str, str]]] = []
    monkeypatch.setattr("torch.distributed.run.run", lambda options: calls.append((options, dict(os.environ))))
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), *map(str, more), "script.py", "--run", "x"]
    launch_command(launch_command_parser().parse_args(words))
    (call,) = calls
    return call


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_accelerate_reads_it_and_it_says_what_its_name_says(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig) and config.num_machines == 1
    expected = 2 if file.stem.startswith("cpu2") else RANKS.get(file.stem, 1)
    assert config.num_processes == expected
    # the program's --precision decides, under every launcher
    assert config.mixed_precision is None
    if file.stem in ZERO:
        assert config.distributed_type == DistributedType.DEEPSPEED
        assert config.deepspeed_config["zero_stage"] == ZERO[file.stem]
    else:
        single = expected == 1
        assert config.distributed_type == (DistributedType.NO if single else DistributedType.MULTI_GPU)
    assert config.use_cpu == (file.stem == "cpu")


def test_no_name_is_missing() -> None:
    names = {file.stem for file in FILES}
    assert names >= {"one", "cpu", "cpu2_ddp", "gpu1", "gpu8", "nodes", *ZERO}


def test_nodes_asks_for_what_it_cannot_know(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="num_processes"):
        launched(monkeypatch, "nodes")


@pytest.mark.parametrize("name", ["nodes", "gpu8", "zero1", "zero2", "zero3"])
def test_each_runs_on_any_number_of_nodes_with_one_launcher_a_node(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What slurm/node.sh gives on the command line wins over the file, and no launcher logs in anywhere."""
    port = free_port()
    place = ("--num_processes", 24, "--num_machines", 3, "--machine_rank", 2)
    options, environment = launched(monkeypatch, name, *place, "--main_process_ip", "one", "--main_process_port", port)
    assert (options.nproc_per_node, options.nnodes, options.node_rank) == ("8", "3", 2)
    assert options.rdzv_endpoint == f"one:{port}" and options.rdzv_backend == "static"
    assert options.training_script == "script.py" and options.training_script_args == ["--run", "x"]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == (str(ZERO[name]) if name in ZERO else None)
