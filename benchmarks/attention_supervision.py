"""Attention supervision against its baseline on real data: `python benchmarks/attention_supervision.py --help`.

Runs (or takes, where it is finished) the tables of configs/downstream/{trec6,cifar10,easy_vqa}.yaml, every arm and seed
with the same training budget, and measures the surrogate miner against probing one mask at a time.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from common import environment, ratio_of_pairs, report, time_pairs

from downstream.config import DownstreamConfig
from downstream.masks import grid_masks
from downstream.miner import mine, true_class_score
from downstream.models.image import SmallAttentionNetwork
from downstream.pipeline import run_pipeline
from downstream.table import Row, tabulate
from engine.program import parse_config

ROOT = Path(__file__).resolve().parent.parent
NOTES = """Two steps (Patro et al., WACV 2021): a baseline, surrogate attention maps mined from it with masked inputs,
then every arm goes on from the same weights for the same number of epochs, the baseline arm without supervision. The
epoch is chosen on a tenth of the training set. Mean and standard deviation over seeds; `p` is of the paired t-test
against the baseline arm over the same seeds; the paper's values stand beside, from another implementation."""


def main() -> None:
    """Run the tables that the options give data for, and write `results/attention_supervision.{json,md}`."""
    options = _options()
    tables: dict[str, list[Row]] = {}
    for task, arguments in _recipes(options).items():
        seeds = options.trec_seeds if task == "trec6" else options.seeds
        recipe = str(ROOT / "configs" / "downstream" / f"{task}.yaml")
        config, _ = parse_config(DownstreamConfig, argv=["--config", recipe, *arguments])
        config = replace(config, runs=options.runs, arm="all", seeds=seeds, loop=replace(config.loop, tracker="none"))
        tables[task] = tabulate(run_pipeline(config), task=task)
    figures: dict[str, float] = {}
    for task, rows in tables.items():
        figures[f"{task}_baseline"] = next(row.mean for row in rows if row.arm == "baseline")
        figures[f"{task}_gain"] = max(row.gain for row in rows if row.gain is not None)
    figures["miner_vs_one_by_one"] = _miner_ratio(options.pairs)
    report(
        "attention_supervision",
        figures=figures,
        environment=environment(seeds={"trec6": options.trec_seeds, "others": options.seeds}),
        title="Attention supervision: surrogates mined from the model itself",
        notes=NOTES,
        table="\n\n".join(_table(task, rows) for task, rows in tables.items()),
    )


def _recipes(options: argparse.Namespace) -> dict[str, list[str]]:
    """Task to the options of its data, for those whose data is given."""
    recipes = {}
    if options.trec6 is not None:
        recipes["trec6"] = ["--data.path", str(options.trec6)]
    if options.cifar10 is not None:
        recipes["cifar10"] = [f"--data.path={options.cifar10 / 'train'}", f"--data.val={options.cifar10 / 'test'}"]
    if options.easy_vqa:
        recipes["easy_vqa"] = []
    return recipes


def _miner_ratio(pairs: int) -> float:
    """Probing 4 images of 32x32 pixels with 501 masks in batches against one mask at a time, on this device."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SmallAttentionNetwork(num_classes=10).to(device).eval()
    inputs = {"images": torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, device=device)}
    targets = torch.arange(4, device=device)
    masks = grid_masks((8, 8), count=500, scale=2, seed=0).to(device)

    def batched() -> None:
        mine(model, inputs, targets, modality="image", masks=lambda row: masks)

    @torch.inference_mode()
    def one_by_one() -> None:
        for row in range(len(targets)):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            best = -1.0
            for mask in masks:
                features = model.encode(one)
                found = model.attend({"image": features["image"] * mask.unsqueeze(-1)}, one)
                best = max(best, float(true_class_score(found.logits, targets[row : row + 1])))

    return ratio_of_pairs(*time_pairs(batched, one_by_one, num_pairs=pairs))


def _table(task: str, rows: list[Row]) -> str:
    lines = [f"## {task}", "", "| arm | seeds | test accuracy % | gain | p | paper % |", "|---|---|---|---|---|---|"]
    for row in rows:
        gain = "" if row.gain is None else f"{row.gain:+.2f}"
        p_value = "" if row.p_value is None else f"{row.p_value:.3f}"
        paper = "" if row.paper is None else f"{row.paper:.2f}"
        lines.append(
            f"| {row.arm} | {row.num_seeds} | {row.mean:.2f} ± {row.deviation:.2f} | {gain} | {p_value} | {paper} |"
        )
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder for runs")
    parser.add_argument("--trec6", type=Path, help="folder with TREC.train and TREC.test; left out without it")
    parser.add_argument("--cifar10", type=Path, help="folder with shards train/ and test/; left out without it")
    parser.add_argument("--easy-vqa", action="store_true", help="also run Easy-VQA (pip install easy-vqa)")
    parser.add_argument("--trec-seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of the other tasks (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of the miner (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
