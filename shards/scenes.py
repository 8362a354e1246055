"""Procedural scenes with simulated gaze: what stands in for photographs and for people when there is no data.

A scene is a 1/f coloured-noise background under uneven light with several objects on it. Exactly one object belongs to
one of ten classes (a silhouette with its own markings) and names the scene; the others, of the same sizes, colours and
contrast, belong to none. Colours are drawn anew for every object, so neither colour nor position tells the class.
Simulated observers look mostly at the class object, less at the others, a little at the centre.

Pure functions of a `numpy.random.Generator`: no files, no global state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Silhouette = Callable[[FloatArray, FloatArray], FloatArray]
Marking = Callable[[FloatArray, FloatArray], FloatArray]


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Lengths are pixels of the image, `angle` is in radians, `class_id` is -1 for an object that belongs to no class.
    """

    x: float
    y: float
    radius: float
    angle: float
    class_id: int


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    `image` is uint8 `(size, size, 3)` RGB; `objects` are in drawing order (later ones lie on top).
    """

    image: NDArray[np.uint8]
    class_id: int
    objects: tuple[SceneObject, ...]

    @property
    def target(self) -> SceneObject:
        """The one object that names the class."""
        return next(item for item in self.objects if item.class_id >= 0)


# --- silhouettes: (radius, angle) in units of the object's radius -> signed distance-like value, positive inside ---


def _polygon(corners: int) -> Silhouette:
    def inside(r: FloatArray, theta: FloatArray) -> FloatArray:
        sector = 2 * np.pi / corners
        folded = np.mod(theta, sector) - sector / 2
        return np.cos(sector / 2) - r * np.cos(folded)

    return inside


def _lobed(lobes: int, depth: float) -> Silhouette:
    def inside(r: FloatArray, theta: FloatArray) -> FloatArray:
        return (1 - depth / 2) + depth / 2 * np.cos(lobes * theta) - r

    return inside


def _cross(r: FloatArray, theta: FloatArray) -> FloatArray:
    u, v = np.abs(r * np.cos(theta)), np.abs(r * np.sin(theta))
    upright = np.minimum(0.95 - u, 0.36 - v)
    across = np.minimum(0.36 - u, 0.95 - v)
    return np.maximum(upright, across)


def _ring(r: FloatArray, theta: FloatArray) -> FloatArray:
    return np.minimum(0.97 - r, r - 0.5)


def _crescent(r: FloatArray, theta: FloatArray) -> FloatArray:
    u, v = r * np.cos(theta) - 0.5, r * np.sin(theta)
    return np.minimum(1.0 - r, np.hypot(u, v) - 0.72)


def _half_disc(r: FloatArray, theta: FloatArray) -> FloatArray:
    return np.minimum(1.0 - r, r * np.cos(theta) + 0.25)


def _bar(r: FloatArray, theta: FloatArray) -> FloatArray:
    u, v = np.abs(r * np.cos(theta)), np.abs(r * np.sin(theta))
    return np.minimum(1.0 - u, 0.42 - v)


# --- markings: (u, v) in units of the object's radius -> roughly [-1, 1], the mix of the object's two colours ---


def _stripes(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.sin(9.0 * u)


def _checks(u: FloatArray, v: FloatArray) -> FloatArray:
    return 1.5 * np.sin(7.5 * u) * np.sin(7.5 * v)


def _rings(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.cos(11.0 * np.hypot(u, v))


def _spokes(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.sin(6.0 * np.arctan2(v, u))


def _dots(u: FloatArray, v: FloatArray) -> FloatArray:
    return 4.0 * (np.cos(9.5 * u) * np.cos(9.5 * v) - 0.35)


def _halves(u: FloatArray, v: FloatArray) -> FloatArray:
    return 8.0 * v


def _zigzag(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.sin(9.0 * u + 2.5 * np.abs(np.mod(2.2 * v, 2.0) - 1.0) * 2)


def _core(u: FloatArray, v: FloatArray) -> FloatArray:
    return 8.0 * (0.45 - np.hypot(u, v))


def _spiral(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.sin(2.0 * np.arctan2(v, u) + 8.0 * np.hypot(u, v))


def _quarters(u: FloatArray, v: FloatArray) -> FloatArray:
    return 30.0 * u * v


CLASSES: tuple[tuple[str, Silhouette, Marking], ...] = (
    ("banded_cross", _cross, _stripes),
    ("checked_disc", _half_disc, _checks),
    ("cored_star", _lobed(5, 0.55), _core),
    ("dotted_square", _polygon(4), _dots),
    ("halved_triangle", _polygon(3), _halves),
    ("quartered_flower", _lobed(8, 0.3), _quarters),
    ("ringed_bar", _bar, _rings),
    ("spiral_crescent", _crescent, _spiral),
    ("spoked_ring", _ring, _spokes),
    ("zigzag_clover", _lobed(3, 0.45), _zigzag),
)
CLASS_NAMES: tuple[str, ...] = tuple(name for name, _, _ in CLASSES)


@lru_cache(maxsize=8)
def _amplitude(size: int, exponent: float) -> FloatArray:
    """1/f**exponent amplitudes for `numpy.fft.irfft2` of a `(size, size)` field, zero at the mean."""
    fy = np.fft.fftfreq(size)[:, None]
    fx = np.fft.rfftfreq(size)[None, :]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1.0
    amplitude = frequency**-exponent
    amplitude[0, 0] = 0.0
    return amplitude.astype(np.float32)


def _noise(rng: np.random.Generator, size: int, *, exponent: float) -> FloatArray:
    """A `(size, size)` field of 1/f noise with mean 0 and deviation 1."""
    amplitude = _amplitude(size, exponent)
    phase = rng.random(amplitude.shape, dtype=np.float32) * np.float32(2 * np.pi)
    field = np.fft.irfft2(amplitude * np.exp(1j * phase), s=(size, size)).astype(np.float32)
    return field / field.std()


def _colour(rng: np.random.Generator) -> FloatArray:
    """A random RGB colour in [0, 1] of medium lightness."""
    hue, saturation, value = rng.uniform(0, 360), rng.uniform(0.1, 0.6), rng.uniform(0.3, 0.8)
    return cv2.cvtColor(np.array([[[hue, saturation, value]]], np.float32), cv2.COLOR_HSV2RGB)[0, 0]


def _background(rng: np.random.Generator, size: int) -> FloatArray:
    """Coloured 1/f noise under a linear gradient of light, float RGB `(size, size, 3)` around [0, 1]."""
    light = _noise(rng, size, exponent=1.3) * 0.13
    tint = _noise(rng, size, exponent=1.6) * 0.07
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    gradient = (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]) * rng.uniform(0.0, 0.18)
    axis = rng.normal(size=3).astype(np.float32)
    axis -= axis.mean()
    axis /= np.linalg.norm(axis) + 1e-6
    return _colour(rng) + (light + gradient)[..., None] + tint[..., None] * axis * 1.7


def _pair_of_colours(rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Two colours of one object that differ in lightness, whichever way round."""
    first, second = _colour(rng), _colour(rng)
    gap = rng.uniform(0.25, 0.5) * rng.choice([-1.0, 1.0])
    return first, np.clip(first.mean() - gap + (second - second.mean()), 0.02, 0.98).astype(np.float32)


def _distractor_look(rng: np.random.Generator) -> tuple[Silhouette, Marking]:
    """A random rounded silhouette and blurry markings: like a class object in everything but its form."""
    terms = [(k, rng.normal() * 0.22 / k**0.5, rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5)]
    waves = [(rng.normal(0, 5.0), rng.normal(0, 5.0), rng.uniform(0, 2 * np.pi)) for _ in range(4)]

    def inside(r: FloatArray, theta: FloatArray) -> FloatArray:
        edge = 0.8 + sum(a * np.cos(k * theta + p) for k, a, p in terms)
        return np.asarray(edge - r, dtype=np.float32)

    def marking(u: FloatArray, v: FloatArray) -> FloatArray:
        return np.asarray(sum(np.sin(a * u + b * v + p) for a, b, p in waves), dtype=np.float32)

    return inside, marking


def _draw(canvas: FloatArray, item: SceneObject, rng: np.random.Generator) -> None:
    """Paint one object into `canvas` in place, with soft edge, shading and a faint shadow."""
    if item.class_id >= 0:
        _, inside, marking = CLASSES[item.class_id]
    else:
        inside, marking = _distractor_look(rng)
    dark, bright = _pair_of_colours(rng)
    light_angle, light = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.1)

    size, reach = canvas.shape[0], item.radius * 1.3 + 1
    top, left = max(0, int(item.y - reach)), max(0, int(item.x - reach))
    bottom, right = min(size, int(item.y + reach) + 2), min(size, int(item.x + reach) + 2)
    if top >= bottom or left >= right:
        return
    dy = (np.arange(top, bottom, dtype=np.float32)[:, None] - item.y) / item.radius
    dx = (np.arange(left, right, dtype=np.float32)[None, :] - item.x) / item.radius
    cos, sin = np.float32(np.cos(item.angle)), np.float32(np.sin(item.angle))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    depth = inside(np.hypot(u, v), np.arctan2(v, u)) * item.radius
    cover = np.clip(depth + 0.5, 0, 1)[..., None]
    shadow = np.clip(depth * 0.35 + 1.0, 0, 1)[..., None] * 0.35
    mix = np.clip(marking(u, v) * 0.5 + 0.5, 0, 1)[..., None]
    shade = light * (np.cos(light_angle) * dx + np.sin(light_angle) * dy)[..., None]
    paint = dark + (bright - dark) * mix + shade
    patch = canvas[top:bottom, left:right]
    patch *= 1 - shadow
    patch += cover * (paint - patch)


def _place(
    rng: np.random.Generator, size: int, taken: list[SceneObject], *, class_id: int, spread: float
) -> SceneObject:
    """A random object, kept clear of most of what stands already.

    `spread` is the deviation of the position from the centre in units of the image, or 0 for anywhere.
    """
    radius = rng.uniform(0.13, 0.21) * size
    low, high = 0.8 * radius, size - 0.8 * radius
    best, best_gap = (size / 2, size / 2), -np.inf
    for _ in range(12):
        point = rng.uniform(low, high, size=2)
        if spread:
            point = np.clip(rng.normal(size / 2, spread * size, size=2), low, high)
        gaps = [np.hypot(point[0] - o.x, point[1] - o.y) - 0.85 * (radius + o.radius) for o in taken]
        gap = min(gaps, default=np.inf)
        if gap > best_gap:
            best, best_gap = (float(point[0]), float(point[1])), gap
        if gap > 0:
            break
    return SceneObject(best[0], best[1], float(radius), float(rng.uniform(0, 2 * np.pi)), class_id)


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
        raise ValueError(f"size is {size}, but a scene needs at least 16 pixels")
    if class_id is None:
        class_id = int(rng.integers(len(CLASSES)))
    if not 0 <= class_id < len(CLASSES):
        raise ValueError(f"class_id is {class_id}, but the classes are 0..{len(CLASSES) - 1}")
    target = _place(rng, size, [], class_id=class_id, spread=0.2)
    objects = [target]
    for _ in range(int(rng.integers(2, 5))):
        objects.append(_place(rng, size, objects, class_id=-1, spread=0.0))
    order = rng.permutation(len(objects))
    ordered = tuple(objects[i] for i in order)
    canvas = _background(rng, size)
    for item in ordered:
        _draw(canvas, item, rng)
    canvas += rng.normal(0, 0.015, size=canvas.shape).astype(np.float32)
    return Scene((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), class_id, ordered)


def observe(
    rng: np.random.Generator, scene: Scene, *, num_observers: int = 12, fixations_each: tuple[int, int] = (5, 10)
) -> list[FloatArray]:
    """Simulate who looks where.

    Of all fixations about 70 % land on the class object, 17 % on the others, 13 % near the centre of the image; each
    misses its aim by a Gaussian error. Every observer makes a random number of them between the two of `fixations_each`.

    Returns:
        One `(num_fixations, 2)` array of x, y per observer, 0-based pixels, inside the image.
    """
    size = scene.image.shape[0]
    others = [item for item in scene.objects if item.class_id < 0]
    observers = []
    for _ in range(num_observers):
        points = []
        for _ in range(int(rng.integers(fixations_each[0], fixations_each[1] + 1))):
            draw = rng.random()
            if draw < 0.13:
                centre, spread = (size / 2, size / 2), 0.17 * size
            else:
                aim = scene.target if draw < 0.83 or not others else others[int(rng.integers(len(others)))]
                centre, spread = (aim.x, aim.y), 0.4 * aim.radius
            points.append(rng.normal(centre, spread))
        observers.append(np.clip(np.array(points, np.float32), 0, size - 1))
    return observers
