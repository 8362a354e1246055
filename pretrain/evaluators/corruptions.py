"""The corruptions of ImageNet-C: their names and groups, how one is made, and how errors become mCE.

Source: Hendrycks and Dietterich, ICLR 2019. The corruptions themselves are the package `imagecorruptions`, in the form
of PyPI's imagecorruptions-imaug, which runs on current Python and NumPy.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from engine.errors import InputError

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
COMMON = tuple(name for group in GROUPS.values() for name in group)
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
ALL = COMMON + EXTRA
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  # pixels, the package's own limit

# Mean top-1 error of AlexNet over the severities, ImageNet's 1000 classes (google-research/augmix).
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
# Clean top-1 error of the same AlexNet, torchvision's (acc@1 56.522).
ALEXNET_CLEAN = 0.43478
# These draw from generators of their own unless they are given a seed.
_SEEDED = ("impulse_noise", "glass_blur")

Errors = Mapping[str, Mapping[int, float]]


def choose_corruptions(names: list[str]) -> tuple[str, ...]:
    """Corruptions named in the config, in the set's order; none: the 15; "extra" stands for the 4 others.

    Raises:
        InputError: an unknown name.
    """
    if not names:
        return COMMON
    wanted = {name for name in names if name != "extra"} | (set(EXTRA) if "extra" in names else set())
    wanted |= set(COMMON) if names == ["extra"] else set()
    unknown = sorted(wanted - set(ALL))
    if unknown:
        raise InputError(f"corruptions.names: {unknown[0]!r} is none of {', '.join(ALL)} (or extra: the last four)")
    return tuple(name for name in ALL if name in wanted)


def check_severities(severities: list[int]) -> tuple[int, ...]:
    """Severities in ascending order.

    Raises:
        InputError: none, or one outside 1 to 5.
    """
    if not severities or not set(severities) <= set(SEVERITIES):
        raise InputError(f"corruptions.severities {severities}: give some of 1 to 5")
    return tuple(sorted(set(severities)))


def check_package(size: int) -> None:
    """Make sure that corruptions can be made at the encoder's input size.

    Raises:
        InputError: the package is missing, or the input is too small.
    """
    if size < SMALLEST:
        raise InputError(f"corruptions need inputs of at least {SMALLEST} pixels, the encoder's are {size}")
    try:
        import imagecorruptions  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"corruptions on the fly need the package imagecorruptions-imaug ({error}): pip install -e "
            "'.[corruptions]', or give a released set with --corruptions.folder"
        ) from error


def image_seed(seed: int, *, number: int, corruption: str, severity: int) -> int:
    """Seed of one corrupted image: a pure function, so that ranks and workers cannot change it."""
    entropy = [seed & 0xFFFFFFFF, number, ALL.index(corruption), severity]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def corrupt(image: np.ndarray, name: str, *, severity: int, seed: int) -> np.ndarray:
    """The package's corruption under a seed: equal to its own output after `numpy.random.seed(seed)`.

    Impulse noise and glass blur, which draw from generators of their own, get the seed as their argument. NumPy's
    global generator is put back afterwards.

    Args:
        image: uint8 `(height, width, 3)`, at least 32 pixels a side.
        severity: 1 to 5.

    Returns:
        uint8 of the same shape.
    """
    from imagecorruptions import corrupt as apply

    state = np.random.get_state()
    np.random.seed(seed)
    given = {"seed": seed} if name in _SEEDED else {}
    try:
        return apply(image, severity=severity, corruption_name=name, **given)
    finally:
        np.random.set_state(state)


def warm_up(names: Iterable[str]) -> None:
    """Compile what is compiled at its first use (numba's glass blur), before processes are forked."""
    if "glass_blur" in names:
        corrupt(np.zeros((SMALLEST, SMALLEST, 3), dtype=np.uint8), "glass_blur", severity=1, seed=0)


def mean_corruption_error(errors: Mapping[str, float]) -> float:
    """`mCE = 100 * mean_c(E_c / E_c(AlexNet))` over the 15, in percent; AlexNet itself has 100.

    Args:
        errors: corruption to top-1 error, mean over the severities, 0 to 1.

    Raises:
        ValueError: one of the 15 is missing.
    """
    _require_all(errors)
    return 100 * float(np.mean([errors[name] / ALEXNET[name] for name in COMMON]))


def relative_mean_corruption_error(errors: Mapping[str, float], clean: float) -> float:
    """`100 * mean_c((E_c - E_clean) / (E_c(AlexNet) - E_clean(AlexNet)))` over the 15, in percent.

    Args:
        errors: as in `mean_corruption_error`.
        clean: top-1 error on the clean images, 0 to 1.

    Raises:
        ValueError: one of the 15 is missing.
    """
    _require_all(errors)
    return 100 * float(np.mean([(errors[name] - clean) / (ALEXNET[name] - ALEXNET_CLEAN) for name in COMMON]))


def summarise(errors: Errors, *, clean: float, alexnet: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of a set of corrupted images, complete or not.

    Args:
        errors: corruption to severity to top-1 error, 0 to 1; what was not measured is absent.
        clean: error on the clean images.
        alexnet: whether AlexNet's ImageNet errors apply to these images' layout (not to CIFAR-10-C).

    Returns:
        Metrics: top-1 accuracy in percent as `<corruption>/<severity>`; with all five severities `<corruption>/top1`
        and `<corruption>/ce`; of groups whose corruptions are complete `<group>/top1`; with all 15 `mean_top1`, `mce`
        and `relative_mce`, else `partial_mean_top1` over what there is. And what is missing of the 15, for the
        protocol: `{"complete": bool, "missing": {corruption: severities}}`.
    """
    metrics = {"clean_top1": 100 * (1 - clean)}
    whole: dict[str, float] = {}
    for name in [name for name in ALL if name in errors]:
        measured = errors[name]
        metrics |= {f"{name}/{severity}": 100 * (1 - measured[severity]) for severity in sorted(measured)}
        if set(measured) == set(SEVERITIES):
            whole[name] = float(np.mean(list(measured.values())))
            metrics[f"{name}/top1"] = 100 * (1 - whole[name])
            if alexnet and name in ALEXNET:
                metrics[f"{name}/ce"] = 100 * whole[name] / ALEXNET[name]
    for group, names in {**GROUPS, "extra": EXTRA}.items():
        if all(name in whole for name in names):
            metrics[f"{group}/top1"] = 100 * (1 - float(np.mean([whole[name] for name in names])))
    missing = {name: sorted(set(SEVERITIES) - set(errors.get(name, {}))) for name in COMMON}
    missing = {name: severities for name, severities in missing.items() if severities}
    if missing:
        found = [error for name in COMMON for error in errors.get(name, {}).values()]
        if found:
            metrics["partial_mean_top1"] = 100 * (1 - float(np.mean(found)))
    else:
        metrics["mean_top1"] = 100 * (1 - float(np.mean([whole[name] for name in COMMON])))
        if alexnet:
            metrics["mce"] = mean_corruption_error(whole)
            metrics["relative_mce"] = relative_mean_corruption_error(whole, clean)
    return metrics, {"complete": not missing, "missing": missing}


def _require_all(errors: Mapping[str, float]) -> None:
    missing = [name for name in COMMON if name not in errors]
    if missing:
        raise ValueError(f"mCE needs all 15 corruptions, {', '.join(missing)} are missing")
