"""The runs of a report: which of them are one recipe under several seeds, and their numbers with deviations."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from engine.errors import InputError
from engine.runs import RunFolder, flatten
from pretrain.evaluators.corruptions import COMMON, SEVERITIES

# Images of ImageNet's two sets; a handful may be unreadable. The papers' input size.
IMAGENET, IMAGENET_MISSING = {"train": 1_281_167, "val": 50_000}, 0.001
IMAGENET_SIZE = 224
NOT_RECIPE = ("seed", "run", "runs", "loop", "online")
SEED_ENDING = re.compile(r"[-_.+=]*(seed|s)?[-_.+=]*$")


@dataclass(frozen=True)
class Value:
    """A number of a group.

    Attributes:
        mean: over the runs that have it.
        deviation: sample standard deviation over them; None for one.
        num_runs: how many have it.
    """

    mean: float
    deviation: float | None
    num_runs: int


@dataclass(frozen=True)
class Group:
    """Runs that share a recipe up to their seed: one row of a report.

    Attributes:
        label: what the row is called.
        runs: at least one.
        config: of the first run; empty for an encoder that came without a run.
    """

    label: str
    runs: tuple[RunFolder, ...]
    config: Mapping[str, Any]

    @property
    def arm(self) -> str:
        """The training objective, empty where there was no run."""
        return str(self.config.get("arm", ""))

    @cached_property
    def values(self) -> dict[str, Value]:
        """Every metric of the runs' summaries, and what `derived` adds."""
        each = [metrics_of(run) for run in self.runs]
        each = [metrics | derived(metrics) for metrics in each]
        names = dict.fromkeys(name for metrics in each for name in metrics)
        return {name: _over_runs([metrics[name] for metrics in each if name in metrics]) for name in names}

    @cached_property
    def on_imagenet(self) -> bool:
        """Whether all runs were measured on ImageNet's 1000 classes at 224 pixels, so that papers' values compare."""
        return all(_on_imagenet(run) for run in self.runs)

    @cached_property
    def gaps(self) -> dict[str, list[int]]:
        """Of ImageNet-C's 15 corruptions, the severities that at least one run lacks; empty also if none has any."""
        found = [run.read_summary().get("protocols", {}).get("imagenet_c", {}).get("missing", {}) for run in self.runs]
        names = {name for missing in found for name in missing}
        return {name: sorted({s for missing in found for s in missing.get(name, [])}) for name in sorted(names)}


def open_groups(runs: Sequence[RunFolder]) -> list[Group]:
    """Group runs by recipe, in the order of the first run of each.

    Raises:
        InputError: a run that is not there, one that is named twice, or none with a metric.
    """
    names = [run.name for run in runs]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None or not runs:
        what = f"'{doubled}' is named twice" if runs else "no run is named"
        raise InputError(f"students: {what}; give the names of the runs to report on")
    recipes: dict[str, list[RunFolder]] = {}
    for run in runs:
        recipes.setdefault(_recipe(run), []).append(run)
    if not any(metrics_of(run) for run in runs):
        raise InputError(f"{runs[0].path} has no summary.json with metrics: finish the run and probe it first")
    configs = [config_of(members[0]) for members in recipes.values()]
    arms = [str(config.get("arm", "")) for config in configs]
    labels = list[str]()
    for members, arm in zip(recipes.values(), arms, strict=True):
        label = arm if arm and arms.count(arm) == 1 else _common_name([run.name for run in members])
        labels.append(members[0].name if label in labels else label)
    return [
        Group(label, tuple(members), config)
        for label, members, config in zip(labels, recipes.values(), configs, strict=True)
    ]


def runs_of(groups: Sequence[Group]) -> list[RunFolder]:
    """All runs of all rows, row by row."""
    return [run for group in groups for run in group.runs]


def config_of(run: RunFolder) -> dict[str, Any]:
    """The run's config; empty for an encoder from elsewhere: results without a config, or a run of no steps."""
    summary = run.read_summary()
    if summary and (not run.config_file.is_file() or summary.get("step") == 0):
        return {}
    return run.read_config()


def metrics_of(run: RunFolder) -> dict[str, float]:
    """The run's metrics; none while it has not finished."""
    metrics = run.read_summary().get("metrics", {})
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """Means that no evaluator writes, over what is there.

    `imagenet_c/severity/<s>` in percent over the 15 corruptions, `imagenet_c/<corruption>/partial_top1` where not all
    severities were measured, `robust_gaze/severity/<s>/kld` in nats.
    """
    found: dict[str, float] = {}
    for severity in SEVERITIES:
        for name, ending in (("imagenet_c", ""), ("robust_gaze", "/kld")):
            keys = [f"{name}/{corruption}/{severity}{ending}" for corruption in COMMON]
            values = [metrics[key] for key in keys if key in metrics]
            if values:
                found[f"{name}/severity/{severity}{ending}"] = statistics.fmean(values)
    names = {key.split("/")[1] for key in metrics if re.fullmatch(r"imagenet_c/\w+/\d", key)}
    for corruption in sorted(names):
        keys = [f"imagenet_c/{corruption}/{severity}" for severity in SEVERITIES]
        values = [metrics[key] for key in keys if key in metrics]
        if len(values) < len(SEVERITIES):
            found[f"imagenet_c/{corruption}/partial_top1"] = statistics.fmean(values)
    return found


def _on_imagenet(run: RunFolder) -> bool:
    protocols = run.read_summary().get("protocols", {}).values()
    sizes = [
        [(count, protocol[name]["samples"]) for name, count in IMAGENET.items()]
        for protocol in protocols
        if all("samples" in protocol.get(name, {}) for name in IMAGENET)
    ]
    whole = all(count * (1 - IMAGENET_MISSING) <= found <= count for pairs in sizes for count, found in pairs)
    return bool(sizes) and whole and config_of(run).get("data", {}).get("image_size", IMAGENET_SIZE) == IMAGENET_SIZE


def _over_runs(values: list[float]) -> Value:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Value(statistics.fmean(values), deviation, len(values))


def _recipe(run: RunFolder) -> str:
    """Equal for runs that differ in their seed alone; an encoder from elsewhere is a recipe of its own."""
    flat = flatten(config_of(run))
    if not flat:
        return f"run {run.name}"
    return repr(sorted((k, repr(v)) for k, v in flat.items() if k.split(".")[0] not in NOT_RECIPE))


def _common_name(names: list[str]) -> str:
    """The beginning that names share, without what only leads to the seed."""
    shared = "".join(letters[0] for letters in takewhile(lambda each: len(set(each)) == 1, zip(*names, strict=False)))
    return names[0] if len(names) == 1 else SEED_ENDING.sub("", shared) or names[0]
