"""The two-step pipeline at its door: files, resume, ranks, refusals; on a small TREC in the true layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.config import DataConfig, DownstreamConfig, SupervisionConfig, TextConfig
from downstream.data import place
from downstream.miner import Surrogates
from downstream.pipeline import check_pipeline, run_pipeline, supervised
from downstream.protocol import Attended, AttentionModel, Inputs
from downstream.stage import accuracy, best_weights, stage_folder
from downstream.surrogates import SurrogateStore
from downstream.table import tabulate
from downstream.tasks.trec import Trec
from engine.errors import InputError, Requeue
from engine.ranks import Ranks
from engine.settings import LoopConfig, OptimConfig
from tests.forked import launch
from tests.tools import REPOSITORY, accelerate, run_python

SUBJECTS = {"HUM": "who", "LOC": "where", "NUM": "how many", "DESC": "why", "ENTY": "which", "ABBR": "short for"}
FILLERS = ("is the man", "are those", "was it then", "did they say", "can one go")


def write_trec(folder: Path, *, train: int = 60, test: int = 24, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("TREC.train", train), ("TREC.test", test)):
        lines = []
        for i in range(count):
            label = sorted(SUBJECTS)[i % 6]
            fillers = " ".join(rng.choice(FILLERS, size=rng.integers(0, 3)))
            lines.append(f"{label}:x {SUBJECTS[label].title()} {fillers} ?".replace("  ", " "))
        (folder / name).write_text("\n".join(lines) + "\n", "latin-1")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> DownstreamConfig:
    return DownstreamConfig(
        run="t",
        runs=tmp_path / "runs",
        arm="baseline,mse",
        epochs=6,
        retrain_epochs=3,
        data=DataConfig(path=write_trec(tmp_path / "trec"), batch_size=6),
        text=TextConfig(kind="transformer", width=16, heads=2, dropout=0.1),
        optim=OptimConfig(name="adamw", lr=0.01, lr_scaling="none", warmup_epochs=0),
        loop=LoopConfig(num_workers=0, tracker="none", checkpoint_every=7, log_every=3),
    )


def test_it_learns_mines_and_writes_its_table(config: DownstreamConfig) -> None:
    results = run_pipeline(replace(config, seeds=2, arm="baseline,mse,adversarial"))
    assert set(results) == {(a, s) for a in ("step1", "baseline", "mse", "adversarial") for s in (0, 1)}
    assert results["baseline", 0]["test/accuracy"] > 60, "the first word gives the class away"
    folder = config.runs / "t"
    summary = json.loads((folder / "summary.json").read_text())
    accuracy = [results["mse", s]["test/accuracy"] for s in (0, 1)]
    assert summary["metrics"]["mse/accuracy"] == pytest.approx(np.mean(accuracy))
    page = (folder / "report" / "index.html").read_text()
    assert "Words, shaded by attention" in page and "number of masks" in page
    train = Trec(config.data.path, config.text).train
    found = SurrogateStore(stage_folder(config, arm="step1", seed=0).path / "surrogates" / "text").load(train.keys)
    assert (found.scores >= found.unmasked).all() and torch.allclose(
        found.maps.sum(1), torch.ones(len(train)), atol=1e-3
    )
    assert results["mse", 0]["weight/text"] > 0, "the balance found a weight"


def test_stopped_anywhere_it_ends_in_the_same_bits(config: DownstreamConfig) -> None:
    whole, parts = (replace(config, run=name, arm="adversarial") for name in ("whole", "parts"))
    run_pipeline(whole)
    for step in (4, 11, 13):  # in the first step, at its end, in the second step's balanced part
        with pytest.raises(Requeue):
            run_pipeline(replace(parts, loop=replace(parts.loop, stop_after=step)))
    run_pipeline(parts)
    for arm in ("step1", "adversarial"):
        ours, theirs = (best_weights(stage_folder(c, arm=arm, seed=0)) for c in (whole, parts))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_step_is_taken_as_it_is_and_mining_goes_on(config: DownstreamConfig) -> None:
    run_pipeline(replace(config, arm="mse"))
    first = stage_folder(config, arm="step1", seed=0).path
    written = (first / "summary.json").read_bytes()
    shutil.rmtree(stage_folder(config, arm="mse", seed=0).path)
    (first / "surrogates" / "text" / "manifest.json").unlink()
    results = run_pipeline(replace(config, arm="mse"))
    assert ("mse", 0) in results and (first / "summary.json").read_bytes() == written


def test_finished_steps_of_other_options_are_not_taken_for_these(config: DownstreamConfig) -> None:
    config = replace(config, epochs=1, retrain_epochs=1, arm="baseline,mse")
    run_pipeline(config)
    lighter = replace(config, supervision=SupervisionConfig(gamma=0.1))
    with pytest.raises(InputError, match=r"supervision\.gamma is 1\.0 there and 0\.1 here"):
        run_pipeline(lighter)
    with pytest.raises(InputError, match=r"epochs is 1 there and 2 here"):
        run_pipeline(replace(config, epochs=2))
    run_pipeline(replace(lighter, arm="baseline"))  # on which no loss on attention bears


def test_check_reads_the_data_and_trains_nothing(config: DownstreamConfig) -> None:
    text = "\n".join(check_pipeline(config))
    assert "launcher: 1 rank(s)" in text and "attention over text" in text and not config.runs.exists()
    with pytest.raises(InputError, match="nowhere"):
        check_pipeline(replace(config, data=replace(config.data, path=config.data.path / "nowhere")))


def test_two_ranks_agree_with_one(config: DownstreamConfig, tmp_path: Path) -> None:
    """Mined surrogates and accuracies do not depend on the number of ranks that share the work."""
    options = ["--config", "configs/downstream/trec6.yaml", "--data.path", config.data.path, "--data.batch_size", 6]
    options += ["--text.kind", "transformer", "--text.width", 16, "--text.heads", 2, "--text.dropout", 0]
    options += ["--epochs", 2, "--retrain_epochs", 1, "--arm", "mse", "--loop.tracker", "none", "--runs", config.runs]
    one = run_python("downstream/main.py", *options, "--run", "one")
    two = accelerate("cpu2_ddp", "downstream/main.py", *options, "--run", "two")
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    keys = Trec(config.data.path, config.text).train.keys
    stores = [SurrogateStore(config.runs / f"{name}-step1-seed0" / "surrogates" / "text") for name in ("one", "two")]
    first, second = (store.load(keys) for store in stores)
    assert torch.allclose(first.scores, second.scores, atol=1e-4)
    weights = [best_weights(stage_folder(replace(config, run=name), arm="mse", seed=0)) for name in ("one", "two")]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[0])


def test_zero_3_is_refused_in_one_line(config: DownstreamConfig, tmp_path: Path) -> None:
    options = ["--config", "configs/downstream/trec6.yaml", "--data.path", config.data.path, "--check"]
    done = launch(REPOSITORY / "downstream" / "main.py", *options, zero=3, logs=tmp_path / "logs")
    assert done.wait() == [2]
    assert "error: task trec6 needs whole weights on every rank, and ZeRO 3 cuts them up: set zero" in done.output()


def test_the_table_pairs_seeds(config: DownstreamConfig) -> None:
    scores = {"baseline": [80.0, 82.0, 81.0], "mmd": [81.0, 83.5, 82.0], "mse": [80.0, 82.0]}
    results = {(arm, s): {"test/accuracy": v} for arm, values in scores.items() for s, v in enumerate(values)}
    rows = {row.arm: row for row in tabulate(results, task="trec6")}
    assert rows["baseline"].gain is None and rows["baseline"].paper == 81.20
    assert rows["mmd"].gain == pytest.approx(7 / 6) and rows["mmd"].deviation == pytest.approx(
        np.std(scores["mmd"], ddof=1)
    )
    assert rows["mmd"].p_value is not None and rows["mmd"].p_value < 0.05
    assert rows["mse"].gain == 0 and rows["mse"].p_value is None and rows["mse"].num_seeds == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("WHAT:x Who is it ?", "line 1: no 'COARSE:fine question'"),
        ("HUM:x", "line 1: an empty question"),
        ("no label here", "line 1: no 'COARSE:fine question'"),
    ],
)
def test_bad_lines_are_named(config: DownstreamConfig, text: str, complaint: str) -> None:
    (config.data.path / "TREC.train").write_text(text + "\n", "latin-1")
    with pytest.raises(InputError, match=complaint):
        Trec(config.data.path, config.text)


def test_refusals(config: DownstreamConfig) -> None:
    with pytest.raises(InputError, match=r"'mze'.* not known; take from all, baseline"):
        run_pipeline(replace(config, arm="mze"))
    with pytest.raises(InputError, match="attention over text"):
        run_pipeline(replace(config, supervision=SupervisionConfig(modalities=["image"])))
    with pytest.raises(InputError, match=r"TREC.train is missing"):
        run_pipeline(replace(config, data=replace(config.data, path=config.runs)))


def test_unknown_words_and_one_word_texts_go_through(config: DownstreamConfig) -> None:
    (config.data.path / "TREC.test").write_text("HUM:x Zyzzyva qwerty\nLOC:x where\n", "latin-1")
    task = Trec(config.data.path, config.text)
    inputs = task.test.inputs(np.arange(2))
    assert inputs["tokens"][0, :2].tolist() == [1, 1]
    output = task.build_model().eval()(inputs)
    assert torch.isfinite(output.logits).all() and output.maps["text"][1, 0].item() == pytest.approx(1)


def test_a_table_takes_the_first_step_of_another_and_weighs_as_it_was_told(config: DownstreamConfig) -> None:
    one = run_pipeline(replace(config, arm="mse"))
    lighter = replace(config, run="lighter", first="t", arm="mse", supervision=SupervisionConfig(gamma=0.1))
    found = run_pipeline(lighter)
    assert not (config.runs / "lighter-step1-seed0").exists() and found["step1", 0] == one["step1", 0]
    weight = one["mse", 0]["weight/text"]
    assert found["mse", 0]["weight/text"] == pytest.approx(0.1 * weight, rel=1e-5)
    capped = replace(config, run="capped", first="t", arm="mse", supervision=SupervisionConfig(max_weight=weight / 2))
    assert run_pipeline(capped)["mse", 0]["weight/text"] == pytest.approx(weight / 2)


def test_no_weight_balances_a_loss_of_nothing(config: DownstreamConfig) -> None:
    nobody = replace(config, arm="mse", supervision=SupervisionConfig(margin=1.0))
    with pytest.raises(InputError, match=r"loss of 'text' was 0 .* no example is supervised .*balance fixed"):
        run_pipeline(nobody)
    run_pipeline(replace(nobody, run="fixed", first="t", supervision=replace(nobody.supervision, balance="fixed")))


def test_a_second_step_may_begin_anew(config: DownstreamConfig) -> None:
    """At a learning rate of almost nothing the weights stay where they began."""
    run_pipeline(replace(config, arm="baseline", retrain_epochs=1))
    still = replace(config, first="t", arm="baseline", retrain_epochs=1, optim=replace(config.optim, lr=1e-9))
    run_pipeline(replace(still, run="on"))
    run_pipeline(replace(still, run="anew", restart=True))
    first, on, anew = (
        best_weights(stage_folder(replace(config, run=run), arm=arm, seed=0))["embed.weight"]
        for run, arm in (("t", "step1"), ("on", "baseline"), ("anew", "baseline"))
    )
    assert torch.allclose(on, first, atol=1e-5) and not torch.allclose(anew, first, atol=1e-2)


def test_which_examples_are_supervised() -> None:
    maps = torch.full((4, 2), 0.5)
    scores, unmasked = torch.tensor([0.5, 0.6, 0.9, 0.9]), torch.tensor([0.5, 0.5, 0.5, 0.9])
    found = Surrogates(maps, torch.tensor([0, 3, 1, 2]), scores, unmasked, maps)
    choices = [SupervisionConfig(), SupervisionConfig(margin=0.2), SupervisionConfig(only_better=False)]
    assert [supervised(found, choice).tolist() for choice in choices] == [
        [False, True, True, True],
        [False, False, True, False],
        [True] * 4,
    ]


class Parrot(AttentionModel):
    """Answers what the input says."""

    def encode(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        return {"text": inputs["says"]}

    def attend(self, features: dict[str, torch.Tensor], inputs: Inputs) -> Attended:
        return Attended(torch.nn.functional.one_hot(features["text"], 3).float(), {})


class Said:
    """Examples of two kinds, of which some are answered rightly."""

    keys = tuple("abcdef")
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    says = torch.tensor([0, 1, 0, 0, 0, 0])

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds

    def __len__(self) -> int:
        return 6

    def inputs(self, rows: np.ndarray) -> Inputs:
        return {"says": self.says[torch.from_numpy(rows)]}


def test_accuracy_is_also_given_by_kind_where_there_are_several() -> None:
    kinds = ("yes/no", "number", "number", "yes/no", "yes/no", "number")
    found = accuracy(Parrot(), Said(kinds), ranks=Ranks(), device="cpu")
    assert found == pytest.approx({"accuracy": 50, "accuracy_yes_no": 200 / 3, "accuracy_number": 100 / 3})
    assert accuracy(Parrot(), Said(("other",) * 6), ranks=Ranks(), device="cpu") == {"accuracy": 50}


def test_examples_go_to_a_gpu_unless_other_processes_read_them(config: DownstreamConfig) -> None:
    task = Trec(config.data.path, config.text)
    place(task, torch.device("cpu"), loop=config.loop)
    place(task, torch.device("cuda"), loop=replace(config.loop, num_workers=1))
    assert task.test.device == torch.device("cpu")  # type: ignore[attr-defined]
    on_meta = task.test.to(torch.device("meta"))  # type: ignore[attr-defined]
    assert on_meta.tokens.is_meta and on_meta.targets.is_meta and on_meta.keys == task.test.keys
