"""A W&B workspace with the panels grouped: `python -m engine.dashboard --entity NAME --save true`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.files import atomic_write
from engine.program import run_program
from engine.progress import report

EVERYTHING = "everything"

# Section to the panels in it: title and metrics, or a pattern of metrics, which must not look ahead: W&B takes RE2's
# syntax. A report draws the same sections.
CURVES: dict[str, dict[str, list[Any] | str]] = {
    "Losses": {
        "loss": ["train/loss"],
        "NT-Xent": ["train/nt_xent"],
        "cross entropy": ["train/cross_entropy"],
        "attention loss": ["train/attention"],
        "attention: KLD": ["train/kld"],
        "attention: NSS": ["train/nss"],
    },
    "Evaluators": {
        "linear probe, top-1 %": ["online/linear_probe/top1"],
        "nearest neighbours, top-1 %": ["online/knn/top1"],
        "alignment with people: NSS": ["online/attention/nss"],
        "alignment with people: CC": ["online/attention/cc"],
        "alignment with people: KLD": ["online/attention/kld"],
        "corrupted images, mean top-1 %": "online/imagenet_c/(partial_)?mean_top1",
        "retrieval": "online/retrieval/.*",
        EVERYTHING: "online/.*",
    },
    "Teacher": {
        "validation: NSS": ["val/nss"],
        "validation: KLD": ["val/kld"],
        "validation: CC": ["val/cc"],
    },
    "Speed": {
        "images per second": ["time/images_per_s"],
        "images per second and device": ["time/images_per_s_device"],
        "share of time waiting for data": ["time/data_wait"],
        "seconds per step": ["time/step_s"],
        "peak memory, GiB": ["memory/peak_gib"],
    },
    "Health": {
        "learning rate": ["lr"],
        "steps skipped": ["train/skipped"],
        "share of views that learn attention": ["train/attention_views"],
        "two views' distance": ["train/alignment"],
        "uniformity": ["train/uniformity"],
        "rank of the embeddings": ["train/embedding_rank"],
        "attention's gradient to NT-Xent's": ["train/gradient_ratio"],
    },
}
# Tables that a report sends; those of evaluators from other packages come under their own names.
TABLES = (
    "overview",
    "alignment",
    "imagenet_c",
    "imagenet_c_corruptions",
    "imagenet_c_ce",
    "by_severity",
    "robust_gaze",
    "robust_gaze_severity",
    "retrieval",
    "precision_recall",
    "finetune",
    "training",
    "protocols",
    "differences",
    "origins",
)


@dataclass
class Config:
    """Describe a W&B workspace for runs of Saccade."""

    entity: str = ""
    """W&B user or team that the project belongs to; needed to save."""
    project: str = "saccade"
    """W&B project."""
    name: str = "Saccade"
    """What the workspace is called there."""
    output: Path = Path("runs/dashboard.json")
    """File that gets the definition."""
    save: bool = False
    """Save the workspace to W&B, which needs a login; otherwise only the file is written."""


def build_workspace(config: Config) -> Any:
    """The `wandb_workspaces` workspace, made without a network.

    Raises:
        InputError: the package wandb-workspaces is missing.
    """
    try:
        # imported here: an extra, and it takes seconds
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2 as panels
    except ImportError as error:
        raise InputError(f"the package wandb-workspaces is missing ({error}): pip install -e '.[dashboard]'") from error
    sections = []
    for name, plots in CURVES.items():
        lines: list[Any] = [
            panels.LinePlot(title=title, x="step", metric_regex=metrics)
            if isinstance(metrics, str)
            else panels.LinePlot(title=title, x="step", y=metrics)
            for title, metrics in plots.items()
        ]
        sections.append(workspaces.Section(name=name, panels=lines, is_open=name != "Teacher"))
    tables: list[Any] = [panels.WeavePanelSummaryTable(table_name=f"report/{table}") for table in TABLES]
    sections.insert(1, workspaces.Section(name="Report", panels=tables, is_open=True))
    media = panels.MediaBrowser(title="people and teacher", media_keys=["val/maps"], num_columns=2)
    sections.append(workspaces.Section(name="Pictures", panels=[media], is_open=True))
    return workspaces.Workspace(entity=config.entity, project=config.project, name=config.name, sections=sections)


def workspace_json(workspace: Any) -> str:
    """What the package would send to W&B."""
    text: str = workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2)
    return text


def main(config: Config) -> None:
    """Write the definition, and save it to W&B where that is asked for."""
    if config.save and not config.entity:
        raise InputError("save needs --entity: the W&B user or team that the project belongs to")
    workspace = build_workspace(config)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(config.output, (workspace_json(workspace) + "\n").encode())
    report(f"workspace: {config.output}")
    if config.save:
        report(f"saved: {workspace.save().url}")


if __name__ == "__main__":
    run_program(main, Config, description="Write the definition of a W&B workspace with the panels grouped.")
