"""Draws a scene: coloured figures with motion trails on a dull, still background with grey distractors.

Everything that a question can ask for is visible in one frame: colour, shape, and by its trail the motion.
Positions and sizes are fractions of the picture, so a scene looks alike at every resolution.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from input_pipeline.synthetic.scene import SHAPES, Event, Figure, Scene

RGB = {
    "red": (225, 35, 35),
    "green": (35, 185, 60),
    "blue": (55, 85, 245),
    "yellow": (245, 220, 30),
    "pink": (250, 110, 205),
    "white": (248, 248, 248),
}
DIAMETERS = (0.29, 0.34)  # A figure's width: a quarter to a third of the picture's.
PROP_DIAMETERS = (0.16, 0.24)
PROP_GREYS = (92.0, 138.0)  # Brighter than the background, darker than a white figure.
TRAIL = (0.42, 0.28, 0.18, 0.10)  # Opacity of the ghost copies, nearest first.
TRAIL_STEP = 0.085  # Distance between two copies.
FADED = 0.35  # Opacity of a figure while a later one is in front of it.
NEAR, FAR = (
    0.19,
    0.66,
)  # Where a path ends and begins: in either place figure and trail are inside the picture.
LANES = (0.26, 0.74)  # Range of the coordinate that a motion leaves alone.
SHAKE_REACH = 0.05
SHAKE_PERIOD = 0.7  # Seconds.
FPS = 8  # Frames per second of short videos.
MAX_FRAMES, MIN_FPS = 400, 3  # Long videos have fewer, so that minutes of them are written in a blink.
_BACKGROUND, _PATH = 0xBAC, 0x9A7  # Streams of the scene's random numbers.


@dataclasses.dataclass(frozen=True)
class Stamp:
    """One figure as it is drawn: centre, diameter and trail steps as fractions of the picture (x right, y
    down)."""

    figure: Figure
    center: tuple[float, float]
    diameter: float
    trail: tuple[tuple[float, float, float], ...]  # (dx, dy, opacity), farthest first
    opacity: float


def frame_rate(duration: float, fps: int = FPS) -> int:
    """Frames per second of a video of `duration` seconds: `fps`, less when that makes more than MAX_FRAMES
    frames, but not under MIN_FPS."""
    return min(fps, max(MIN_FPS, int(MAX_FRAMES / duration)))


def visual_state(scene: Scene, time: float) -> list[Stamp]:
    """What moves on screen at `time` (seconds), in drawing order: the event begun last stands in front.

    Returns:
        One Stamp per active event with a figure; empty in a pause.
    """
    front = scene.seen_at(time)
    stamps = []
    for index, event in enumerate(scene.events):
        if event.figure is not None and event.start <= time < event.end:
            opacity = 1.0 if event is front else FADED
            stamps.append(_stamp(scene.seed, index, event.figure, event, time, opacity))
    return stamps


def _stamp(seed: int, index: int, figure: Figure, event: Event, time: float, opacity: float) -> Stamp:
    lane, diameter = _place(seed, index)
    done = (time - event.start) / (event.end - event.start)
    if event.motion == "rises":
        center, away = (lane, FAR + (NEAR - FAR) * done), (0.0, 1.0)
    elif event.motion == "falls":
        center, away = (lane, 1.0 - FAR + (FAR - NEAR) * done), (0.0, -1.0)
    elif event.motion == "slides":
        center, away = (1.0 - FAR + (FAR - NEAR) * done, lane), (-1.0, 0.0)
    elif event.motion == "shakes":
        swing = SHAKE_REACH * math.sin(2 * math.pi * (time - event.start) / SHAKE_PERIOD)
        # Copies on both sides: what jitters leaves no direction behind.
        sides = [(s * k * TRAIL_STEP, 0.0, TRAIL[k - 1]) for k in (2, 1) for s in (-1.0, 1.0)]
        return Stamp(figure, (0.5 + swing, lane), diameter, tuple(sides), opacity)
    else:
        raise ValueError(f"unknown motion {event.motion!r}")
    copies = [
        (away[0] * TRAIL_STEP * (k + 1), away[1] * TRAIL_STEP * (k + 1), shade)
        for k, shade in enumerate(TRAIL)
    ]
    return Stamp(figure, center, diameter, tuple(reversed(copies)), opacity)


@functools.lru_cache(maxsize=256)
def _place(seed: int, index: int) -> tuple[float, float]:
    rng = np.random.default_rng([seed, index, _PATH])
    return float(rng.uniform(*LANES)), float(rng.uniform(*DIAMETERS))


def render_frame(scene: Scene, time: float, size: int) -> np.ndarray:
    """The picture at `time`.

    Args:
        scene: what happens.
        time: seconds.
        size: width and height in pixels.

    Returns:
        uint8 [size size 3], the same for the same arguments.
    """
    stamps = visual_state(scene, time)
    background = _background(scene.seed, scene.props, size)
    if not stamps:
        return background[1].copy()
    canvas = background[0].copy()
    for stamp in stamps:
        _draw(canvas, stamp)
    return (canvas + 0.5).astype(np.uint8)


def _draw(canvas: np.ndarray, stamp: Stamp) -> None:
    size = canvas.shape[0]
    x, y = stamp.center[0] * size, stamp.center[1] * size
    left, top = math.floor(x), math.floor(y)
    mask = shape_mask(stamp.figure.shape, stamp.diameter * size / 2, x - left, y - top)
    color = np.array(RGB[stamp.figure.color], np.float32)
    for dx, dy, shade in (*stamp.trail, (0.0, 0.0, 1.0)):
        # Copies sit a whole number of pixels apart, so one mask serves all.
        _blend(canvas, mask * (shade * stamp.opacity), color, left + round(dx * size), top + round(dy * size))


def _blend(canvas: np.ndarray, alpha: np.ndarray, color: np.ndarray, left: int, top: int) -> None:
    """Paints `color` through `alpha` [m m], whose middle comes to pixel (left, top); cuts what sticks out."""
    reach = alpha.shape[0] // 2
    size = canvas.shape[0]
    y0, y1 = max(top - reach, 0), min(top + reach + 1, size)
    x0, x1 = max(left - reach, 0), min(left + reach + 1, size)
    if y0 >= y1 or x0 >= x1:
        return
    oy, ox = top - reach, left - reach
    part = alpha[y0 - oy : y1 - oy, x0 - ox : x1 - ox, None]
    window = canvas[y0:y1, x0:x1]
    window += part * (color - window)


def shape_mask(shape: str, radius: float, dx: float, dy: float) -> np.ndarray:
    """Coverage in [0, 1] of a shape with an edge one pixel soft.

    Args:
        shape: one of scene.SHAPES.
        radius: half its width in pixels.
        dx, dy: where its centre lies inside the middle pixel, 0..1.

    Returns:
        float32 [m m], m odd, just large enough.
    """
    reach = math.ceil(radius * 1.15) + 2
    axis = np.arange(-reach, reach + 1, dtype=np.float32) + 0.5
    x, y = (axis - dx)[None, :], (axis - dy)[:, None]
    return np.clip(0.5 - _distance(shape, x, y, radius), 0.0, 1.0).astype(np.float32)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) of points to a shape of half width `r`."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * r  # Areas of the solid shapes are kept similar.
    if shape == "triangle":
        return np.maximum(
            0.874 * np.abs(x) - 0.486 * (y + r), y - 0.8 * r
        )  # Tip at -r, feet at (+-r, 0.8 r).
    if shape == "cross":
        arm, long = 0.33 * r, 1.05 * r
        ax, ay = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(ax - arm, ay - long), np.maximum(ax - long, ay - arm))
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r
    if shape == "star":
        # Folded into one half of one of five points; there the edge is one straight line from tip to notch.
        tip, notch = 1.15 * r, 0.50 * r
        turn = 2 * math.pi / 5
        angle = np.abs((np.arctan2(x, -y) + turn / 2) % turn - turn / 2)
        distance = np.hypot(x, y)
        px, py = distance * np.cos(angle), distance * np.sin(angle)
        nx, ny = notch * math.cos(turn / 2), notch * math.sin(turn / 2)
        ex, ey = nx - tip, ny
        return (ex * py - ey * (px - tip)) / -math.hypot(ex, ey)
    raise ValueError(f"unknown shape {shape!r}")


@functools.lru_cache(maxsize=64)
def _background(seed: int, props: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32, uint8) [size size 3]: a dark, brownish gradient with mottling, grain and grey figures."""
    rng = np.random.default_rng([seed, _BACKGROUND])
    base = rng.uniform((46, 36, 26), (74, 58, 46)).astype(np.float32)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    slope = rng.uniform(-14.0, 14.0, size=2)
    shade = slope[0] * (axis[None, :] - 0.5) + slope[1] * (axis[:, None] - 0.5)
    coarse = rng.normal(0.0, 5.0, size=(7, 7)).astype(np.float32)
    weights = np.maximum(
        1.0 - np.abs(axis[:, None] * 6.0 - np.arange(7)), 0.0
    )  # Linear interpolation, [size 7].
    shade = shade + weights @ coarse @ weights.T
    canvas = base + shade[..., None]
    for _ in range(props):
        shape = str(rng.choice(SHAPES))
        radius = float(rng.uniform(*PROP_DIAMETERS)) / 2 * size
        x, y = (float(v) * size for v in rng.uniform(0.12, 0.88, size=2))
        grey = float(rng.uniform(*PROP_GREYS))
        mask = shape_mask(shape, radius, x % 1.0, y % 1.0)
        _blend(canvas, mask, np.full(3, grey, np.float32), math.floor(x), math.floor(y))
    # Drawn last: its size depends on the resolution, what comes before it must not.
    canvas = canvas + rng.normal(0.0, 2.5, size=(size, size, 1))
    canvas = np.clip(canvas, 0.0, 255.0).astype(np.float32)
    return canvas, (canvas + 0.5).astype(np.uint8)
