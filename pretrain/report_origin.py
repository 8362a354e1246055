"""Where the numbers of a report came from: protocols, differences of configs, data, teacher, commit, machine."""

from collections.abc import Sequence
from typing import Any

import yaml

from engine.page import Page
from engine.runs import RunFolder, flatten
from pretrain.report_runs import config_of
from pretrain.report_tables import Numbers, TableOf, add_table

# Of a protocol, what differs between runs that were nevertheless measured alike: names, and beginnings of names.
FREE = ("encoder", "commit", "learning_rate", "map", "complete", "missing", "conditions", "clean_top1")
OF_ONE = ("grad_cam", "readout_")
SETS = ("train", "val", "gaze", "gallery", "queries")


def origin_tables(runs: Sequence[RunFolder]) -> list[TableOf]:
    """Protocols, what the configs differ in, each run's data and machine; without rows where there is nothing."""
    names = [run.name for run in runs]
    tables = [
        TableOf(
            "protocols",
            "What the numbers were measured on",
            "Samples and first digits of the digest of each set, options, hash of the encoder, commit.",
            ["run", "evaluator", "sets", "options", "encoder", "commit"],
            protocol_rows(runs),
        )
    ]
    if len(runs) > 1:
        title = "What the configs differ in"
        caption = "Options that are not the same in all runs, by their dotted names."
        tables.append(TableOf("differences", title, caption, ["option", *names], difference_rows(runs)))
    origins = [_origin(run) for run in runs]
    facts = list(dict.fromkeys(name for origin in origins for name in origin))
    body: list[list[Any]] = [[name, *(origin.get(name, "") for origin in origins)] for name in facts]
    caption = "Data, teacher, software and machine of each training."
    return [*tables, TableOf("origins", "Where the runs came from", caption, ["", *names], body)]


def add_origin(page: Page, runs: Sequence[RunFolder], sentences: Sequence[str], numbers: Numbers) -> None:
    """Add the tables of `origin_tables`, the `sentences` of `unlike` under the first."""
    for number, table in enumerate(origin_tables(runs)):
        add_table(page, table, numbers, before=sentences if number == 0 else ())


def add_details(page: Page, runs: Sequence[RunFolder], *, most_bytes: int) -> None:
    """Add what lies in the run folders, folded, of the first runs that fit into `most_bytes`."""
    for number, run in enumerate(runs):
        summary = run.read_summary()
        whole = {key: summary.get(key) for key in ("data", "protocols", "environment")}
        details = Page("")
        details.folded(f"All of {run.name}", yaml.safe_dump(whole | {"config": config_of(run)}, sort_keys=False))
        most_bytes -= len("".join(details.parts).encode())
        if most_bytes < 0:
            page.paragraph(
                f"All of the last {len(runs) - number} of {len(runs)} runs would make the page too large: see "
                "config.yaml and summary.json in their folders."
            )
            return
        page.parts += details.parts


def protocol_rows(runs: Sequence[RunFolder]) -> list[list[Any]]:
    """One row for each run and evaluator: sets with their sizes and digests, options, hash of the encoder, commit."""
    rows = []
    for run in runs:
        for evaluator, protocol in _protocols(run).items():
            sets = [
                f"{name}: {value.get('samples')}" + (f" ({str(value['digest'])[:8]})" if "digest" in value else "")
                for name, value in protocol.items()
                if name in SETS and isinstance(value, dict)
            ]
            options = [
                f"{name} {_short(value)}"
                for name, value in protocol.items()
                if name not in (*SETS, "encoder", "commit", "missing")
            ]
            encoder, commit = str(protocol.get("encoder", ""))[:12], str(protocol.get("commit", ""))
            rows.append([run.name, evaluator, ", ".join(sets), ", ".join(options), encoder, commit])
    return rows


def unlike(runs: Sequence[RunFolder]) -> list[str]:
    """One sentence for each evaluator whose numbers were not measured alike in all runs."""
    sentences = []
    for evaluator in dict.fromkeys(name for run in runs for name in _protocols(run)):
        found = [protocols[evaluator] for run in runs if evaluator in (protocols := _protocols(run))]
        names = dict.fromkeys(
            name for protocol in found for name in protocol if name not in FREE and not name.startswith(OF_ONE)
        )
        different = [name for name in names if any(p.get(name) != found[0].get(name) for p in found)]
        if different:
            sentences.append(f"{evaluator} was not measured alike in all runs: {', '.join(different)} differ.")
    return sentences


def difference_rows(runs: Sequence[RunFolder]) -> list[list[Any]]:
    """Dotted options that are not the same in all runs' configs, and their values."""
    configs = [flatten(config_of(run)) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config if name not in ("run", "runs"))
    return [
        [name, *(_short(config[name]) if name in config else "" for config in configs)]
        for name in names
        if any(config.get(name) != configs[0].get(name) for config in configs)
    ]


def _origin(run: RunFolder) -> dict[str, str]:
    summary = run.read_summary()
    data, environment = summary.get("data") or {}, summary.get("environment") or {}
    teacher = data.get("teacher") if isinstance(data, dict) else None
    facts = {
        "steps": summary.get("step", "not finished"),
        "training images": data.get("num_samples"),
        "training data": str(data.get("shards", ""))[:12],
        "teacher": str(teacher.get("hash", ""))[:12] if isinstance(teacher, dict) else "",
        "commit": environment.get("commit"),
        "device": environment.get("device"),
        "devices": environment.get("num_devices"),
        **{name: environment.get(name) for name in ("torch", "timm")},
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _protocols(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = run.read_summary().get("protocols", {})
    return found


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
