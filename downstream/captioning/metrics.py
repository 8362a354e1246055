"""Scores of captions by `pycocoevalcap`, with what can run here; what cannot is named, never guessed."""

import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from downstream.captioning.vocabulary import words_of
from engine.errors import InputError

PTB, SIMPLE = "PTB (Stanford, Java)", "simple (lower-case words, without punctuation; not PTB)"
NO_JAVA = "Java is not installed (Debian: default-jre-headless)"
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
Texts = Mapping[str, Sequence[str]]


@dataclass
class Scores:
    """Scores of a set of captions.

    Attributes:
        metrics: bleu1 to bleu4, rouge_l, cider, and where they could run meteor and spice; all as shares, not percent.
        tokenizer: what parted the texts into words.
        unavailable: metric to the reason why it is not among them.
    """

    metrics: dict[str, float]
    tokenizer: str
    unavailable: dict[str, str] = field(default_factory=dict)


def score_captions(written: Mapping[str, str], references: Texts) -> Scores:
    """Score one caption per image against its references.

    Java is used where there is one; if it is missing, or stops in the middle, the other scores stay.

    Raises:
        InputError: `pycocoevalcap` is not installed, there are no captions, or an image has no reference.
    """
    check_installed()
    if not written or written.keys() != references.keys() or not all(references.values()):
        raise InputError(f"{len(written)} captions for {len(references)} images: each needs one caption and references")
    texts, gold, tokenizer, why = _tokenized(written, references)
    scores = Scores(fast_scores(texts, gold), tokenizer)
    for name, run in (("meteor", _meteor), ("spice", _spice)):
        try:
            scores.metrics[name] = run(gold, texts)
        except _Unavailable as error:
            scores.unavailable[name] = str(error)
    if why:
        scores.unavailable["ptb_tokenizer"] = why
    return scores


def simple_scores(written: Mapping[str, str], references: Texts) -> dict[str, float]:
    """BLEU, ROUGE-L and CIDEr on words of the simple tokenizer: for choosing an epoch, without Java."""
    check_installed()
    return fast_scores(*_simple(written, references))


def check_installed() -> None:
    """Refuse early, before hours of training.

    Raises:
        InputError: `pycocoevalcap` is not installed.
    """
    if find_spec("pycocoevalcap") is None:
        raise InputError("captions are scored by pycocoevalcap: python -m pip install -e '.[captioning]'")


def java_works() -> bool:
    """Whether a Java starts here."""
    if shutil.which("java") is None:
        return False
    try:
        return subprocess.run(["java", "-version"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def fast_scores(written: Texts, references: Texts) -> dict[str, float]:
    """BLEU-1 to 4, ROUGE-L and CIDEr of tokenized texts, words parted by spaces: pure Python."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(references, written, verbose=0)
    rouge, _ = Rouge().compute_score(references, written)
    # CIDEr weighs words by how few images have them: with one image there is nothing to weigh
    cider = Cider().compute_score(references, written)[0] if len(written) > 1 else 0.0
    found = {f"bleu{n}": float(value) for n, value in enumerate(bleu, start=1)}
    return found | {"rouge_l": float(rouge), "cider": float(np.nan_to_num(cider))}


class _Unavailable(Exception):
    pass


def _simple(written: Mapping[str, str], references: Texts) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    texts = {key: [" ".join(words_of(text))] for key, text in written.items()}
    gold = {key: [" ".join(words_of(text)) for text in given] for key, given in references.items()}
    return texts, {key: gold[key] for key in texts}


def _tokenized(
    written: Mapping[str, str], references: Texts
) -> tuple[dict[str, list[str]], dict[str, list[str]], str, str]:
    """Captions and references in words, the tokenizer's name, and why it is not PTB where it is not."""
    if not java_works():
        return *_simple(written, references), SIMPLE, NO_JAVA
    try:
        texts = _ptb({key: [text] for key, text in written.items()})
        return texts, _ptb({key: references[key] for key in written}), PTB, ""
    except _Unavailable as error:
        return *_simple(written, references), SIMPLE, str(error)


def _ptb(texts: Texts) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    try:
        # an empty line would be dropped and move all texts behind it to other images
        given = {key: [{"caption": text.strip() or "."} for text in several] for key, several in texts.items()}
        found = PTBTokenizer().tokenize(given)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise _Unavailable(f"the tokenizer stopped: {error}") from error
    if {key: len(several) for key, several in found.items()} != {key: len(several) for key, several in texts.items()}:
        raise _Unavailable("the tokenizer stopped before its end")
    return {key: found[key] for key in texts}


def _meteor(references: Texts, written: Texts) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    if not java_works():
        raise _Unavailable(NO_JAVA)
    scorer = None
    try:
        scorer = Meteor()
        return float(scorer.compute_score(references, written)[0])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise _Unavailable(f"METEOR's Java stopped in the middle ({error or type(error).__name__})") from error
    finally:
        if scorer is not None:
            # its destructor waits for a lock that a failed call leaves closed, and closes a pipe that may be broken
            scorer.lock = threading.Lock()
            with suppress(OSError):
                scorer.meteor_p.stdin.close()


def _spice(references: Texts, written: Texts) -> float:
    """SPICE, where its models were put beside it: it would fetch them from the network in the middle of a run."""
    spec = find_spec("pycocoevalcap.spice")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    if not all((folder / "lib" / name).is_file() for name in SPICE_JARS):
        raise _Unavailable(f"its models ({SPICE_JARS[1]}) are not in pycocoevalcap's spice/lib")
    if not java_works():
        raise _Unavailable(NO_JAVA)
    from pycocoevalcap.spice.spice import Spice

    try:
        return float(Spice().compute_score(references, written)[0])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise _Unavailable(f"SPICE stopped: {error}") from error
