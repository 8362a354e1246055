"""The table of captioning: arms against the baseline over seeds, the published values beside, and its page."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from downstream.captioning.config import CaptionConfig
from downstream.captioning.data import CaptionTask
from downstream.captioning.gallery import add_word_gallery
from downstream.captioning.objective import BASELINE, ICA
from downstream.config import DownstreamConfig
from downstream.paired import markdown_table, paired_gain, spread
from downstream.stage import stage_folder
from engine.files import atomic_write
from engine.page import Grey, Page, curves_svg
from engine.progress import report
from engine.runs import RunFolder

Results = Mapping[tuple[str, int], Mapping[str, float]]
LANGUAGE = {
    "test/bleu1": "BLEU-1",
    "test/bleu2": "BLEU-2",
    "test/bleu3": "BLEU-3",
    "test/bleu4": "BLEU-4",
    "test/cider": "CIDEr",
    "test/meteor": "METEOR",
    "test/rouge_l": "ROUGE-L",
    "test/spice": "SPICE",
}
ATTENTION = {
    "attention/mass": "mass inside the mask",
    "attention/pointing": "pointing game",
    "attention/iou": "IoU at the best threshold",
}
COLUMNS = {**LANGUAGE, **ATTENTION}
# Kim et al. on the whole data sets: Show-Attend-Tell and Show-Attend-Tell with the ICA loss, in the order of `_NAMES`.
_NAMES = ("test/bleu1", "test/bleu4", "test/cider", "test/meteor", "test/rouge_l", "test/spice")
_PUBLISHED = {
    "Flickr8k": ((0.6460, 0.2339, 0.5874, 0.2032, 0.5306, 0.1495), (0.6576, 0.2453, 0.5939, 0.2256, 0.5479, 0.1713)),
    "Flickr30k": ((0.6557, 0.2334, 0.4789, 0.1930, 0.5085, 0.1330), (0.6597, 0.2351, 0.4798, 0.1963, 0.5132, 0.1353)),
    "MSCOCO": ((0.7050, 0.3036, 0.9378, 0.2472, 0.5684, 0.1776), (0.7110, 0.3149, 0.9392, 0.2488, 0.5792, 0.1793)),
}
PAPER: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    name: {arm: dict(zip(_NAMES, row, strict=True)) for arm, row in zip((BASELINE, ICA), rows, strict=True)}
    for name, rows in _PUBLISHED.items()
}
PAPER_MATCHED = 2.3


@dataclass(frozen=True)
class Cell:
    """One metric of one arm over all its seeds.

    Attributes:
        mean, deviation: over seeds; deviation 0 for one.
        gain: mean minus the baseline's over the same seeds; None for the baseline itself or without one.
        p_value: of the paired t-test against the baseline; None with fewer than two seeds.
    """

    mean: float
    deviation: float
    gain: float | None
    p_value: float | None


def tabulate(results: Results) -> dict[str, dict[str, Cell]]:
    """Arm to metric to cell, in the order of the results; a metric that a seed lacks is left out.

    Args:
        results: metrics by (arm, seed).
    """
    arms = list(dict.fromkeys(arm for arm, _ in results))
    rows: dict[str, dict[str, Cell]] = {}
    for arm in arms:
        seeds = [seed for name, seed in results if name == arm]
        present = [key for key in COLUMNS if all(key in results[arm, seed] for seed in seeds)]
        rows[arm] = {key: _cell(results, arm, seeds, key) for key in present}
    return rows


def paper_set(caption: CaptionConfig, facts: Mapping[str, Any]) -> str:
    """The published table's name for the data set; "" where there is none."""
    if caption.layout == "karpathy":
        file = next(iter(facts["sha256"]), "")
        return {"flickr30k": "Flickr30k", "flickr8k": "Flickr8k"}.get(
            file.removeprefix("dataset_").removesuffix(".json"), "MSCOCO" if "coco" in file else ""
        )
    return {"flickr8k": "Flickr8k", "coco": "MSCOCO"}[caption.layout]


def write_caption_table(config: DownstreamConfig, task: CaptionTask, results: Results) -> None:
    """Write `summary.json`, `report/index.html` and `report/summary.md` of the table's own folder, and print it."""
    rows = tabulate(results)
    seeds = sorted({seed for _, seed in results})
    arms = list(rows)
    folder = RunFolder(config.runs / config.run)
    folder.path.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {}
    for arm, cells in rows.items():
        for key, cell in cells.items():
            metrics[f"{arm}/{key}"] = cell.mean
            metrics[f"{arm}/{key}/deviation"] = cell.deviation
            if cell.gain is not None:
                metrics[f"{arm}/{key}/gain"] = cell.gain
    runs = {f"{arm}-seed{seed}": stage_folder(config, arm=arm, seed=seed) for arm, seed in results}
    notes = _notes(runs)
    protocol = {"task": config.task, "seeds": seeds, "epochs": config.epochs, "beam": config.caption.beam, **notes}
    names = {name: run.name for name, run in runs.items()}
    folder.write_summary(metrics, step=0, data=task.facts, protocol=protocol, runs=names)
    columns, lines = table_of(rows, paper=paper_set(config.caption, task.facts))
    page = Page(f"Saccade: {config.run}")
    page.table(columns, lines, caption=_caption(config, task, seeds))
    page.paragraph(_about_objects(task))
    for name, text in notes.items():
        page.note(f"{name}: {text}")
    _add_curves(page, config, results)
    add_word_gallery(page, config, task, arms=arms, seed=seeds[0])
    page.heading("Where the numbers came from")
    page.code("\n".join(f"{name}: {value}" for name, value in {**task.facts, **protocol}.items()))
    page.write(folder.path / "report" / "index.html")
    atomic_write(folder.path / "report" / "summary.md", markdown(config.run, columns, lines).encode())
    for line in lines:
        report("  ".join(f"{text:>16}" for text in line))
    report(f"report: {folder.path / 'report' / 'index.html'}")


def table_of(rows: Mapping[str, Mapping[str, Cell]], *, paper: str) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: every arm, its gain over the baseline, and the published values in grey."""
    keys = [key for key in COLUMNS if any(key in cells for cells in rows.values())]
    lines = []
    for arm, cells in rows.items():
        lines.append([arm, *(_number(cells.get(key)) for key in keys)])
        if any(cell.gain is not None for cell in cells.values()):
            lines.append([f"{arm}, gain (p)", *(_gain(cells.get(key)) for key in keys)])
    for arm, values in PAPER.get(paper, {}).items():
        shown = [f"{values[key]:.4f}" if key in values else "" for key in keys]
        lines.append([Grey(f"paper, whole {paper}: {arm}"), *map(Grey, shown)])
    return ["", *(COLUMNS[key] for key in keys)], lines


def markdown(title: str, columns: list[str], lines: list[list[str]]) -> str:
    """The same table in Markdown, under a heading."""
    return f"# {title}\n\n{markdown_table(columns, lines)}\n"


def _cell(results: Results, arm: str, seeds: list[int], key: str) -> Cell:
    ours = {seed: float(results[arm, seed][key]) for seed in seeds}
    given = {seed: results.get((BASELINE, seed), {}) for seed in seeds}
    theirs = {seed: float(metrics[key]) for seed, metrics in given.items() if key in metrics}
    gain, p_value = (None, None) if arm == BASELINE else paired_gain(ours, theirs)
    values = list(ours.values())
    return Cell(statistics.mean(values), spread(values), gain, p_value)


def _number(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.mean:.4f} ± {cell.deviation:.4f}" if cell.deviation else f"{cell.mean:.4f}"


def _gain(cell: Cell | None) -> str:
    if cell is None or cell.gain is None:
        return ""
    return f"{cell.gain:+.4f}" + (f" ({cell.p_value:.2f})" if cell.p_value is not None else "")


def _notes(runs: Mapping[str, RunFolder]) -> dict[str, str]:
    """Which tokenizer, and which scores are unavailable and why, over all runs."""
    summaries = [run.read_summary() for run in runs.values()]
    notes = {"tokenizer": "; ".join(sorted({str(summary.get("tokenizer")) for summary in summaries}))}
    for summary in summaries:
        notes |= {f"{name} unavailable": reason for name, reason in summary.get("unavailable", {}).items()}
    return notes


def _caption(config: DownstreamConfig, task: CaptionTask, seeds: list[int]) -> str:
    sizes = task.facts["sizes"]
    return (
        f"Mean and deviation over {len(seeds)} seed(s) on {sizes['test']['images']} test images, beam "
        f"{config.caption.beam}; every arm trained {config.epochs:g} epochs on the {sizes['train']['captions']} "
        f"captions of {sizes['train']['images']} images from the same seeds, its epoch chosen by "
        f"{config.caption.choose_by} on {sizes['val']['images']} held-out images. Split: {task.facts['split']}. "
        f"Attention is that of the reference captions' words that name a detected object."
    )


def _about_objects(task: CaptionTask) -> str:
    matched = task.facts["matched_objects_per_caption"]
    if not task.facts["objects"]:
        return "No object masks were given: attention is neither supervised nor measured."
    shares = ", ".join(f"{value:.2f} ({part})" for part, value in matched.items())
    return f"Matched objects per caption: {shares}; the paper: about {PAPER_MATCHED} on the whole data sets."


def _add_curves(page: Page, config: DownstreamConfig, results: Results) -> None:
    first = min(seed for _, seed in results)
    for key in (f"held_out/{config.caption.choose_by}", "held_out/loss", "train/words", "train/attention"):
        curves = {}
        for arm in dict.fromkeys(arm for arm, seed in results if seed == first):
            lines = [line for line in stage_folder(config, arm=arm, seed=first).metrics() if key in line]
            if lines:
                curves[arm] = ([line["step"] for line in lines], [float(line[key]) for line in lines])
        if curves:
            title = f"{key}, seed {first}"
            page.plot(curves_svg(curves, x_label="step", y_label=key), alt=f"{title} by step", caption=title)
