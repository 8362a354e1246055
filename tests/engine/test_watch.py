"""Who is at fault, from what the ranks said last: the judge of engine/watch.py by itself."""

import io
import threading

import pytest
from torch.utils.data import Dataset

from engine.loading import make_loader
from engine.progress import ProgressBar
from engine.pulse import PULSE
from engine.ranks import Ranks
from engine.watch import BEAT_S, RankWatch, _Peer, broken_exchange


@pytest.fixture
def watch() -> RankWatch:
    """Of a single rank, which watches nobody by itself."""
    return RankWatch(Ranks(), timeout=100, on_lost=lambda verdict: None)


def peers(*places: tuple[int, str, float]) -> list[_Peer]:
    """Ranks 0, 1, ... by steps done, place, and seconds that they have been there, long after the first step."""
    return [
        _Peer(rank, step=step, place=place, idle_s=idle, first=False) for rank, (step, place, idle) in enumerate(places)
    ]


@pytest.mark.parametrize(
    ("places", "verdict"),
    [
        (((7, "step", 200), (7, "step", 99 - BEAT_S)), ""),
        (((7, "step", 200), (7, "data", 150)), "rank 1 (after step 7, in data) made no progress for 100 s"),
        (((7, "data", 200), (7, "step", 150)), "rank 0 (after step 7, in data)"),
        (((8, "step", 200), (7, "step", 150)), "rank 1 (after step 7, in step)"),
        (((7, "hooks", 900), (7, "hooks", 900)), ""),  # a long evaluation
        (((7, "data", 900), (7, "data", 900)), ""),  # a slow file system
        (((7, "step", 200), (7, "step", 150)), "no rank finished the step after step 7 within 100 s"),
    ],
)
def test_who_keeps_the_others_waiting(
    watch: RankWatch, places: tuple[tuple[int, str, float], ...], verdict: str
) -> None:
    own, *others = peers(*places)
    found = watch._judge(own, others)
    assert found.startswith(verdict) and bool(found) == bool(verdict), found


def test_the_first_step_may_compile_for_as_long_as_it_likes(watch: RankWatch) -> None:
    own, other = peers((0, "step", 900), (0, "step", 900))
    own.first = other.first = True
    assert watch._judge(own, [other]) == ""


def test_silence_is_measured_in_seconds_of_the_listener(watch: RankWatch) -> None:
    own, other = peers((3, "step", 0), (3, "step", 0))
    verdicts = [watch._judge(own, [other]) for _ in range(int(watch.silence / BEAT_S) + 1)]
    assert not any(verdicts[:-1]) and "rank 1 was lost" in verdicts[-1] and "no sign of life" in verdicts[-1]


def test_alone_it_does_nothing(watch: RankWatch) -> None:
    watch.at(1, "step")
    watch.leave("an error", expect_verdict=True)
    assert not watch.active and "watch" not in [thread.name for thread in threading.enumerate()]


def test_which_errors_may_come_of_another_rank() -> None:
    assert broken_exchange(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not broken_exchange(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not broken_exchange(None)


def in_evaluator(rank: int, *, waits: bool, idle: float = 200, place: str = "evaluator knn") -> _Peer:
    """A rank in an evaluation after step 7, inside an exchange with the others or not."""
    return _Peer(rank, step=7, place=place, idle_s=idle, waits=waits, first=False)


def test_who_hangs_inside_an_evaluation(watch: RankWatch) -> None:
    """The ranks that wait in an exchange name the one that does not come; work that others do not wait for is free."""
    hangs = watch._judge(in_evaluator(0, waits=True), [in_evaluator(1, waits=False), in_evaluator(2, waits=True)])
    assert hangs == "rank 1 (after step 7, in evaluator knn) made no progress for 100 s while 2 of the others waited"
    assert watch._judge(in_evaluator(0, waits=False), [in_evaluator(1, waits=False)]) == ""
    assert watch._judge(in_evaluator(0, waits=True), [in_evaluator(1, waits=False, idle=50)]) == ""
    stuck = watch._judge(in_evaluator(0, waits=True), [in_evaluator(1, waits=True)])
    assert stuck == "no rank finished evaluator knn after step 7 within 100 s: all are inside it"
    slow_disk = [in_evaluator(1, waits=False, place="saving")]
    assert watch._judge(in_evaluator(0, waits=True, place="saving"), slow_disk) == ""


def test_a_pulse_is_progress() -> None:
    """Batches, exchanges and progress bars count; what is heard of them starts the seconds anew."""
    peer, here = _Peer(1), {"step": 7, "place": "evaluator knn", "first": False, "waits": False}
    peer.hear(here | {"beats": 5})
    peer.idle_s = 50.0
    peer.hear(here | {"beats": 5})
    assert peer.idle_s == 50.0
    peer.hear(here | {"beats": 6})
    assert peer.idle_s == 0.0
    before = PULSE.beats
    list(make_loader(Numbers(), [[0], [1]], num_workers=0))
    with ProgressBar(2, "numbers", stream=io.StringIO()) as bar:
        bar.update(2)
    assert PULSE.beats == before + 3


class Numbers(Dataset[int]):
    def __getitem__(self, number: int) -> int:
        return number
