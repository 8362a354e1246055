"""The written captions of a run and their scores, which can be completed later: where Java was missing, for one."""

from collections.abc import Mapping, Sequence
from typing import Any

from downstream.captioning.metrics import java_works, score_captions
from downstream.captioning.reading import read_json
from engine.errors import InputError
from engine.files import write_json
from engine.progress import report
from engine.runs import RunFolder

WRITTEN, WORDS = "captions.json", "vocabulary.json"


def write_captions(run: RunFolder, written: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Write the run's captions with their references before anything scores them: no score can lose them."""
    content = [
        {"image": name, "caption": written[name], "references": list(references[name])} for name in sorted(written)
    ]
    write_json(run.path / WRITTEN, content)


def read_captions_of(run: RunFolder) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions and references by image.

    Raises:
        InputError: missing or damaged.
    """
    path = run.path / WRITTEN
    content = read_json(path, remedy="remove the run's summary.json and train it again")
    try:
        return {e["image"]: e["caption"] for e in content}, {e["image"]: e["references"] for e in content}
    except (TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged: remove the run's summary.json and train it again") from error


def needs_scores(run: RunFolder) -> bool:
    """Whether a finished run lacks scores for which there is a Java now."""
    missing = run.read_summary().get("unavailable", {})
    return bool(missing.keys() & {"meteor", "ptb_tokenizer"}) and (run.path / WRITTEN).is_file() and java_works()


def finish_scores(
    run: RunFolder, *, more: Mapping[str, Any] | None = None, step: int | None = None, **facts: Any
) -> None:
    """Score the run's captions and write them into its `summary.json`, under `test/`.

    Args:
        more: further metrics for the summary.
        step: of the summary; None leaves it.
        facts: further entries of the summary.
    """
    found = score_captions(*read_captions_of(run))
    for name, reason in found.unavailable.items():
        report(f"{run.name}: {name} is unavailable: {reason}")
    metrics = {f"test/{name}": value for name, value in found.metrics.items()}
    before = run.read_summary()
    if before:  # scored again, maybe elsewhere: the environment stays that of the training
        facts["environment"] = before["environment"]
    run.write_summary(
        {**metrics, **(more or {})},
        step=int(before["step"]) if step is None else step,
        tokenizer=found.tokenizer,
        unavailable=found.unavailable,
        **facts,
    )
