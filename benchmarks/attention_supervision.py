"""Attention supervision against its baseline on real data.

    python benchmarks/attention_supervision.py --runs RUNS --trec6 FOLDER --cifar10 FOLDER --easy-vqa --study --jobs 8

Runs the tables of configs/downstream/{trec6,cifar10,easy_vqa}.yaml, every arm and seed with the same training budget,
and measures the surrogate miner against probing one mask at a time. Steps, arms and settings run as processes side
by side (`--jobs`), on one GPU if there is one. What is finished is taken as it is, so it may be stopped and begun
again. `--study` tries weights and choices of examples for every arm on the first seeds, chooses among them by held-out
accuracy, and uses what was chosen in the table; without it the recipes' settings are used.
"""

import argparse
from pathlib import Path

from common import environment, report
from side_by_side import Job, run_jobs
from supervision_parts import (
    ARMS,
    SETTINGS,
    TASKS,
    Recipe,
    pack_images,
    prepare,
    train_arm,
    try_settings,
    write_page,
)
from supervision_tables import figures_of, study_page, table_page

NOTES = """Two steps (Patro et al., WACV 2021): a baseline, surrogate attention maps mined from it with masked inputs,
then every arm goes on from the same weights for the same number of epochs, the baseline arm without supervision. The
epoch is chosen on a tenth of the training set. Mean and standard deviation over seeds; `p` is of the paired t-test
against the baseline arm over the same seeds, not corrected for the number of arms; the paper's values stand beside,
from another implementation. CIFAR-10 here is a copy whose images went through JPEG once more."""


def main() -> None:
    """Run the tables that the options give data for, and write `results/attention_supervision.{json,md}`."""
    options = _options()
    recipes = _recipes(options)
    if recipes:
        logs = options.runs / "logs"
        run_jobs(_jobs(options, recipes), num_processes=options.jobs, logs=logs, minutes=options.minutes)
    from supervision_miner import miner_ratio  # asks for the GPU, which the processes above had to themselves

    figures = figures_of(recipes) | {"miner_vs_one_by_one": miner_ratio(options.pairs)}
    tables = [table_page(recipe) for recipe in recipes]
    if options.study:
        tables.append(study_page(recipes))
    report(
        "attention_supervision",
        by_machine=False,
        figures=figures,
        environment=environment(seeds={recipe.task: list(recipe.seeds) for recipe in recipes}),
        title="Attention supervision: surrogates mined from the model itself",
        notes=NOTES,
        table="\n\n".join(tables),
    )


def _recipes(options: argparse.Namespace) -> list[Recipe]:
    """The tasks that data is given for, those that take longest first."""
    recipes = []
    given = {"cifar10": options.cifar10, "trec6": options.trec6, "easy_vqa": options.easy_vqa}
    for task in TASKS:
        if given[task] is None:
            continue
        folder, paths = Path(given[task]), list(options.set)
        if task == "cifar10":
            folder = pack_images(folder, options.runs / "cifar10_shards")
            paths += [f"--data.path={folder / 'train'}", f"--data.val={folder / 'test'}"]
        else:
            paths.append(f"--data.path={folder}")
        seeds = options.trec_seeds if task == "trec6" else options.seeds
        study = range(min(options.study_seeds, seeds)) if options.study else range(0)
        recipes.append(Recipe(task, tuple(paths), options.runs, tuple(range(seeds)), tuple(study)))
    return recipes


def _jobs(options: argparse.Namespace, recipes: list[Recipe]) -> list[Job]:
    """First steps with their surrogates and baselines; the study on them; the arms as it chose; a page per task."""
    prepared, tried, trained, pages = [], [], [], []
    for recipe in recipes:
        task, on_cpu = recipe.task, recipe.task in options.cpu
        for seed in recipe.seeds:
            prepared.append(Job(f"{task}-first-seed{seed}", prepare, (recipe, seed), on_cpu=on_cpu))
        study: set[str] = set()
        for seed in recipe.study:
            for arm in ARMS:
                name = f"{task}-study-{arm}-seed{seed}"
                needs = frozenset({f"{task}-first-seed{seed}"})
                tried.append(Job(name, try_settings, (recipe, seed, arm), needs, on_cpu))
                study.add(name)
        arms: set[str] = set()
        for seed in recipe.seeds:
            name = f"{task}-arms-seed{seed}"
            needs = frozenset({f"{task}-first-seed{seed}", *study})
            trained.append(Job(name, train_arm, (recipe, seed), needs, on_cpu))
            arms.add(name)
        pages.append(Job(f"{task}-page", write_page, (recipe,), frozenset(arms), on_cpu))
    return prepared + tried + trained + pages


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder for runs")
    parser.add_argument("--trec6", type=Path, help="folder with TREC.train and TREC.test; left out without it")
    parser.add_argument("--cifar10", type=Path, help="folder with train/ and test/: shards, or folders of images")
    parser.add_argument(
        "--easy-vqa",
        nargs="?",
        const="easy_vqa",
        help="also run Easy-VQA: a folder in its package's layout, or the installed package (pip install easy-vqa)",
    )
    parser.add_argument("--trec-seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of the other tasks (default: %(default)s)")
    parser.add_argument("--study", action="store_true", help=f"try {len(SETTINGS)} settings for every arm, and choose")
    parser.add_argument("--study-seeds", type=int, default=2, help="first seeds that it takes (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (default: %(default)s)")
    parser.add_argument("--cpu", nargs="+", default=[], choices=TASKS, help="tasks that leave the GPU alone")
    parser.add_argument("--minutes", type=float, default=0, help="begin no part later than this; 0 begins all")
    parser.add_argument("--set", action="append", default=[], metavar="--KEY=VALUE", help="option for all recipes")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of the miner (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
