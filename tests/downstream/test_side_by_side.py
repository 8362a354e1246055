"""Parts of a benchmark as processes: order, failures, the clock."""

from pathlib import Path

import pytest

from benchmarks.side_by_side import Job, run_jobs


def test_parts_wait_for_what_they_need_and_a_failure_stops_only_those_behind_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        Job("second", str.upper, ("b",), frozenset({"first"})),
        Job("behind", str.upper, ("d",), frozenset({"broken"})),
        Job("first", str.upper, ("a",)),
        Job("broken", str.index, ("c", "x")),  # type: ignore[arg-type]
    ]
    with pytest.raises(RuntimeError, match=r"1 of 4 parts failed, 1 were not begun; the first: broken, ValueError"):
        run_jobs(jobs, num_processes=2, logs=tmp_path)
    lines = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines()]
    assert [line.split(":")[0] for line in lines if line[:6] != "broken"] == ["first", "second"]
    assert any(line.startswith("second: B (") for line in lines)
    assert (tmp_path / "first.log").is_file() and not (tmp_path / "behind.log").exists()


def test_no_part_begins_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_jobs([Job("never", str.upper, ("a",))], num_processes=1, logs=tmp_path, minutes=1e-9)
    assert "1 of 1 parts were not begun" in capsys.readouterr().out and not (tmp_path / "never.log").exists()
