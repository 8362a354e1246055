"""The W&B workspace: built and serialised without a network, and read back by the package itself."""

import json
import re
import sys
from pathlib import Path

import pytest

from engine.dashboard import CURVES, TABLES, Config, build_workspace, main
from engine.errors import InputError


def test_the_definition_is_what_wandb_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    internal = pytest.importorskip("wandb_workspaces.workspaces.internal")
    from wandb_workspaces.workspaces import Workspace

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = Config(entity="team", project="gaze", name="Runs", output=tmp_path / "new" / "workspace.json")
    main(config)
    text = config.output.read_text()
    read = Workspace._from_model(internal.View.model_validate(json.loads(text)))
    assert (read.entity, read.project, read.name) == ("team", "gaze", "Runs")
    panels = {section.name: section.panels for section in read.sections}
    assert list(panels) == ["Losses", "Report", *list(CURVES)[1:], "Pictures"]
    losses = json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"][0]["panels"]
    (drawn,) = (panel["config"] for panel in losses if panel["config"]["chartTitle"] == "NT-Xent")
    assert drawn["metrics"] == ["train/nt_xent"] and drawn["xAxis"] == "step"
    evaluators = panels["Evaluators"]
    patterns = [panel.metric_regex for panel in evaluators if panel.metric_regex]
    assert "online/retrieval/.*" in patterns
    assert not any("(?" in pattern for pattern in patterns), "RE2, which W&B uses, cannot look ahead"
    for metric in ("online/attention/cc", "online/attention/sim", "online/elsewhere/score"):
        assert any([metric] == panel.y or re.fullmatch(panel.metric_regex or "", metric) for panel in evaluators), (
            metric
        )
    assert len(panels["Report"]) == len(TABLES) and all(f'"report/{name}"' in text for name in TABLES)


def test_saving_needs_somebody_to_save_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save needs --entity"):
        main(Config(save=True, output=tmp_path / "w.json"))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[dashboard\]'"):
        build_workspace(Config())
