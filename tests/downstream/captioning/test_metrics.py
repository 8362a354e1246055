"""Scores of captions: the pure-Python ones against by-hand values, and Java that is missing or stops."""

import json
import os
import sys
from pathlib import Path

import pytest

from downstream.captioning.metrics import NO_JAVA, PTB, SIMPLE, java_works, score_captions, simple_scores
from downstream.captioning.scoring import finish_scores, needs_scores, write_captions
from engine.errors import InputError
from engine.runs import RunFolder

WRITTEN = {"a": "a dog runs on the grass", "b": "two men play a game"}
REFERENCES = {
    "a": ["A dog runs on the grass .", "a brown dog is running"],
    "b": ["two women ride a horse", "people and horses"],
}


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def fake_java(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A `java` that reports its version and otherwise does what `body`, Python, says."""
    file = folder / "java"
    text = f"#!{sys.executable}\nimport sys\nif sys.argv[1] == '-version': sys.exit(0)\n{body}\n"
    file.write_text(text)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_bleu_is_as_by_hand() -> None:
    found = simple_scores({"a": "the the the the"}, {"a": ["the cat is on the mat"]})
    assert found["bleu1"] == pytest.approx(0.5 * 2.718281828 ** (1 - 6 / 4), rel=1e-4), "clipped counts, brevity"
    perfect = simple_scores(WRITTEN, {name: [text] for name, text in WRITTEN.items()})
    assert all(perfect[f"bleu{n}"] == pytest.approx(1, abs=1e-6) for n in (1, 2, 3, 4))
    assert perfect["rouge_l"] == pytest.approx(1) and perfect["cider"] == pytest.approx(10, rel=1e-3)
    assert simple_scores(WRITTEN, REFERENCES)["bleu1"] == pytest.approx(8 / 11, rel=1e-3)


def test_without_java_the_others_are_given_and_it_is_said(without_java: None) -> None:
    found = score_captions(WRITTEN, REFERENCES)
    assert set(found.metrics) == {"bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"}
    assert found.tokenizer == SIMPLE and found.unavailable["meteor"] == NO_JAVA
    assert set(found.unavailable) == {"meteor", "spice", "ptb_tokenizer"}
    assert found.metrics == simple_scores(WRITTEN, REFERENCES)


def test_empty_captions_are_scored(without_java: None) -> None:
    found = score_captions({"a": "", "b": "a game"}, REFERENCES)
    assert 0 <= found.metrics["bleu1"] < 1


def test_java_that_stops_in_the_middle_costs_its_own_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer gives the first line and dies; METEOR answers one request and dies."""
    fake_java(tmp_path, monkeypatch, "print('a dog', flush=True); sys.stdin.readline(); sys.exit(1)")
    found = score_captions(WRITTEN, REFERENCES)
    assert found.metrics == simple_scores(WRITTEN, REFERENCES) and found.tokenizer == SIMPLE
    assert "stopped before its end" in found.unavailable["ptb_tokenizer"]
    assert "stopped in the middle" in found.unavailable["meteor"]


def test_scores_are_completed_when_there_is_a_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not java_works():
        pytest.skip("Java is not installed (Debian: default-jre-headless)")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    write_captions(run, WRITTEN, REFERENCES)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        finish_scores(run, more={"best_step": 3}, step=5, protocol={"arm": "ica"})
        assert not needs_scores(run)
    before = run.read_summary()
    before["environment"]["device"] = "the machine that trained it"
    run.summary_file.write_text(json.dumps(before))
    assert "test/meteor" not in before["metrics"] and before["tokenizer"] == SIMPLE and needs_scores(run)
    finish_scores(run)
    after = run.read_summary()
    assert 0 < after["metrics"]["test/meteor"] < 1 and after["tokenizer"] == PTB and not needs_scores(run)
    assert after["metrics"]["best_step"] == 3 and after["step"] == 5 and after["protocol"] == {"arm": "ica"}
    assert set(after["unavailable"]) == {"spice"} and after["environment"] == before["environment"]


def test_captions_without_references_are_refused() -> None:
    with pytest.raises(InputError, match="each needs one caption and references"):
        score_captions(WRITTEN, {"a": ["x"], "b": []})
