"""What happens in a synthetic video: who moves how, which sound is heard, and when.

A scene is a timeline of six events cast from four figures and four sounds, so that pairing a figure with a sound needs
both eyes and ears:

    E1 figure 1 + sound 1     E3 figure 1 + sound 3     E5 figure 4, silent      (distractor for the eye)
    E2 figure 2 + sound 2     E4 figure 3 + sound 1     E6 sound 4, nothing moves (distractor for the ear)

Figure 1 comes twice with different sounds and sound 1 twice with different figures: questions about them are ambiguous
unless the time named in the question is understood. Order, lengths, pauses, motions and one overlap are drawn from the
seed. All times are fractions of the duration first, so a scene of ten seconds and one of four minutes are alike in kind.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "pink", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
MOTIONS = ("rises", "falls", "slides", "shakes")
SOUNDS = ("bell", "drum", "whistle", "buzz", "hiss", "chirp", "siren", "click")

NUM_EVENTS = 6
SHORTEST, LONGEST = 10.0, 240.0  # seconds: "from ten seconds to several minutes".
MOMENTS = 16  # The timeline's grain: one moment per uniformly sampled frame of SAVEnVideo (16 frames).
EVENT_MOMENTS = (2.0, 2.6)  # Length of an event in moments: at least two sampled frames fall into it.
OVERLAP_MOMENTS = (0.3, 0.7)  # How far the overlapping pair of events reaches into each other.


@dataclasses.dataclass(frozen=True)
class Figure:
    """Who moves: a coloured shape."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Event:
    """Something between `start` and `end` (seconds): a moving figure, a sound, or both together."""

    start: float
    end: float
    figure: Figure | None
    motion: str | None
    sound: str | None


@dataclasses.dataclass(frozen=True)
class Scene:
    """A whole video. `events` are in order of their start; `props` are grey figures that never move."""

    id: str
    seed: int
    duration: float
    events: tuple[Event, ...]
    props: int

    def moment_times(self, moments: int = MOMENTS) -> np.ndarray:
        """Seconds at the middle of each of `moments` equal segments (the midpoint frame sampler's times)."""
        return (np.arange(moments) + 0.5) * (self.duration / moments)

    def seen_at(self, time: float) -> Event | None:
        """The event whose figure is in the foreground at `time`: of two that overlap, the one begun later."""
        return self._foreground(time, "figure")

    def heard_at(self, time: float) -> Event | None:
        """The event whose sound is loudest at `time`: of two that overlap, the one begun later."""
        return self._foreground(time, "sound")

    def _foreground(self, time: float, channel: str) -> Event | None:
        active = [e for e in self.events if e.start <= time < e.end and getattr(e, channel) is not None]
        return active[-1] if active else None


def _cast(rng: np.random.Generator) -> list[tuple[Figure | None, str | None]]:
    colors = rng.permutation(COLORS)[:4]
    shapes = rng.choice(SHAPES, size=4)
    f1, f2, f3, f4 = (Figure(str(c), str(s)) for c, s in zip(colors, shapes, strict=True))
    s1, s2, s3, s4 = (str(s) for s in rng.permutation(SOUNDS)[:4])
    return [(f1, s1), (f2, s2), (f1, s3), (f3, s1), (f4, None), (None, s4)]


def _order(
    rng: np.random.Generator, cast: list[tuple[Figure | None, str | None]], overlapping: int
) -> list[int]:
    """An order in which the two events that overlap share neither figure nor sound: each has its own end.

    Elsewhere like may follow like, with a pause between. If it never did, seeing which events are neighbours
    would tell which are unlike: text alone could then guess 57 % of type 5, picture or sound alone 80 %.
    """
    while True:
        order = [int(i) for i in rng.permutation(NUM_EVENTS)]
        (figure, sound), (next_figure, next_sound) = cast[order[overlapping - 1]], cast[order[overlapping]]
        if (figure is None or figure != next_figure) and (sound is None or sound != next_sound):
            return order


def _times(rng: np.random.Generator, overlapping: int) -> list[tuple[float, float]]:
    """Starts and ends of the events in moments, with pauses between; event `overlapping` begins before the
    end of the one ahead of it."""
    lengths = rng.uniform(*EVENT_MOMENTS, size=NUM_EVENTS)
    overlap = rng.uniform(*OVERLAP_MOMENTS)
    gaps = rng.dirichlet(np.full(NUM_EVENTS, 2.0)) * (MOMENTS - lengths.sum() + overlap)
    # NUM_EVENTS shares for NUM_EVENTS + 1 places: all but the overlapping one get a pause.
    spaces = np.insert(gaps, overlapping, -overlap)
    spans = []
    clock = 0.0
    for space, length in zip(spaces, lengths, strict=False):
        clock += space
        spans.append((clock, clock + length))
        clock += length
    return spans


def make_scene(
    seed: int, scene_id: str | None = None, shortest: float = SHORTEST, longest: float = LONGEST
) -> Scene:
    """Draws a scene; the same seed gives the same scene.

    Args:
        seed: any non-negative integer.
        scene_id: name of the video; default "scene-<seed>".
        shortest, longest: bounds of the duration in seconds, drawn log-uniformly.
    """
    rng = np.random.default_rng([seed, 0x5CE7E])
    duration = float(np.exp(rng.uniform(math.log(shortest), math.log(longest))))
    duration = round(duration, 3)  # Milliseconds, as SAVEn-Vid prints times.
    cast = _cast(rng)
    overlapping = int(rng.integers(1, NUM_EVENTS))
    order = _order(rng, cast, overlapping)
    events = []
    for index, (start, end) in zip(order, _times(rng, overlapping), strict=True):
        figure, sound = cast[index]
        motion = str(rng.choice(MOTIONS)) if figure is not None else None
        unit = duration / MOMENTS
        events.append(
            Event(round(float(start) * unit, 3), round(float(end) * unit, 3), figure, motion, sound)
        )
    return Scene(
        scene_id or f"scene-{seed:07d}", seed, duration, tuple(events), props=int(rng.integers(0, 3))
    )
