"""The report: the same numbers in page, text and JSON; seeds, partial results, published values; a real browser."""

import html
import json
import os
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import cv2
import pytest

from engine.dashboard import TABLES
from engine.errors import InputError
from engine.page import STYLE, Page
from engine.runs import RunFolder
from pretrain.comparison import compare
from pretrain.evaluators.corruptions import COMMON
from pretrain.report_config import ReportConfig
from pretrain.report_curves import Room, add_training_curves
from pretrain.report_gallery import add_gallery, choose_cases
from pretrain.report_runs import open_groups
from tests.conftest import TinySample
from tests.pretrain.browser import Browser, check_blending, check_contrast, check_keys
from tests.pretrain.report_runs import Tables, write_student, write_teacher
from tests.tools import REPOSITORY

STUDENTS = ["base-seed0", "base-seed1", "taught-seed0", "taught-seed1", "part"]


@pytest.fixture(scope="module")
def runs(tiny_sample: TinySample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms under two seeds each, an arm that is half evaluated, a teacher, and the report on them, also for W&B."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    for seed in (0, 1):
        write_student(folder, f"base-seed{seed}", seed=seed, top1=60.0 + seed, gaze=tiny_sample.gaze)
        arm = "contrastive+attention"
        write_student(
            folder, f"taught-seed{seed}", arm=arm, seed=seed, top1=62.0 + 2 * seed, gaze=tiny_sample.gaze, watched=True
        )
    write_student(folder, "part", arm="co-train", top1=50.0, corruptions=COMMON[:2], gaze=tiny_sample.gaze)
    write_teacher(folder, "teacher", tiny_sample.gaze)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        compare(ReportConfig("all", folder, STUDENTS, "teacher", tiny_sample.gaze, 8, tracker="wandb"))
    return folder


def read_report(runs: Path) -> tuple[str, str, dict[str, Any]]:
    report = runs / "all" / "report"
    page, text = (report / "index.html").read_text(), (report / "summary.md").read_text()
    return page, text, json.loads((runs / "all" / "summary.json").read_text())


def test_page_text_and_json_say_the_same(runs: Path) -> None:
    page, text, summary = read_report(runs)
    found = Tables(page)
    shown = [[[cell for cell, _ in row] for row in table] for table in found.tables]
    for table in summary["tables"]:
        assert [table["columns"], *table["rows"]] in shown, table["name"]
        for row in table["rows"]:
            assert "| " + " | ".join(row) + " |" in text
    metrics = summary["metrics"]
    assert metrics["contrastive/linear_probe/top1"] == 60.5
    assert metrics["contrastive/linear_probe/top1/deviation"] == pytest.approx(statistics.stdev([60, 61]))
    overview = found.rows(heading="linear top-1 %")
    assert overview["contrastive"]["linear top-1 %"][0] == "60.50 ± 0.71"
    assert overview["contrastive"]["runs"][0] == "2" and overview["co-train"]["runs"][0] == "1"
    assert overview["contrastive+attention"]["kNN top-1 %"][0] == "58.00 ± 1.41"
    assert overview["contrastive"]["mCE"][0] == f"{metrics['contrastive/imagenet_c/mce']:.1f} ± 0.0"
    assert "One run a row" not in text and "Mean ± deviation" in text
    assert overview["random init"]["linear top-1 %"][0] == "20.00"
    assert overview["teacher"]["NSS"][0] == "2.000" and overview["centre bias"]["NSS"][0] == "0.800"
    aligned = found.rows(heading="NSS")
    assert aligned["contrastive+attention"]["NSS"][0] == f"{metrics['contrastive+attention/attention/nss']:.3f} ± 0.028"
    assert (
        found.rows(heading="EMD")["co-train"]["EMD"][0] == "0.125"
        and "KLD and EMD: lower is better; the rest: higher." in text
    )
    assert found.rows(heading="mAP")["co-train"]["P@1"][0] == f"{50 / 90:.3f}"


def test_published_values_stand_beside_in_grey_and_are_nowhere_among_ours(runs: Path) -> None:
    page, _, summary = read_report(runs)
    overview = Tables(page).rows(heading="published top-1 %")
    column = {label: row["published top-1 %"] for label, row in overview.items()}
    assert column["contrastive"] == ("67.61 ± 0.04", "grey")
    assert column["contrastive+attention"] == ("68.23 ± 0.08", "grey")
    assert column["co-train"] == ("66.35 ± 0.12", "grey") and column["teacher"][0] == ""
    reference = Tables(page).rows(heading="relative mCE")["published: supervised ResNet-50, ImageNet"]
    assert reference["mCE"] == ("76.7", "grey")
    assert not {67.61, 68.23, 66.35, 76.7} & set(summary["metrics"].values())


@pytest.mark.parametrize(
    ("config", "value"),
    [
        ({"arm": "supervised"}, "75.91 ± 0.10"),
        ({"arm": "supervised", "model": {"backbone": "resnet18"}}, "69.17 ± 0.07, ResNet-18"),
        ({"arm": "supervised+attention"}, "76.02 ± 0.04"),
        ({"arm": "contrastive+attention", "data": {"control": "shuffled"}}, None),
        ({"arm": "contrastive+attention", "attention": {"kld": 1.0, "nss": 0.0}}, None),
        ({"arm": "contrastive", "model": {"backbone": "resnet18"}}, None),
        ({"arm": "supervised", "model": {"backbone": "vit_small_patch16_224"}}, None),
        ({"arm": "supervised", "data": {"image_size": 64}}, None),
        ({"arm": "supervised", "imagenet": False}, None),
    ],
)
def test_only_the_papers_own_arms_have_a_published_value(tmp_path: Path, config: Any, value: str | None) -> None:
    from pretrain.report_tables import published

    (group,) = open_groups([RunFolder(write_student(tmp_path, "one", **config))])
    assert published(group) == value


def test_on_other_images_nothing_published_and_no_mce_is_shown(tmp_path: Path) -> None:
    write_student(tmp_path, "one", imagenet=False)
    compare(ReportConfig("r", tmp_path, ["one"], None, None))
    for file in ("index.html", "summary.md"):
        text = (tmp_path / "r" / "report" / file).read_text()
        assert text.count("No published values") == 1 and text.count("No mCE and no published values") == 1
        assert not any(
            word in text for word in ("67.61", "76.7", "28.23", "Published", "relative mCE", "AlexNet's error ")
        )
    page = Tables((tmp_path / "r" / "report" / "index.html").read_text())
    shown = {"runs", "linear top-1 %", "kNN top-1 %", "corrupted top-1 %", "NSS", "KLD", "CC"}
    assert page.rows(heading="linear top-1 %")["contrastive"].keys() == shown
    assert page.rows(heading="mean of 15 %")["contrastive"]["mean of 15 %"][0]


def test_a_partial_result_is_marked_and_has_no_mce(runs: Path) -> None:
    page, text, summary = read_report(runs)
    tables = Tables(page)
    row = tables.rows(heading="relative mCE")["co-train"]
    mean = summary["metrics"]["co-train/imagenet_c/partial_mean_top1"]
    assert row["mean of 15 %"][0] == f"{mean:.2f} (partial, 65 of 75 missing)"
    assert row["mCE"][0] == row["relative mCE"][0] == "" and f"{mean:.2f} (partial" in text
    assert "(partial, 2 of 15)" in tables.rows(heading="severity 1 %")["co-train"]["severity 1 %"][0]
    assert "partial" not in tables.rows(heading="severity 1 %")["contrastive"]["severity 1 %"][0]
    assert sorted(summary["partial"]) == ["co-train"] and summary["partial"]["co-train"]["fog"] == [1, 2, 3, 4, 5]


def test_a_number_that_only_some_seeds_have_says_so(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_student(tmp_path, f"a{seed}", seed=seed, corruptions=COMMON if seed == 0 else ())
    compare(ReportConfig("r", tmp_path, ["a0", "a1"], None, None))
    page = (tmp_path / "r" / "report" / "index.html").read_text()
    assert Tables(page).rows(heading="mCE")["contrastive"]["mCE"][0].endswith("(1 of 2 runs)")


def test_runs_of_one_recipe_are_one_row_and_others_are_not(tmp_path: Path) -> None:
    names = {"x-seed0": {"seed": 0}, "x-seed1": {"seed": 1}, "y": {"temperature": 0.5}}
    folders = [RunFolder(write_student(tmp_path, name, **config)) for name, config in names.items()]
    groups = open_groups(folders)
    assert [(g.label, [run.name for run in g.runs]) for g in groups] == [("x", ["x-seed0", "x-seed1"]), ("y", ["y"])]
    foreign = tmp_path / "probe-other"
    foreign.mkdir()
    (foreign / "summary.json").write_text(json.dumps({"run": "probe-other", "step": 0, "metrics": {"knn/top1": 3.0}}))
    assert [g.label for g in open_groups([*folders, RunFolder(foreign)])] == ["x", "y", "probe-other"]
    untrained = RunFolder(write_student(tmp_path, "random-init"))
    untrained.summary_file.write_text(json.dumps(untrained.read_summary() | {"step": 0}))
    found = [(g.label, g.arm) for g in open_groups([folders[0], untrained])]
    assert found == [("contrastive", "contrastive"), ("random-init", "")]


def test_what_the_runs_differ_in_is_told(runs: Path) -> None:
    page, text, _ = read_report(runs)
    tables = Tables(page)
    differences = tables.rows(heading="part")
    assert differences["arm"]["part"][0] == "co-train" and differences["seed"]["taught-seed1"][0] == "1"
    assert "temperature" not in differences
    protocols = next(t for t in tables.tables if t[0][0][0] == "run")
    row = next(row for row in protocols if row[0][0] == "part" and row[1][0] == "knn")
    assert [cell for cell, _ in row[2:]] == [
        "train: 1281166 (efefefef), val: 50000 (efefefef)",
        "seed 0, k 200, temperature 0.1",
        "0" * 12,
        "0123456789ab",
    ]
    assert "| part | knn | train: 1281166 (efefefef), val: 50000 (efefefef) |" in text


def test_runs_measured_on_different_sets_are_not_compared_in_silence(tmp_path: Path) -> None:
    for name, arm in (("a", "contrastive"), ("b", "co-train")):
        folder = write_student(tmp_path, name, arm=arm)
        summary = json.loads((folder / "summary.json").read_text())
        summary["protocols"]["knn"]["val"]["samples"] = len(name + arm)
        (folder / "summary.json").write_text(json.dumps(summary))
    compare(ReportConfig("r", tmp_path, ["a", "b"], None, None))
    sentence = "knn was not measured alike in all runs: val differ."
    for file in ("index.html", "summary.md"):
        text = (tmp_path / "r" / "report" / file).read_text()
        assert sentence in text and "linear_probe was not" not in text


def test_a_report_on_one_run_lies_in_its_folder_and_leaves_its_summary_alone(tmp_path: Path) -> None:
    folder = write_student(tmp_path, "one")
    before = (folder / "summary.json").read_bytes()
    compare(ReportConfig("one", tmp_path, ["one"], None, None))
    assert (folder / "summary.json").read_bytes() == before
    assert json.loads((folder / "report" / "summary.json").read_text())["metrics"]["contrastive/knn/top1"] == 55.0
    assert (folder / "report" / "index.html").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": []}, "no run is named"),
        ({"students": ["one", "one"]}, "'one' is named twice"),
        ({"students": ["none"]}, "no run in .*none"),
        ({"students": ["empty"]}, "finish the run and probe it first"),
        ({"name": "empty"}, "a training's own folder"),
        ({"teacher": "empty"}, "finish the teacher first"),
        ({"name": "a/b"}, "not usable"),
    ],
)
def test_what_cannot_be_reported_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_student(tmp_path, "one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("run: empty\n")
    options: dict[str, Any] = {"name": "r", "runs": tmp_path, "students": ["one"], "teacher": None, "gaze": None}
    with pytest.raises(InputError, match=message):
        compare(ReportConfig(**(options | changes)))
    assert not (tmp_path / "r").exists()


def test_a_run_that_is_not_finished_is_shown_as_such(tmp_path: Path) -> None:
    write_student(tmp_path, "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.yaml").write_text("run: two\narm: co-train\n")
    compare(ReportConfig("r", tmp_path, ["one", "two"], None, None))
    page = (tmp_path / "r" / "report" / "index.html").read_text()
    assert Tables(page).rows(heading="runs")["co-train"]["runs"][0] == "1 (1 not finished)"


def test_the_page_of_many_rows_stays_under_five_megabytes(tmp_path: Path, tiny_sample: TinySample) -> None:
    """The gallery takes what the rest of the page leaves, of each kind of cases some; the rest is whole."""
    names = [f"arm{number}" for number in range(24)]
    copy_student(write_student(tmp_path, names[0], gaze=tiny_sample.gaze, watched=True), names[1:])
    compare(ReportConfig("r", tmp_path, names, None, tiny_sample.gaze, 20))
    page = (tmp_path / "r" / "report" / "index.html").read_text()
    assert 4_000_000 < len(page.encode()) < 5_000_000
    assert "of 20 pictures: more would make the page too large" in page
    assert "Worst cases" in page and "Best cases" in page and page.count('class="plot"') == 27
    assert Tables(page).rows(heading="linear top-1 %").keys() == {*names, "random init"}


def test_the_page_of_hundreds_of_runs_stays_under_five_megabytes_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    """Drawings hold the first rows, tables the first that fit; the text beside the page holds all."""
    names = [f"{'of-a-sweep-' * 11}{number:03}" for number in range(300)]
    first = write_student(tmp_path, names[0])
    summary = json.loads((first / "summary.json").read_text())
    for number in range(10):
        summary["protocols"][f"other{number}"] = {"readout_a_long_option": "of many words " * 10}
        summary["metrics"][f"other{number}/score"] = 1.0
    summary["environment"]["packages"] = {f"package{number}": "1.2.3" for number in range(300)}
    (first / "summary.json").write_text(json.dumps(summary))
    copy_student(first, names[1:])
    compare(ReportConfig("r", tmp_path, names, None, None))
    page = (tmp_path / "r" / "report" / "index.html").read_text()
    assert 4_000_000 < len(page.encode()) < 5_000_000
    shown = list(Tables(page).rows(heading="linear top-1 %"))[:-1]  # the last row: untrained weights
    assert 100 < len(shown) < len(names) and shown == names[: len(shown)]
    rows = f"in {len(shown)} of {len(names)} rows"
    assert (
        f"Of {len(names)} runs, the first {len(shown)} are on this page, {rows}: more would make it too large" in page
    )
    assert page.count(f"The first 30 of {len(shown)} rows") == 4 and f'by step of {", ".join(names[:30])}"' in page
    folded = page.count("<summary>All of ")
    assert folded > 0 and f"All of the last {len(shown) - folded} of {len(shown)} runs would make" in page
    text = (tmp_path / "r" / "report" / "summary.md").read_text()
    assert all(f"| {name} | 1 | 60.00 |" in text and f"| {name} | knn |" in text for name in names)


def test_drawings_that_find_no_room_are_named(tmp_path: Path) -> None:
    groups = open_groups([RunFolder(write_student(tmp_path, "one"))])
    page = Page("none")
    add_training_curves(page, groups, None, Room(60_000))
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page.text())
    left_out = re.findall(r"Not drawn, as the page would be too large: (.*?)\.</p>", page.text())
    assert 0 < len(titles) < 5 and len(page.text().encode()) < 75_000
    assert {*titles, *", ".join(left_out).split(", ")} == {
        *("loss", "NT-Xent", "attention loss", "images per second", "share of time waiting for data")
    }


def copy_student(first: Path, names: list[str]) -> None:
    """Runs beside the first that differ from it in one option."""
    config = (first / "config.yaml").read_text()
    for number, name in enumerate(names):
        shutil.copytree(first, first.parent / name, ignore=shutil.ignore_patterns("config.yaml"), copy_function=os.link)
        (first.parent / name / "config.yaml").write_text(f"{config}temperature: 0.{number + 1000}\n")


def test_maps_of_another_set_are_not_shown(runs: Path, tiny_sample: TinySample, tmp_path: Path) -> None:
    write_student(tmp_path, "one", gaze=None)
    page = Page("none")
    config = ReportConfig("r", tmp_path, ["one"], None, tiny_sample.gaze)
    add_gallery(page, config, open_groups([RunFolder(tmp_path / "one")]), None, most_bytes=1_000_000)
    assert "No pictures" in page.text() and "<img" not in page.text()


def test_worst_and_best_cases_go_by_nss() -> None:
    scores = {str(number): float((7 * number) % 20) for number in range(20)}
    spread, worst, best = choose_cases(list(scores), scores, count=12).values()
    assert [scores[key] for key in worst] == [0, 1, 2] and [scores[key] for key in best] == [19, 18, 17]
    assert len(set(spread + worst + best)) == 12
    assert [len(keys) for keys in choose_cases(list(scores), {}, count=12).values()] == [12]
    assert [len(keys) for keys in choose_cases(["a", "b"], {"a": 1.0, "b": 2.0}, count=12).values()] == [2]


@pytest.mark.parametrize(("mode", "background"), [("light", "#ffffff"), ("dark", "#121212")])
def test_grey_text_and_links_can_be_read(mode: str, background: str) -> None:
    """At least WCAG's 4.5 to 1 on the browser's own background."""
    parts = STYLE.split("prefers-color-scheme: dark", 1)
    for name in ("grey", "accent"):
        colour = re.findall(rf"--{name}: #(\w+)", parts[mode == "dark"])[0]
        colour = colour if len(colour) == 6 else "".join(2 * letter for letter in colour)
        bright, dim = sorted((luminance(colour), luminance(background[1:])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (name, mode)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of rrggbb."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_what_the_page_shows_goes_to_wandb(runs: Path) -> None:
    """Every table and result curve, under the names that the workspace lists; numbers with their deviations."""
    (files,) = (runs / "all" / "wandb").glob("offline-run-*/files/media/table/report")
    sent = {file.name.rpartition("_")[0].rpartition("_")[0]: file for file in files.iterdir()}
    assert sent.keys() == set(TABLES)
    assert {table["name"] for table in read_report(runs)[2]["tables"]} < set(TABLES)
    read = {name: json.loads(file.read_text()) for name, file in sent.items()}
    row = dict(zip(read["overview"]["columns"], read["overview"]["data"][0], strict=True))
    assert row["row"] == "contrastive" and row["linear top-1 %"] == 60.5
    assert row["linear top-1 %, deviation"] == pytest.approx(statistics.stdev([60, 61]))
    assert ["co-train", 0.5, 0.5] in read["precision_recall"]["data"]
    assert ["co-train", 2.0, pytest.approx(0.02)] in read["robust_gaze_severity"]["data"]
    assert ["part", "knn"] in [line[:2] for line in read["protocols"]["data"]]
    assert ["arm", *["contrastive"] * 2, *["contrastive+attention"] * 2, "co-train"] in read["differences"]["data"]
    assert ["device", *["a processor"] * 5] in read["origins"]["data"]


def test_the_page_draws_what_a_training_logs(runs: Path) -> None:
    """Losses, gradients, embedding, evaluators, speed, memory, each once; the evaluators' lesser metrics are folded."""
    page, _, _ = read_report(runs)
    sections = dict(re.findall(r'<h2 id="section-\d+">During training: (.*?)</h2>(.*?)(?=<h2|$)', page, re.DOTALL))
    titles = {
        name: [html.unescape(title) for title in re.findall(r"<figcaption>(.*?)</figcaption>", text)]
        for name, text in sections.items()
    }
    assert titles == {
        "losses": ["loss", "NT-Xent", "attention loss", "attention: KLD", "attention: NSS"],
        "evaluators": [
            *("linear probe, top-1 %", "nearest neighbours, top-1 %"),
            *("alignment with people: NSS", "alignment with people: CC"),
            *("retrieval, map", "attention, sim", "elsewhere, score"),
        ],
        "teacher": ["loss"],
        "speed": [
            *("images per second", "images per second and device", "share of time waiting for data"),
            *("seconds per step", "peak memory, GiB"),
        ],
        "health": [
            *("learning rate", "steps skipped", "share of views that learn attention", "two views' distance"),
            *("uniformity", "rank of the embeddings", "attention's gradient to NT-Xent's"),
        ],
    }
    shown, folded = sections["evaluators"].split("<details>")
    assert "retrieval, map" in shown and "attention, sim" in folded and "elsewhere, score" in folded
    assert "attention's gradient to NT-Xent's by step of contrastive+attention" in html.unescape(sections["health"])
    assert "loss by step of contrastive, contrastive+attention, co-train" in sections["losses"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)], ids=["desk, light", "phone, dark"])
def test_the_report_in_a_browser(runs: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """From disk: no message, every picture drawn and named, numbers as in `summary.json`, readable, usable by keys."""
    page, _, summary = read_report(runs)
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page and "<link" not in page
    # a fixed place, where CI can keep them
    shot = REPOSITORY / "runs" / "ci-report" / "report" / ("screenshot_phone.png" if dark else "screenshot.png")
    with Browser(tmp_path / "profile") as browser:
        browser.open(runs / "all" / "report" / "index.html", width=width, dark=dark)
        browser.screenshot(shot)
        drawn = browser.run(
            "[...document.images].map(i => i.naturalWidth > 1 && i.naturalHeight > 1 && i.alt.length > 3)"
        )
        assert len(drawn) == 8 * 6 + page.count('class="plot"') and all(drawn)
        assert browser.run("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]
        _check_tables(browser.run("document.documentElement.outerHTML"), summary)
        check_keys(browser)
        check_blending(browser, tap=dark)
        background = check_contrast(browser)
        assert browser.messages == []
    assert cv2.imread(str(shot))[3, 3].tolist() == background, "the page is not painted as its styles say"
    assert sum(background) < 100 if dark else background == [255, 255, 255]


def _check_tables(text: str, summary: dict[str, Any]) -> None:
    shown = [[[cell for cell, _ in row] for row in table] for table in Tables(text).tables]
    assert len(summary["tables"]) == 10
    for table in summary["tables"]:
        assert [table["columns"], *table["rows"]] in shown, table["name"]
