"""The table of a fine-tune: arms against the baseline over seeds, the published values beside, and its page."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from downstream.config import DownstreamConfig
from downstream.gallery import add_gallery
from downstream.paired import markdown_table, paired_gain, spread
from downstream.protocol import Task
from downstream.stage import FIRST_STEP, stage_folder
from engine.files import atomic_write
from engine.page import Page, curves_svg
from engine.progress import report
from engine.runs import RunFolder

# Accuracy in percent, Patro et al. (WACV 2021), tables of TREC-6 and CIFAR-10.
PAPER: Mapping[str, Mapping[str, float]] = {
    "trec6": {"baseline": 81.20, "coral": 81.89, "mse": 82.33, "mmd": 84.80, "adversarial": 84.91},
    "cifar10": {"baseline": 69.59, "coral": 69.83, "mse": 69.87, "mmd": 70.80, "adversarial": 71.12},
}
Results = Mapping[tuple[str, int], Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """One arm over all its seeds.

    Attributes:
        mean, deviation: test accuracy in percent; deviation over seeds, 0 for one.
        gain: mean minus the baseline's over the same seeds, points; None without a baseline.
        p_value: of the paired t-test against the baseline; None with fewer than two seeds.
        paper: the published accuracy, None where there is none.
    """

    arm: str
    num_seeds: int
    mean: float
    deviation: float
    gain: float | None
    p_value: float | None
    paper: float | None


def tabulate(results: Results, *, task: str) -> list[Row]:
    """Rows in the order of the results' arms, the first step left out.

    Args:
        results: metrics with `test/accuracy` by (arm, seed).
    """
    by_arm: dict[str, dict[int, float]] = {}
    for (arm, seed), metrics in results.items():
        if arm != FIRST_STEP:
            by_arm.setdefault(arm, {})[seed] = float(metrics["test/accuracy"])
    baseline = by_arm.get("baseline", {})
    rows = []
    for arm, scores in by_arm.items():
        values = list(scores.values())
        gain, p_value = (None, None) if arm == "baseline" else paired_gain(scores, baseline)
        paper = PAPER.get(task, {}).get(arm)
        rows.append(Row(arm, len(values), statistics.mean(values), spread(values), gain, p_value, paper))
    return rows


def write_table(config: DownstreamConfig, task: Task, results: Results) -> None:
    """Write `summary.json`, `report/index.html` and `report/summary.md` of the table's own folder, and print it."""
    rows = tabulate(results, task=config.task)
    columns = ["", "test accuracy %", "gain, points", "p (paired)", "paper %"]
    cells = [_cells(row) for row in rows]
    folder = RunFolder(config.runs / config.run)
    folder.path.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {}
    for row in rows:
        metrics |= {f"{row.arm}/accuracy": row.mean, f"{row.arm}/deviation": row.deviation}
        if row.gain is not None:
            metrics[f"{row.arm}/gain"] = row.gain
    seeds = sorted({seed for _, seed in results})
    runs = {f"{arm}-seed{seed}": stage_folder(config, arm=arm, seed=seed).name for arm, seed in results}
    folder.write_summary(metrics, step=0, data=task.facts, protocol=_protocol(config, seeds), runs=runs)
    page = Page(f"Saccade: {config.run}")
    page.table(columns, cells, caption=_caption(config, task, seeds))
    _add_curves(page, config, results)
    add_gallery(page, config, task, seed=seeds[0], arms=[row.arm for row in rows])
    page.heading("Where the numbers came from")
    page.code("\n".join(f"{name}: {value}" for name, value in {**task.facts, **_protocol(config, seeds)}.items()))
    page.write(folder.path / "report" / "index.html")
    text = f"# {config.run}\n\n{markdown_table(columns, cells)}\n"
    atomic_write(folder.path / "report" / "summary.md", text.encode())
    for row in rows:
        report("  ".join(f"{text:>14}" for text in _cells(row)))
    report(f"report: {folder.path / 'report' / 'index.html'}")


def _cells(row: Row) -> list[str]:
    return [
        row.arm,
        f"{row.mean:.2f} ± {row.deviation:.2f}" if row.num_seeds > 1 else f"{row.mean:.2f}",
        "" if row.gain is None else f"{row.gain:+.2f}",
        "" if row.p_value is None else f"{row.p_value:.3f}",
        "" if row.paper is None else f"{row.paper:.2f}",
    ]


def _protocol(config: DownstreamConfig, seeds: list[int]) -> dict[str, Any]:
    return {
        "task": config.task,
        "seeds": seeds,
        "epochs": config.epochs,
        "retrain_epochs": config.retrain_epochs,
        "balance": config.supervision.balance,
        "gamma": config.supervision.gamma,
    }


def _caption(config: DownstreamConfig, task: Task, seeds: list[int]) -> str:
    sizes = task.facts.get("sizes", {})
    return (
        f"{config.task}: mean and deviation over {len(seeds)} seed(s) on {sizes.get('test')} test examples; every arm "
        f"trained {config.epochs:g} epochs and then {config.retrain_epochs:g} more from the same weights, its epoch "
        f"chosen on {sizes.get('held_out')} held-out training examples. Last column: published (Patro et al., 2021)."
    )


def _add_curves(page: Page, config: DownstreamConfig, results: Results) -> None:
    first_seed = min(seed for _, seed in results)
    for key, title in (("held_out/accuracy", "held-out accuracy, %"), ("train/classification", "cross entropy")):
        curves = {}
        for arm, seed in results:
            if seed == first_seed and arm != FIRST_STEP:
                lines = list(stage_folder(config, arm=arm, seed=seed).metrics())
                points = [(line["step"], float(line[key])) for line in lines if key in line]
                if points:
                    curves[arm] = ([p[0] for p in points], [p[1] for p in points])
        if curves:
            page.plot(curves_svg(curves, x_label="step", y_label=title), alt=f"{title} by step", caption=title)
