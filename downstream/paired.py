"""Arms against the baseline over the same seeds, and tables in Markdown."""

import statistics
from collections.abc import Mapping, Sequence

from scipy.stats import ttest_rel


def paired_gain(ours: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[float | None, float | None]:
    """Mean gain over the seeds that both have, and the p-value of the paired t-test, two-sided.

    Args:
        ours, baseline: score by seed.

    Returns:
        Gain, None without a common seed; p-value, None where there is nothing to test: fewer than two seeds, or the
        same difference on every one.
    """
    shared = [seed for seed in ours if seed in baseline]
    if not shared:
        return None, None
    mine, theirs = [ours[seed] for seed in shared], [baseline[seed] for seed in shared]
    gain = statistics.mean(mine) - statistics.mean(theirs)
    varied = len({a - b for a, b in zip(mine, theirs, strict=True)}) > 1
    return gain, float(ttest_rel(mine, theirs).pvalue) if varied else None


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns and lines of cells as a table in Markdown, without an end of line."""
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])
