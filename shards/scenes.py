"""Procedural scenes with simulated gaze: what stands in for photographs and for people when there is no data.

A scene is a background of coloured 1/f noise under uneven light with several objects on it. Exactly one object is a
creature of one of ten classes (a silhouette with its own markings, and two eyes) and names the scene. The others are
chimeras of the same sizes, colours and contrast: the silhouette of one class with the markings of another, and one eye.
As in photographs, most creatures are seen in their own habitat: the grain of the background goes with the class in
`HABITAT_SHARE` of the scenes. Colours are drawn anew for every object, and objects stand anywhere, so a pixel tells
nothing about the class.

Simulated observers look mostly at the creature, less at the chimeras, a little at the centre. To do as they do one must
tell two eyes from one. Both are in every scene, so telling scenes apart (all that contrast teaches) does not need it.

Pure functions of a `numpy.random.Generator`: no files, no state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
# (radius, angle) in units of the object's radius -> positive inside, about the distance to the edge.
Silhouette = Callable[[FloatArray, FloatArray], FloatArray]
# (u, v) in units of the object's radius -> about [-1, 1], from the object's dark colour to its bright one.
Marking = Callable[[FloatArray, FloatArray], FloatArray]

# Numbers tuned so that frozen contrastive features place the gaze no better than a map of all objects does.
HABITAT_SHARE = 0.7
NUM_CHIMERAS = (3, 4)
OBJECT_RADIUS = (0.17, 0.25)  # of the image's side
EYE_RADIUS = 0.23  # of the object's radius
LOOKS_AT_CENTRE, LOOKS_AT_TARGET = 0.06, 0.84  # shares of the fixations; the rest goes to the chimeras
AIM_ERROR = 0.25  # deviation of a fixation from what it aims at, of the object's radius
EYE_WHITE, EYE_PUPIL = 0.97, 0.05


@dataclass(frozen=True)
class SceneObject:
    """One object. Lengths are pixels of the image, `angle` is in radians, `class_id` is -1 for a chimera."""

    x: float
    y: float
    radius: float
    angle: float
    class_id: int


@dataclass(frozen=True)
class Scene:
    """A rendered scene: `image` is uint8 `(size, size, 3)` RGB, `objects` are in drawing order, later ones on top."""

    image: NDArray[np.uint8]
    class_id: int
    objects: tuple[SceneObject, ...]

    @property
    def target(self) -> SceneObject:
        """The one object that names the class."""
        return next(item for item in self.objects if item.class_id >= 0)


@dataclass(frozen=True)
class Look:
    """How an object looks; `eyes` are their places (u, v), in units of the object's radius."""

    name: str
    silhouette: Silhouette
    marking: Marking
    eyes: tuple[tuple[float, float], ...] = ((-0.3, -0.05), (0.3, -0.05))


def _polygon(corners: int) -> Silhouette:
    sector = 2 * np.pi / corners
    return lambda r, t: np.cos(sector / 2) - r * np.cos(np.mod(t, sector) - sector / 2)


def _lobed(lobes: int, depth: float) -> Silhouette:
    return lambda r, t: (1 - depth / 2) + depth / 2 * np.cos(lobes * t) - r


def _box(r: FloatArray, t: FloatArray, *, width: float, height: float) -> FloatArray:
    return np.minimum(width - np.abs(r * np.cos(t)), height - np.abs(r * np.sin(t)))


def _cross(r: FloatArray, t: FloatArray) -> FloatArray:
    return np.maximum(_box(r, t, width=0.95, height=0.36), _box(r, t, width=0.36, height=0.95))


def _crescent(r: FloatArray, t: FloatArray) -> FloatArray:
    return np.minimum(1.0 - r, np.hypot(r * np.cos(t) - 0.5, r * np.sin(t)) - 0.72)


LOOKS: tuple[Look, ...] = (
    Look("banded_cross", _cross, lambda u, v: np.sin(9.0 * u)),
    Look(
        "checked_disc",
        lambda r, t: np.minimum(1.0 - r, r * np.cos(t) + 0.25),
        lambda u, v: 1.5 * np.sin(7.5 * u) * np.sin(7.5 * v),
        eyes=((0.1, -0.3), (0.1, 0.3)),
    ),
    Look("cored_star", _lobed(5, 0.55), lambda u, v: 8.0 * (0.45 - np.hypot(u, v))),
    Look("dotted_square", _polygon(4), lambda u, v: 4.0 * (np.cos(9.5 * u) * np.cos(9.5 * v) - 0.35)),
    Look("halved_triangle", _polygon(3), lambda u, v: 8.0 * v),
    Look("quartered_flower", _lobed(8, 0.3), lambda u, v: 30.0 * u * v),
    Look(
        "ringed_bar",
        lambda r, t: _box(r, t, width=1.0, height=0.42),
        lambda u, v: np.cos(11.0 * np.hypot(u, v)),
    ),
    Look(
        "spiral_crescent",
        _crescent,
        lambda u, v: np.sin(2.0 * np.arctan2(v, u) + 8.0 * np.hypot(u, v)),
        eyes=((-0.62, -0.26), (-0.62, 0.26)),
    ),
    Look(
        "spoked_ring",
        lambda r, t: np.minimum(0.97 - r, r - 0.5),
        lambda u, v: np.sin(6.0 * np.arctan2(v, u)),
        eyes=((-0.3, -0.74), (0.3, -0.74)),
    ),
    Look(
        "zigzag_clover",
        _lobed(3, 0.45),
        lambda u, v: np.sin(9.0 * u + 5.0 * np.abs(np.mod(2.2 * v, 2.0) - 1.0)),
    ),
)
CLASS_NAMES: tuple[str, ...] = tuple(look.name for look in LOOKS)


def _chimera(rng: np.random.Generator) -> Look:
    """The silhouette of one class, the markings of another, one eye: at home in no class."""
    outside, inside = rng.choice(len(LOOKS), size=2, replace=False)
    angle = rng.uniform(0, 2 * np.pi)
    eye = (0.3 * float(np.cos(angle)), 0.3 * float(np.sin(angle)))
    return Look("chimera", LOOKS[outside].silhouette, LOOKS[inside].marking, eyes=(eye,))


@lru_cache(maxsize=64)
def _spectrum(size: int, exponent: float, habitat: int) -> FloatArray:
    """Amplitudes for `numpy.fft.irfft2` of a `(size, size)` field: 1/f, with a habitat's grain where that is not -1.

    A habitat is one of five directions at one of two scales. All are their own mirror images, as views are flipped.
    """
    fy = np.fft.fftfreq(size)[:, None] * size
    fx = np.fft.rfftfreq(size)[None, :] * size
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1.0
    plain = frequency**-exponent
    plain[0, 0] = 0.0
    plain /= np.sqrt((plain**2).sum())
    if habitat < 0:
        return plain
    cosine = np.abs(np.cos(np.arctan2(fy, fx)))
    upright, flat = np.exp(-(((cosine - 1) / 0.03) ** 2)), np.exp(-((cosine / 0.12) ** 2))
    slanted = np.exp(-(((cosine - np.sqrt(0.5)) / 0.1) ** 2))
    direction = (upright, flat, slanted, np.ones_like(cosine), upright + flat)[habitat % 5]
    grain = direction * np.exp(-((np.log(frequency / (6, 13)[habitat // 5]) / 0.3) ** 2))
    grain[0, 0] = 0.0
    grain /= np.sqrt((grain**2).sum())
    return np.sqrt(0.2 * plain**2 + 0.8 * grain**2)


def _noise(rng: np.random.Generator, size: int, *, exponent: float = 1.6, habitat: int = -1) -> FloatArray:
    """A random `(size, size)` field of the given spectrum with mean 0 and deviation 1."""
    amplitude = _spectrum(size, exponent, habitat)
    phase = rng.random(amplitude.shape) * 2 * np.pi
    field = np.fft.irfft2(amplitude * np.exp(1j * phase), s=(size, size))
    return (field / field.std()).astype(np.float32)


def _colour(rng: np.random.Generator) -> FloatArray:
    """A random RGB colour in [0, 1] of medium lightness."""
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(0.1, 0.6), rng.uniform(0.3, 0.8)]]], np.float32)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0], dtype=np.float32)


def _background(rng: np.random.Generator, size: int, *, class_id: int) -> FloatArray:
    """Habitat, clouds of light and of tint, and a gradient of light: float RGB `(size, size, 3)`, about [0, 1]."""
    habitat = class_id if rng.random() < HABITAT_SHARE else int(rng.integers(len(LOOKS)))
    light = 0.1 * rng.uniform(0.6, 1.3) * _noise(rng, size, habitat=habitat) + 0.04 * _noise(rng, size)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.18)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light += strength * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
    axis = rng.normal(size=3)
    axis -= axis.mean()
    axis *= 0.07 / (np.linalg.norm(axis) + 1e-6)
    return np.asarray(_colour(rng) + light[..., None] + _noise(rng, size)[..., None] * axis, dtype=np.float32)


def _two_colours(rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Two random colours of one object, nearly always the second darker."""
    first, second = _colour(rng), _colour(rng)
    gap = rng.uniform(0.3, 0.5) * (1 if rng.random() < 0.9 else -1)
    return first, np.clip(first.mean() - gap + second - second.mean(), 0.02, 0.98).astype(np.float32)


def _draw(canvas: FloatArray, item: SceneObject, rng: np.random.Generator) -> None:
    """Paint one object into `canvas` in place, with soft edge, shading and a faint shadow."""
    look = LOOKS[item.class_id] if item.class_id >= 0 else _chimera(rng)
    base, mark = _two_colours(rng)
    light_angle, light = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.1)
    reach, size = item.radius * 1.3 + 1, canvas.shape[0]
    top, left = max(0, int(item.y - reach)), max(0, int(item.x - reach))
    bottom, right = min(size, int(item.y + reach) + 2), min(size, int(item.x + reach) + 2)
    dy = (np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(item.y)) / np.float32(item.radius)
    dx = (np.arange(left, right, dtype=np.float32)[None, :] - np.float32(item.x)) / np.float32(item.radius)
    cos, sin = np.float32(np.cos(item.angle)), np.float32(np.sin(item.angle))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    inside = look.silhouette(np.hypot(u, v), np.arctan2(v, u)) * item.radius
    patch = canvas[top:bottom, left:right]
    patch *= 1 - 0.35 * np.clip(inside * 0.35 + 1.0, 0, 1)[..., None]
    mix = np.clip(look.marking(u, v) * 0.5 + 0.5, 0, 1)[..., None]
    shade = light * (np.cos(light_angle) * dx + np.sin(light_angle) * dy)[..., None]
    _cover(patch, inside, base + (mark - base) * mix + shade)
    for eye_u, eye_v in look.eyes:
        distance = np.hypot(u - eye_u, v - eye_v) * item.radius
        _cover(patch, EYE_RADIUS * item.radius - distance, EYE_WHITE)
        _cover(patch, 0.52 * EYE_RADIUS * item.radius - distance, EYE_PUPIL)


def _cover(patch: FloatArray, inside: FloatArray, paint: FloatArray | float) -> None:
    """Lay `paint` over `patch` in place where `inside` (pixels) is positive, with an edge one pixel wide."""
    patch += np.clip(inside + 0.5, 0, 1)[..., None] * (paint - patch)


def _place(rng: np.random.Generator, size: int, taken: list[SceneObject], *, class_id: int) -> SceneObject:
    """A random object, where the overlap with those that stand already is least of a few tries.

    Objects stand about upright, and a little more often near the centre, as in photographs.
    """
    radius = size * rng.uniform(*OBJECT_RADIUS)
    angle = rng.uniform(-0.4, 0.4)
    low, high = 0.8 * radius, size - 0.8 * radius
    best, best_gap = np.array([size / 2, size / 2]), -np.inf
    for _ in range(12):
        point = np.clip(rng.normal(size / 2, 0.4 * size, size=2), low, high)
        gaps = [np.hypot(point[0] - o.x, point[1] - o.y) - 0.85 * (radius + o.radius) for o in taken]
        gap = min(gaps, default=np.inf)
        if gap > best_gap:
            best, best_gap = point, gap
        if gap > 0:
            break
    return SceneObject(float(best[0]), float(best[1]), float(radius), float(angle), class_id)


def render_scene(rng: np.random.Generator, *, size: int = 96, class_id: int | None = None) -> Scene:
    """Render one scene.

    Args:
        rng: the only source of randomness; the same state gives the same scene.
        size: side of the square image in pixels, at least 16.
        class_id: index into `CLASS_NAMES`, drawn at random when `None`.

    Raises:
        ValueError: `size` or `class_id` is out of range.
    """
    if size < 16:
        raise ValueError(f"size is {size}: a scene needs at least 16 pixels")
    if class_id is None:
        class_id = int(rng.integers(len(LOOKS)))
    if not 0 <= class_id < len(LOOKS):
        raise ValueError(f"class_id is {class_id}: the classes are 0 to {len(LOOKS) - 1}")
    objects = [_place(rng, size, [], class_id=class_id)]
    for _ in range(int(rng.integers(NUM_CHIMERAS[0], NUM_CHIMERAS[1] + 1))):
        objects.append(_place(rng, size, objects, class_id=-1))
    ordered = tuple(objects[i] for i in rng.permutation(len(objects)))
    canvas = _background(rng, size, class_id=class_id)
    for item in ordered:
        _draw(canvas, item, rng)
    canvas += rng.normal(0, 0.015, size=canvas.shape).astype(np.float32)
    return Scene((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), class_id, ordered)


def observe(rng: np.random.Generator, scene: Scene, *, num_observers: int = 12) -> list[FloatArray]:
    """Simulate who looks where: 5 to 10 fixations per observer, each with a Gaussian error.

    Most aim at the class object (`LOOKS_AT_TARGET`), some at the centre of the image (`LOOKS_AT_CENTRE`), the others at
    chimeras.

    Returns:
        One float32 `(num_fixations, 2)` array of x, y per observer, 0-based pixels, inside the image.
    """
    size = scene.image.shape[0]
    chimeras = [item for item in scene.objects if item.class_id < 0]
    observers = []
    for _ in range(num_observers):
        points = []
        for _ in range(int(rng.integers(5, 11))):
            draw = rng.random()
            if draw < LOOKS_AT_CENTRE:
                points.append(rng.normal((size / 2, size / 2), 0.17 * size))
                continue
            on_target = draw < LOOKS_AT_CENTRE + LOOKS_AT_TARGET
            aim = scene.target if on_target else chimeras[int(rng.integers(len(chimeras)))]
            points.append(rng.normal((aim.x, aim.y), AIM_ERROR * aim.radius))
        observers.append(np.clip(np.array(points, np.float32), 0, size - 1))
    return observers
