"""The parts of `benchmarks/attention_supervision.py`, each a function that another process can run."""

import statistics
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from downstream.config import DownstreamConfig
from downstream.pipeline import Pipeline, supervised
from downstream.stage import FIRST_STEP, stage_folder
from downstream.surrogates import SurrogateStore
from downstream.table import write_table
from engine.errors import InputError
from engine.program import parse_config
from shards.manifest import FILE_NAME
from shards.pack import pack
from shards.sources.image_folder import ImageFolder

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("cifar10", "trec6", "easy_vqa")
FEWEST = 0.01  # share of the examples that a setting of the study must supervise
ARMS = ("coral", "mse", "mmd", "adversarial")
# Which examples are supervised, as (only_better, margin).
EXAMPLES = {"better": (True, 0.0), "all": (False, 0.0), "clear": (True, 0.05)}


@dataclass(frozen=True)
class Setting:
    """One choice of the study: the weight (gamma and beta), and which examples are supervised, a key of `EXAMPLES`."""

    gamma: float
    examples: str

    @property
    def name(self) -> str:
        """For run folders and tables."""
        return f"g{self.gamma:g}-{self.examples}"

    def of(self, config: DownstreamConfig) -> DownstreamConfig:
        """`config` with this choice."""
        only_better, margin = EXAMPLES[self.examples]
        supervision = replace(config.supervision, gamma=self.gamma, beta=self.gamma)
        return replace(config, supervision=replace(supervision, only_better=only_better, margin=margin))


SETTINGS = (
    *(Setting(gamma, examples) for gamma in (0.01, 0.1, 1.0) for examples in ("better", "all")),
    *(Setting(gamma, "clear") for gamma in (0.1, 1.0)),
)


@dataclass(frozen=True)
class Recipe:
    """One task's table.

    Attributes:
        arguments: options on top of the recipe's file.
        study: seeds on which settings are tried; none without a study.
    """

    task: str
    arguments: tuple[str, ...]
    runs: Path
    seeds: tuple[int, ...]
    study: tuple[int, ...]

    @property
    def config(self) -> DownstreamConfig:
        """Of the table, with the recipe's own weights."""
        return _config(self.task, self.arguments, self.runs)

    def trial(self, setting: Setting) -> DownstreamConfig:
        """Of the study's runs with one setting, which share the table's first steps."""
        config = setting.of(self.config)
        return replace(config, run=f"{self.task}-study-{setting.name}", first=self.task)

    def chosen(self, arm: str) -> DownstreamConfig:
        """Of the table's runs of one arm: with what the study found best for it on held-out data."""
        if not self.study or arm == "baseline":
            return self.config
        scores = self.study_scores(arm)
        return max(scores, key=lambda setting: scores[setting]).of(self.config)

    def study_scores(self, arm: str) -> dict[Setting, float]:
        """Held-out accuracy of each setting, percent, mean over the study's seeds; of those finished on all of them."""
        found = {}
        for setting in SETTINGS:
            runs = [_metrics(self.trial(setting), arm, seed) for seed in self.study]
            if all(runs):
                found[setting] = statistics.mean(run["held_out/accuracy"] for run in runs)
        return found

    def results(self) -> dict[tuple[str, int], dict[str, float]]:
        """Metrics of the table's finished runs by (arm, seed)."""
        every = {(arm, seed): _metrics(self.config, arm, seed) for seed in self.seeds for arm in ("baseline", *ARMS)}
        return {key: metrics for key, metrics in every.items() if metrics}


@cache
def _config(task: str, arguments: tuple[str, ...], runs: Path) -> DownstreamConfig:
    recipe = str(ROOT / "configs" / "downstream" / f"{task}.yaml")
    config, _ = parse_config(DownstreamConfig, argv=["--config", recipe, *arguments])
    return replace(config, run=task, runs=runs, arm="all", loop=replace(config.loop, tracker="none", num_workers=0))


@cache
def _pipeline(task: str, arguments: tuple[str, ...], runs: Path) -> Pipeline:
    """Of this process; the data are read once."""
    return Pipeline.open(_config(task, arguments, runs))


def _open(recipe: Recipe) -> Pipeline:
    return _pipeline(recipe.task, recipe.arguments, recipe.runs)


def _metrics(config: DownstreamConfig, arm: str, seed: int) -> dict[str, float]:
    return dict(stage_folder(config, arm=arm, seed=seed).read_summary().get("metrics", {}))


def surrogate_store(recipe: Recipe, seed: int, modality: str) -> SurrogateStore:
    """The surrogates of one seed's first step."""
    first = stage_folder(recipe.config, arm=FIRST_STEP, seed=seed)
    return SurrogateStore(first.path / "surrogates" / modality)


def pack_images(folder: Path, output: Path) -> Path:
    """Shards of `folder`/train and `folder`/test, which are shards already or folders of images, one a class."""
    if (folder / "train" / FILE_NAME).is_file():
        return folder
    for part in ("train", "test"):
        if not (output / part / FILE_NAME).is_file():
            pack(ImageFolder(folder / part), output / part)
    return output


def prepare(recipe: Recipe, seed: int) -> str:
    """First step, surrogates, baseline arm."""
    pipeline, config = _open(recipe), recipe.config
    first = pipeline.first_step(config, seed).read_summary()["metrics"]
    found = pipeline.surrogates(config, seed)
    base = pipeline.second_step(config, "baseline", seed).read_summary()["metrics"]
    better = ", ".join(f"{name} {100 * float((s.best > 0).float().mean()):.0f} %" for name, s in found.items())
    return (
        f"first step {first['test/accuracy']:.2f}, baseline {base['test/accuracy']:.2f} on test; "
        f"a mask beats the whole input: {better}"
    )


def try_settings(recipe: Recipe, seed: int, arm: str) -> str:
    """One arm with every setting of the study that leaves enough examples to supervise."""
    pipeline = _open(recipe)
    found = pipeline.surrogates(recipe.config, seed)
    scores = []
    for setting in SETTINGS:
        choice = recipe.trial(setting).supervision
        if min(float(supervised(given, choice).float().mean()) for given in found.values()) < FEWEST:
            scores.append(f"{setting.name} too few examples")
            continue
        metrics = pipeline.second_step(recipe.trial(setting), arm, seed).read_summary()["metrics"]
        scores.append(f"{setting.name} {metrics['held_out/accuracy']:.2f}")
    return f"held out: {', '.join(scores)}"


def train_arm(recipe: Recipe, seed: int) -> str:
    """All arms of the table for one seed.

    Raises:
        InputError: an arm is finished with other settings than were chosen now.
    """
    pipeline = _open(recipe)
    found = []
    for arm in ARMS:
        config = recipe.chosen(arm)
        run = pipeline.second_step(config, arm, seed)
        _check(run.read_config()["supervision"], config, what=str(run.path))
        found.append(f"{arm} {run.read_summary()['metrics']['test/accuracy']:.2f}")
    return f"test: {', '.join(found)}"


def _check(there: dict[str, Any], config: DownstreamConfig, *, what: str) -> None:
    for key in ("gamma", "beta", "only_better", "margin"):
        wanted = getattr(config.supervision, key)
        if there[key] != wanted:
            raise InputError(f"{what} was trained with {key} {there[key]}, now {wanted} was chosen: give other --runs")


def write_page(recipe: Recipe) -> str:
    """The table's own report, with its pictures."""
    pipeline = _open(recipe)
    write_table(recipe.config, pipeline.task, {**_first_steps(recipe), **recipe.results()})
    return str(recipe.runs / recipe.task / "report" / "index.html")


def _first_steps(recipe: Recipe) -> dict[tuple[str, int], dict[str, float]]:
    return {(FIRST_STEP, seed): _metrics(recipe.config, FIRST_STEP, seed) for seed in recipe.seeds}
