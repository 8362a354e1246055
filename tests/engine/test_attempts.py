"""The attempts of a run, and the marker that batch scripts read."""

import json
import signal
from pathlib import Path

import pytest

from engine import stop
from engine.attempts import Attempts, clear_exit, write_exit
from engine.errors import InputError
from engine.stop import StopRequest


def begin(run: Path, step: int, *, last_logged: int = 0, ignore: bool = False) -> None:
    Attempts(run).begin(step, last_logged=last_logged, ignore_failures=ignore)


def test_only_three_deaths_at_one_step_are_refused(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for end in (7, 9, 9):
        begin(tmp_path, 5)
        attempts.end(end, cause="ValueError: x", failed=True)
    begin(tmp_path, 5)  # two of three at step 9; this one is killed after it has logged step 9 as well
    with pytest.raises(InputError, match=r"all died at step 9 .*ValueError: x.*killed without a word.*ignore_failures"):
        begin(tmp_path, 5, last_logged=9)
    begin(tmp_path, 5, ignore=True)
    attempts.end(9, cause="Requeue", failed=False)  # a stop on request is no death
    begin(tmp_path, 9)


def test_the_marker_is_absent_while_the_run_goes_on(tmp_path: Path) -> None:
    begin(tmp_path, 0)
    Attempts(tmp_path).end(4, cause="Requeue: SIGUSR1", failed=False)
    write_exit(tmp_path, 75, reason="after step 4")
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 75, "reason": "after step 4", "step": 4}
    clear_exit(tmp_path)
    assert not (tmp_path / "exit.json").exists()
    write_exit(tmp_path / "absent", 2, reason="no such run")
    assert not (tmp_path / "absent").exists()


def test_a_signal_passed_on_is_one_request_and_a_late_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(stop.os, "kill", lambda pid, number: ended.append(number))
    with StopRequest() as request:
        with StopRequest() as inner:
            assert inner is request and not inner.requested
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert request.requested and request.reason == "SIGTERM" and not ended
        monkeypatch.setattr(stop, "ONE_REQUEST_S", -1.0)  # as if the time had passed
        signal.raise_signal(signal.SIGUSR1)
        assert not ended
        signal.raise_signal(signal.SIGINT)
        assert ended == [signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) != request._handle
