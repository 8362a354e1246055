"""Saliency metrics against pysaliency, on 200 images of OSIE: `SACCADE_DATA=FOLDER python benchmarks/metrics.py`.

FOLDER holds `osie/`. Both sides get the same maps and fixations, one thread each, and take turns.
pysaliency is used as its documentation shows: models with their maps in the cache, whose methods go over a data set.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import environment, ratio_of_pairs, report, time_pairs

from attention.baselines import MapShape
from attention.fixations import pad_fixations, shuffled_negatives
from attention.maps import to_density
from attention.metrics import evaluate_maps
from tests.attention.reference import as_fixations, import_pysaliency, osie_gaze, stored_model

SIZE = (600, 800)
EPS = 2.2204e-16
FLOOR = 1e-9
NAMES = ("nss", "kld", "cc", "sim", "auc_judd", "auc_borji", "auc_shuffled", "information_gain")


def read_gaze(num_images: int) -> list[list[np.ndarray]]:
    """Fixations of the last images of OSIE (its validation split): per image, per observer `(num, 2)` x, y."""
    gaze = osie_gaze()
    if gaze is None:
        sys.exit("SACCADE_DATA must name a folder that holds osie/data/eye/fixations.mat")
    return gaze[-num_images:]


class Material:
    """Maps and fixations: the map of seven observers predicts that of all fifteen, the mean map is the baseline."""

    def __init__(self, gaze: list[list[np.ndarray]], *, dtype: torch.dtype) -> None:
        shape = MapShape(size=SIZE, sigma=24, grid=SIZE)
        self.points = [np.concatenate(observers) for observers in gaze]
        seven = [np.concatenate(observers[:7]) for observers in gaze]
        # A floor far below the uniform density: pysaliency's information gain is infinite where a map is exactly 0.
        self.prediction, self.target = (
            to_density(torch.stack([shape.density(points) for points in side]).to(dtype) + FLOOR)
            for side in (seven, self.points)
        )
        self.baseline = self.target.mean(dim=0)
        self.padded = pad_fixations(self.points)
        self.negatives = shuffled_negatives(*self.padded)

    def ours(self) -> dict[str, torch.Tensor]:
        """Evaluate all metrics with this project."""
        return evaluate_maps(
            self.prediction,
            target=self.target,
            fixations=self.padded[0],
            valid=self.padded[1],
            baseline=self.baseline,
            negatives=self.negatives[0],
            negatives_valid=self.negatives[1],
        )


class Reference:
    """The same evaluation through pysaliency's models, maps already in its cache."""

    def __init__(self, material: Material, *, jitter: bool) -> None:
        pysaliency = import_pysaliency()
        num_images = len(material.points)
        blank = np.random.default_rng(0).integers(0, 255, (num_images, *SIZE), dtype=np.uint8)
        self.stimuli = pysaliency.Stimuli(list(blank))
        self.fixations = as_fixations(pysaliency, material.points)
        maps = (material.prediction, material.target, material.baseline.expand(num_images, *SIZE))
        self.model, self.target, self.baseline = (
            stored_model(pysaliency, self.stimuli, list(each.numpy())) for each in maps
        )
        self.normalised = pysaliency.models.SaliencyMapNormalizingModel
        self.jitter = jitter
        self.means: dict[str, float] = {}

    def calls(self) -> dict[str, Callable[[], np.ndarray]]:
        """Metric to a call of pysaliency's: one value per image, or per fixation (NSS, information gain)."""
        model, stimuli, fixations = self.model, self.stimuli, self.fixations
        no_minimum: dict[str, float] = {"minimum_value": 0.0}
        divergence = no_minimum | {"log_regularization": EPS, "quotient_regularization": EPS}

        def gains() -> np.ndarray:
            # New objects each time: the normalised maps are part of the work.
            own, base = (self.normalised(each, **no_minimum) for each in (model, self.baseline))
            return own.information_gains(stimuli, fixations, baseline_model=base)

        return {
            "nss": lambda: model.NSSs(stimuli, fixations),
            "kld": lambda: np.asarray(model.image_based_kl_divergences(stimuli, self.target, **divergence)),
            "cc": lambda: model.CCs(stimuli, self.target),
            "sim": lambda: model.SIMs(stimuli, self.target),
            "auc_judd": lambda: np.asarray(model.AUC_Judd(stimuli, fixations, jitter=self.jitter)),
            "auc_borji": lambda: np.asarray(model.AUC_per_image(stimuli, fixations, nonfixations="uniform")),
            "auc_shuffled": lambda: np.asarray(model.AUC_per_image(stimuli, fixations, nonfixations="shuffled")),
            "information_gain": gains,
        }

    def evaluate(self) -> None:
        """Evaluate all metrics; `means` holds their means over images."""
        owner = self.fixations.n
        for name, call in self.calls().items():
            values = call()
            if values.shape == owner.shape:
                values = np.bincount(owner, values) / np.bincount(owner)
            self.means[name] = float(np.mean(values))


def measure(
    gaze: list[list[np.ndarray]], *, dtype: torch.dtype, jitter: bool, one_thread: bool, num_pairs: int
) -> dict[str, float]:
    """Ratio of pysaliency's time to ours, both times in ms an image, and the largest difference of the mean metrics.

    With `one_thread` the processor time of both on one thread, else the time that passes on the machine's cores.
    """
    material = Material(gaze, dtype=dtype)
    reference = Reference(material, jitter=jitter)
    ours, theirs = time_pairs(
        material.ours,
        reference.evaluate,
        num_pairs=num_pairs,
        clock=time.process_time if one_thread else time.perf_counter,
    )
    own = {name: values.double().mean().item() for name, values in material.ours().items() if name in NAMES}
    return {
        "ratio": ratio_of_pairs(ours, theirs),
        "ours_ms": 1000 * statistics.median(ours) / len(gaze),
        "pysaliency_ms": 1000 * statistics.median(theirs) / len(gaze),
        "largest_difference": max(abs(own[name] - reference.means[name]) for name in NAMES),
    }


def parts(material: Material) -> dict[str, float]:
    """What our time goes into, and two measures of what the machine can do: ms an image, least of five runs."""
    maps, human, (points, valid) = material.prediction, material.target, material.padded
    pool, others = material.negatives
    room = np.empty(SIZE[0] * SIZE[1], dtype=np.float32)

    def sort() -> None:
        for row in maps.flatten(1).numpy():
            np.copyto(room, row)
            room.sort()

    calls: dict[str, Callable[[], object]] = {
        "kld, cc, sim": lambda: evaluate_maps(maps, target=human),
        "nss, auc_judd, auc_borji": lambda: evaluate_maps(maps, fixations=points, valid=valid),
        "the same and auc_shuffled": lambda: evaluate_maps(
            maps, fixations=points, valid=valid, negatives=pool, negatives_valid=others
        ),
        "everything": material.ours,
        "for comparison: reading both maps once, for their sums": lambda: (maps.sum(), human.sum()),
        "for comparison: sorting the predicted map, in numpy": sort,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(5):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: 1000 * min(taken) / len(material.points) for name, taken in times.items()}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="number of images, from the end of OSIE")
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs of each setting")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    gaze = read_gaze(options.images)
    settings = {
        "": (torch.float32, True, False),
        "_no_jitter": (torch.float32, False, False),
        "_float64": (torch.float64, True, False),
        "_one_thread": (torch.float32, True, True),
    }
    figures, rows, cores = {}, [], torch.get_num_threads()
    for suffix, (dtype, jitter, one_thread) in settings.items():
        torch.set_num_threads(1 if one_thread else cores)
        with threadpool_limits(limits=1 if one_thread else None):
            got = measure(gaze, dtype=dtype, jitter=jitter, one_thread=one_thread, num_pairs=options.pairs)
        figures[f"metrics_vs_pysaliency{suffix}"] = got["ratio"]
        label = f"{str(dtype).removeprefix('torch.')}, {'its default (jitter)' if jitter else 'jitter off'}"
        label += ", one thread" if one_thread else ""
        numbers = (f"{got['ours_ms']:.2f}", f"{got['pysaliency_ms']:.1f}", f"{got['ratio']:.1f}")
        rows.append(f"| {label} | {' | '.join(numbers)} | {got['largest_difference']:.1e} |")
    torch.set_num_threads(1)
    head = "| Maps, pysaliency's AUC-Judd | ours, ms an image | pysaliency, ms an image | ratio | largest difference |"
    table = "\n".join([head, "|---|---|---|---|---|", *rows])
    with threadpool_limits(limits=1):
        own = [f"| {name} | {taken:.2f} |" for name, taken in parts(Material(gaze, dtype=torch.float32)).items()]
    table = "\n".join([table, "", "| Ours, float32, one thread | ms an image |", "|---|---|", *own])
    notes = (
        f"All of {', '.join(NAMES)} on {options.images} OSIE images at 800x600 (map of 7 observers "
        "against all 15, sigma 24 px). pysaliency runs through the methods of its models, with the maps in their "
        f"cache. Median of {options.pairs} alternating pairs; time that passes with all {cores} cores at both sides' "
        "disposal (ours shares the maps out among them, pysaliency takes one image after the other), in the last row "
        "processor time on one thread. The headline is pysaliency's default. AUC-Borji is the exact expectation "
        "(pysaliency's uniform non-fixations). "
        "pysaliency's AUC-Judd adds random jitter by default; without it, it gives the exact value that we give. EMD "
        "and Spearman are left out: pysaliency has neither. The difference is that of the mean over images, largest of "
        "the eight metrics."
    )
    title = "Saliency metrics against pysaliency"
    report("metrics", figures=figures, environment=environment(), title=title, notes=notes, table=table)


if __name__ == "__main__":
    main()
