"""The table of a fine-grained run: arms over seeds against the equally long plain training, published values beside."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from downstream.branch.data import FineGrained
from downstream.branch.evaluate import read_evaluation, summarise
from downstream.branch.gallery import add_gallery
from downstream.config import DownstreamConfig
from downstream.paired import markdown_table, paired_gain, spread
from downstream.stage import FIRST_STEP, stage_folder
from engine.files import atomic_write
from engine.page import Grey, Page
from engine.progress import report
from engine.runs import RunFolder

# top-1 and top-5 in percent (Iwayoshi et al.; maps edited by people: Mitsuhara et al.): other images than ours.
PAPER: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "cub": {"baseline": (31.68, 57.01), "mining": (33.53, 58.68), "maps": (37.4, 62.08)},
    "dogs": {"baseline": (71.81, 93.02), "mining": (71.99, 92.80)},
}
COLUMNS = {
    "test/top1": "top-1 %",
    "test/top5": "top-5 %",
    "test/insertion": "insertion",
    "test/insertion_zero": "insertion from zero",
    "test/deletion": "deletion",
    "misclassified/insertion": "insertion, misclassified",
    "misclassified/deletion": "deletion, misclassified",
    "test/map_cc": "CC with given maps",
}
Results = Mapping[tuple[str, int], Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """One arm over all its seeds.

    Attributes:
        means, deviations: by metric; the deviation over seeds is 0 for one.
        gain: top-1 minus the baseline's over the same seeds, points; None without a baseline.
        p_value: of the paired t-test on top-1; None with fewer than two seeds.
    """

    arm: str
    num_seeds: int
    means: dict[str, float]
    deviations: dict[str, float]
    gain: float | None
    p_value: float | None


def tabulate(results: Results) -> list[Row]:
    """A row for each arm, in the order of the results."""
    by_arm: dict[str, dict[int, Mapping[str, float]]] = {}
    for (arm, seed), metrics in results.items():
        by_arm.setdefault(arm, {})[seed] = metrics
    baseline = by_arm.get("baseline", {})
    rows = []
    for arm, runs in by_arm.items():
        names = [name for name in COLUMNS if all(name in metrics for metrics in runs.values())]
        values = {name: [float(metrics[name]) for metrics in runs.values()] for name in names}
        gain = p_value = None
        if arm not in ("baseline", FIRST_STEP):
            ours, theirs = ({s: float(found["test/top1"]) for s, found in part.items()} for part in (runs, baseline))
            gain, p_value = paired_gain(ours, theirs)
        spreads = {name: spread(found) for name, found in values.items()}
        means = {name: statistics.mean(found) for name, found in values.items()}
        rows.append(Row(arm, len(runs), means, spreads, gain, p_value))
    return rows


def with_misclassified(config: DownstreamConfig, results: Results) -> dict[tuple[str, int], dict[str, float]]:
    """Add to every arm the areas over those images alone that the same seed's baseline misclassifies.

    The baseline is the equally long plain training, or the first step where that arm was not run.
    """
    arms = {arm for arm, _ in results}
    against = "baseline" if "baseline" in arms else FIRST_STEP
    found: dict[tuple[str, int], dict[str, float]] = {}
    for (arm, seed), metrics in results.items():
        found[arm, seed] = dict(metrics)
        if arm != FIRST_STEP:
            wrong = read_evaluation(stage_folder(config, arm=against, seed=seed).path)["top1"] == 0
            mine = read_evaluation(stage_folder(config, arm=arm, seed=seed).path)
            found[arm, seed] |= summarise(mine, wrong=wrong)
    return found


def markdown(rows: list[Row], *, paper: str | None) -> str:
    """The table in Markdown; published values are marked as such."""
    return markdown_table(*_cells(rows, paper=paper))


def write_table(config: DownstreamConfig, data: FineGrained, results: Results) -> None:
    """Write `summary.json`, `report/index.html` and `report/summary.md` of the table's own folder, and print it."""
    results = with_misclassified(config, results)
    rows = tabulate(results)
    paper = config.branch.paper
    folder = RunFolder(config.runs / config.run)
    folder.path.mkdir(parents=True, exist_ok=True)
    seeds = sorted({seed for _, seed in results})
    runs = {f"{arm}-seed{seed}": stage_folder(config, arm=arm, seed=seed).name for arm, seed in results}
    folder.write_summary(_metrics(rows), step=0, data=data.facts, protocol=_protocol(config, seeds), runs=runs)
    columns, cells = _cells(rows, paper=paper)
    page = Page(f"Saccade: {config.run}")
    page.table(columns, cells, caption=_caption(config, data, seeds))
    add_gallery(page, config, data, seed=seeds[0], arms=[row.arm for row in rows if row.arm != FIRST_STEP])
    page.heading("Where the numbers came from")
    page.code("\n".join(f"{name}: {value}" for name, value in {**data.facts, **_protocol(config, seeds)}.items()))
    page.write(folder.path / "report" / "index.html")
    text = f"# {config.run}\n\n{_caption(config, data, seeds)}\n\n{markdown(rows, paper=paper)}\n"
    atomic_write(folder.path / "report" / "summary.md", text.encode())
    for row in cells:
        report("  ".join(f"{text:>16}" for text in row))
    report(f"report: {folder.path / 'report' / 'index.html'}")


def _metrics(rows: list[Row]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for row in rows:
        metrics |= {f"{row.arm}/{name}": value for name, value in row.means.items()}
        metrics |= {f"{row.arm}/{name}_deviation": value for name, value in row.deviations.items()}
        if row.gain is not None:
            metrics[f"{row.arm}/gain"] = row.gain
    return metrics


def _cells(rows: list[Row], *, paper: str | None) -> tuple[list[str], list[list[str]]]:
    names = [name for name in COLUMNS if any(name in row.means for row in rows)]
    published = PAPER[paper] if paper else {}
    columns = ["", *(COLUMNS[name] for name in names), "gain, points", "p (paired)"]
    columns += ["published top-1 / top-5 %"] if published else []
    cells = []
    for row in rows:
        line = [row.arm, *(_cell(row, name) for name in names)]
        line += ["" if row.gain is None else f"{row.gain:+.2f}", "" if row.p_value is None else f"{row.p_value:.3f}"]
        if published:
            found = published.get(row.arm)
            line.append(Grey("" if found is None else f"{found[0]:g} / {found[1]:g}"))
        cells.append(line)
    return columns, cells


def _cell(row: Row, name: str) -> str:
    if name not in row.means:
        return ""
    digits = 2 if name in ("test/top1", "test/top5") else 4
    deviation = f" ± {row.deviations[name]:.{digits}f}" if row.num_seeds > 1 else ""
    return f"{row.means[name]:.{digits}f}{deviation}"


def _protocol(config: DownstreamConfig, seeds: list[int]) -> dict[str, Any]:
    branch = config.branch
    protocol = {name: getattr(branch, name) for name in ("backbone", "weights", "size", "alpha", "sigma", "gamma")}
    steps = {"insertion_steps": branch.insertion_steps, "batch_size": config.data.batch_size}
    return {
        "task": config.task,
        "seeds": seeds,
        "epochs": config.epochs,
        "retrain_epochs": config.retrain_epochs,
        **protocol,
        **steps,
    }


def _caption(config: DownstreamConfig, data: FineGrained, seeds: list[int]) -> str:
    sizes, branch = data.facts["sizes"], config.branch
    published = (
        "; published: other training images, classes and budget (Iwayoshi et al.; maps: edited by people, Mitsuhara "
        "et al.), for orientation only"
        if branch.paper
        else ""
    )
    return (
        f"Attention branch network on {branch.backbone} at {branch.size} pixels, {sizes['train']} training and "
        f"{sizes['test']} test images of {sizes['classes']} classes ({data.facts['split']}), mean and deviation over "
        f"{len(seeds)} seed(s). {FIRST_STEP}: {config.epochs:g} epochs; every arm goes on from it for "
        f"{config.retrain_epochs:g} more, the baseline as before; last weights. Insertion (higher is better) and "
        f"deletion (lower): area under the true class's probability over the share of pixels, "
        f"{branch.insertion_steps} steps; misclassified: over the test images that the baseline of the same seed gets "
        f"wrong{published}."
    )
