"""The evaluators that exist: our own, and those that installed packages announce.

A package adds one by an entry point of the group `saccade.evaluators` that names an `Evaluator`:

    [options.entry_points]
    saccade.evaluators =
        my_score = my_package:evaluator
"""

import difflib
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from engine.errors import InputError
from pretrain.evaluators.base import Evaluator

GROUP = "saccade.evaluators"
OWN = ("linear_probe", "knn", "imagenet_c", "alignment", "retrieval", "finetune", "robust_gaze")


def known_names() -> list[str]:
    """Names of all evaluators; nothing is imported."""
    return sorted({*OWN, *_foreign()})


def pick(names: str) -> list[Evaluator]:
    """Evaluators named in a comma-separated list, in its order.

    Raises:
        InputError: an unknown name, with the nearest known one; none at all; or a package whose evaluator is broken.
    """
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    known = known_names()
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise InputError(f"evaluators '{names}': '{name}' is not known; {hint}take from {', '.join(known)}")
    if not chosen:
        raise InputError(f"evaluators '{names}': none named; take from {', '.join(known)}")
    return [_load(name) for name in chosen]


def _foreign() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in OWN}


def _load(name: str) -> Evaluator:
    if name in OWN:
        evaluator = import_module(f"pretrain.evaluators.{name}").evaluator
    else:
        point = _foreign()[name]
        try:
            evaluator = point.load()
        except Exception as error:  # whatever a foreign package does wrong is its user's to know, in one line
            raise InputError(f"evaluator '{name}' ({point.value}) cannot be loaded: {error!r}; repair it") from error
    if not isinstance(evaluator, Evaluator):
        raise InputError(
            f"evaluator '{name}': its entry point gives {type(evaluator).__name__}; make it a "
            "pretrain.evaluators.base.Evaluator"
        )
    return evaluator
