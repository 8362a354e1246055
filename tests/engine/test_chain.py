"""A chain skips what is done, stops at the first fault, and says which command it was."""

from pathlib import Path

import pytest

from engine.chain import Step, read_chain, run_chain
from engine.errors import InputError
from tests.tools import REPOSITORY


def test_the_shipped_chains_read_and_name_programs_that_exist() -> None:
    chains = sorted((REPOSITORY / "configs" / "chain").glob("*.yaml"))
    assert chains
    for path in chains:
        for step in read_chain(path):
            assert (REPOSITORY / step.program).is_file()
            if "config" in step.options:
                assert (REPOSITORY / step.options["config"]).is_file(), step


def test_done_steps_are_skipped_and_failing_ones_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").touch()
    done = Step("done", "no/such/program.py", "{data}/there")
    run_chain([done], variables={"data": str(tmp_path)})
    assert "done before" in capsys.readouterr().out
    bad = Step("bad", "pretrain/main.py", "{data}/never", options={"optim.lrr": 1})
    with pytest.raises(InputError, match=r"'bad' ended with exit code 2.*optim\.lrr"):
        run_chain([done, bad], variables={"data": str(tmp_path)})
    run_chain([done, Step("late", "x.py", "{data}/never", group="g")], variables={"data": str(tmp_path)}, until="g")


def test_a_file_that_is_no_chain_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("steps: [{title: a, prog: b}]")
    with pytest.raises(InputError, match="no chain"):
        read_chain(path)
    with pytest.raises(InputError, match="no chain file"):
        read_chain(tmp_path / "absent.yaml")
