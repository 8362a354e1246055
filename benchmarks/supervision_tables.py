"""What the runs of `benchmarks/attention_supervision.py` show, as figures, tables and sentences."""

import statistics
from collections.abc import Iterable, Sequence

import torch
from supervision_parts import ARMS, EXAMPLES, SETTINGS, Recipe, surrogate_store

from downstream.table import Row, tabulate

SIGNIFICANT = 0.05
MARGIN = 0.05


def figures_of(recipes: Sequence[Recipe]) -> dict[str, float]:
    """`<task>_baseline` in percent and `<task>_gain` in points: the best arm's mean minus the baseline's."""
    figures: dict[str, float] = {}
    for recipe in recipes:
        rows = tabulate(recipe.results(), task=recipe.task)
        baseline = [row.mean for row in rows if row.arm == "baseline"]
        gains = [row.gain for row in rows if row.gain is not None]
        if baseline:
            figures[f"{recipe.task}_baseline"] = baseline[0]
        if gains:
            figures[f"{recipe.task}_gain"] = max(gains)
    return figures


def table_page(recipe: Recipe) -> str:
    """One task's table and what it says, in Markdown."""
    results = recipe.results()
    rows = tabulate(results, task=recipe.task)
    kinds = sorted({key for metrics in results.values() for key in metrics if key.startswith("test/accuracy_")})
    names = [kind.removeprefix("test/accuracy_") + " %" for kind in kinds]
    settings = ["setting"] if recipe.study else []
    head = ["arm", "seeds", "test accuracy %", *names, "gain", "p", "paper %", *settings]
    lines = [f"## {recipe.task}", "", _row(head), _row(["---"] * len(head))]
    for row in rows:
        own = [metrics for (arm, _), metrics in results.items() if arm == row.arm]
        cells = [row.arm, str(row.num_seeds), f"{row.mean:.2f} ± {row.deviation:.2f}"]
        cells += [f"{statistics.mean(metrics[kind] for metrics in own):.2f}" for kind in kinds]
        cells += [_signed(row.gain), "" if row.p_value is None else f"{row.p_value:.3f}"]
        cells += ["" if row.paper is None else f"{row.paper:.2f}"]
        if recipe.study:
            chosen = recipe.chosen(row.arm).supervision
            kinds_of = {values: name for name, values in EXAMPLES.items()}
            choice = f"gamma {chosen.gamma:g}, {kinds_of[chosen.only_better, chosen.margin]}"
            cells.append("" if row.arm == "baseline" else choice)
        lines.append(_row(cells))
    config = recipe.config
    lines += ["", f"{config.epochs:g} epochs, then {config.retrain_epochs:g} more. {verdict(rows)}"]
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """Whether the gain is there, in one sentence."""
    arms = [row for row in rows if row.gain is not None]
    if not arms:
        return "No arm was finished."
    best = max(arms, key=lambda row: row.gain or 0.0)
    said = f"The best arm, {best.arm}, is {_signed(best.gain)} points from the baseline over {best.num_seeds} seeds"
    if best.gain is None or best.gain <= 0:
        return f"{said}: the gain is not there."
    if best.p_value is None:
        return f"{said}: too few seeds to tell."
    if best.p_value * len(arms) < SIGNIFICANT:
        return f"{said} (p = {best.p_value:.3f}, below {SIGNIFICANT} also after correction for {len(arms)} arms)."
    if best.p_value < SIGNIFICANT:
        return (
            f"{said} (p = {best.p_value:.3f}, which does not hold after correction for {len(arms)} arms): "
            f"a hint of a gain, no more."
        )
    return f"{said} (p = {best.p_value:.3f}): not to be told from the noise between seeds."


def study_page(recipes: Iterable[Recipe]) -> str:
    """What was tried on held-out data, and what the surrogates are like, in Markdown."""
    parts = [
        "## Study: weight and choice of examples\n\nHeld-out accuracy, percent, mean over the study's seeds. gamma is "
        "the ratio of the weighted attention loss to the classification loss after the first epoch; `better` takes "
        "only examples whose best mask is not the whole input, `clear` those where it wins 0.05 or more in true-class "
        "score, `all` all of them; a setting that leaves fewer than 1 % of the examples is not tried. The table takes "
        "each arm's best."
    ]
    for recipe in recipes:
        if not recipe.study:
            continue
        baseline = statistics.mean(recipe.results()["baseline", seed]["held_out/accuracy"] for seed in recipe.study)
        head = ["arm", *(setting.name for setting in SETTINGS)]
        lines = [f"### {recipe.task} (baseline {baseline:.2f}, {len(recipe.study)} seeds)", ""]
        lines += [_row(head), _row(["---"] * len(head))]
        for arm in ARMS:
            scores = recipe.study_scores(arm)
            cells = [f"{scores[setting]:.2f}" if setting in scores else "" for setting in SETTINGS]
            lines.append(_row([arm, *cells]))
        parts.append("\n".join([*lines, "", *_surrogate_lines(recipe)]))
    return "\n\n".join(parts)


def _surrogate_lines(recipe: Recipe) -> list[str]:
    """How much better masks see, how far surrogates are from the models' own maps, and how much of them is noise."""
    lines = []
    first = surrogate_store(recipe, recipe.study[0], "").path
    for modality in sorted(path.name for path in first.iterdir()):
        stores = [surrogate_store(recipe, seed, modality) for seed in recipe.study]
        found = [store.load(store.keys) for store in stores]
        wins = statistics.mean(float((s.best > 0).float().mean()) for s in found)
        clear = statistics.mean(float((s.scores - s.unmasked >= MARGIN).float().mean()) for s in found)
        before = statistics.mean(float(s.unmasked.mean()) for s in found)
        after = statistics.mean(float(s.scores.mean()) for s in found)
        away = statistics.mean(float((1 - _overlap(s.maps, s.own)).mean()) for s in found)
        line = (
            f"- {modality} surrogates: a mask beats the whole input on {100 * wins:.1f} % of the training examples, by "
            f"{MARGIN:g} or more on {100 * clear:.1f} %; mean true-class score {before:.3f} without masks, "
            f"{after:.3f} with the best; surrogate and own map differ in {100 * away:.1f} % of their mass"
        )
        if len(found) > 1:
            agree, own = _overlap(found[0].maps, found[1].maps), _overlap(found[0].own, found[1].own)
            line += (
                f"; surrogates of two seeds share {100 * float(agree.mean()):.1f} % of their mass, the models' own "
                f"maps {100 * float(own.mean()):.1f} %"
            )
        lines.append(f"{line}.")
    return lines


def _overlap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mass that densities `(batch, *positions)` share, `(batch,)` in [0, 1]."""
    return torch.minimum(one, other).flatten(1).sum(1)


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
