"""What is said about a scene in each stage of the recipe: captions in order, captions of a range, questions.

Every function returns (question, answer) in plain words. The wordings are this project's own; the form
"From <start> to <end>, we can see ..., and hear ..." follows the target style in SAVEn-Vid's architecture figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from input_pipeline.synthetic.scene import MOMENTS, Event, Scene
from input_pipeline.transforms.intervals import format_timestamp

NOTHING = "nothing"  # No figure moves.
SILENCE = "silence"  # No sound is heard.
VISUAL_REQUEST = "What moves, in order?"
AUDIO_REQUEST = "What is heard, in order?"
PAIR_REQUEST = "Pair what moves with what is heard."
UNPAIR_REQUEST = "Pair what is heard with what moves."
BRIEFLY = "Answer in a few words."


def says_visual(event: Event | None) -> str:
    """ "red circle rises", or "nothing"."""
    return NOTHING if event is None or event.figure is None else f"{event.figure} {event.motion}"


def says_audio(event: Event | None) -> str:
    """ "bell", or "silence"."""
    return SILENCE if event is None or event.sound is None else event.sound


def in_order(events: Sequence[Event], says: Callable[[Event | None], str], empty: str) -> str:
    """What `says` tells of the events in order, without immediate repetitions; `empty` if there is nothing to tell."""
    told: list[str] = []
    for event in events:
        words = says(event)
        if words != empty and (not told or told[-1] != words):
            told.append(words)
    return ", ".join(told) if told else empty


def visual_in_order(scene: Scene) -> tuple[str, str]:
    """Stage 1a, visual alignment: who moves and how, one after the other."""
    return VISUAL_REQUEST, in_order(scene.events, says_visual, NOTHING)


def audio_in_order(scene: Scene) -> tuple[str, str]:
    """Stage 1b, audio alignment: what is heard, one after the other."""
    return AUDIO_REQUEST, in_order(scene.events, says_audio, SILENCE)


def pairings(scene: Scene) -> list[tuple[str, str]]:
    """Stage 2a, what is heard with what is seen: figures with their sound, and sounds with their figure.

    A figure (sound) that comes twice is left out: its partner would depend on the time.
    """
    both = [e for e in scene.events if e.figure and e.sound]
    figures = [e for e in both if sum(o.figure == e.figure for o in scene.events) == 1]
    sounds = [e for e in both if sum(o.sound == e.sound for o in scene.events) == 1]
    found = []
    if figures:
        found.append((PAIR_REQUEST, ", ".join(f"{e.figure} {e.sound}" for e in figures)))
    if sounds:
        found.append((UNPAIR_REQUEST, ", ".join(f"{e.sound} {e.figure}" for e in sounds)))
    return found


def range_request(start: float, end: float) -> str:
    """The request for an audio-visual caption of a time range."""
    return f"What happens between {format_timestamp(start)} and {format_timestamp(end)}?"


def range_caption(events: Sequence[Event], start: float, end: float) -> str:
    """The audio-visual caption of a time range that holds `events`."""
    seen = in_order(events, says_visual, NOTHING)
    heard = in_order(events, says_audio, SILENCE)
    return f"From {format_timestamp(start)} to {format_timestamp(end)}, we can see {seen}, and hear {heard}."


def moment_words(scene: Scene, interval: tuple[float, float] | None = None) -> list[str]:
    """The scene in words, four a moment (colour, shape, motion, sound): what a picture-and-sound prefix stands for.

    Moments outside `interval` (seconds) are told as "nothing nothing nothing silence": the description follows the time
    range that a question names, as the resampler is meant to.
    """
    words: list[str] = []
    for time in scene.moment_times(MOMENTS):
        inside = interval is None or interval[0] <= time <= interval[1]
        seen = scene.seen_at(time) if inside else None
        heard = scene.heard_at(time) if inside else None
        if seen is not None and seen.figure is not None:
            words += [seen.figure.color, seen.figure.shape, str(seen.motion)]
        else:
            words += [NOTHING] * 3
        words.append(says_audio(heard))
    return words
