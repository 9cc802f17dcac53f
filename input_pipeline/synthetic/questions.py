"""Five four-option questions about a scene, of SAVEn-Vid's five types, each needing picture and sound.

    1, 2  no time in the stem      which sound goes with a figure / which figure goes with a sound
    3, 4  a time range in the stem the same about the figure (sound) that occurs twice: only the time makes it unique
    5     options are time ranges  when a figure and a sound come together

What one modality alone can know is bounded by construction: knowing only the picture leaves all four sounds possible in
1 and 3 (and the other way round in 2 and 4), and in 5 two ranges fit the figure and two the sound.
`solver.py` computes those bounds.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from input_pipeline.synthetic.scene import Event, Scene
from input_pipeline.transforms.intervals import format_timestamp

LETTERS = "ABCD"
# An option that is a word or two is answered by its text, a time range by its letter: copying digits is not the task.
BY_TEXT = "Answer with the right option."
BY_LETTER = "Answer with the letter of the right option."
# How often the answer is the figure or sound that occurs twice. It is one of four candidates, so with 1/4 its being
# repeated tells a guesser with one modality nothing; more would leak the answer.
REPEATED_SHARE = 0.25
# How often a time range is drawn that holds so many events of the (repeated, single) figures or sounds asked
# for, when the answer is (the repeated one, a single one). A guesser with one modality knows the first pair,
# not the answer; the second is such that all candidates are about equally likely to it. With two single ones
# and one repeated that is 1/3 each; with all three single ones inside, the answer cannot be the repeated one.
# Two candidates are asked about seldom, yet not never: were scenes that allow nothing else left out, the order
# of events in the rest would give type 5 away.
RANGE_WEIGHTS = {(1, 2): (30, 30), (1, 3): (0, 30), (0, 3): (0, 30), (1, 1): (1, 2), (0, 2): (0, 1)}


@dataclasses.dataclass(frozen=True)
class Question:
    """A multiple-choice question; `type` 1..5 as above, `answer` indexes `options`."""

    type: int
    stem: str
    options: tuple[str, str, str, str]
    answer: int

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]

    @property
    def by_letter(self) -> bool:
        return self.type == 5

    def reply(self) -> str:
        """The right answer in the form that the instruction asks for: an option's text, or its letter."""
        return self.letter if self.by_letter else self.options[self.answer]

    def text(self) -> str:
        """The question as it is put to a model: stem, lettered options, instruction."""
        lines = [
            self.stem,
            *(f"{letter}: {option}" for letter, option in zip(LETTERS, self.options, strict=True)),
        ]
        return "\n".join([*lines, BY_LETTER if self.by_letter else BY_TEXT])


def _key(event: Event, channel: str) -> str | None:
    value = getattr(event, channel)
    return None if value is None else str(value)


def _times_seen(scene: Scene, channel: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for event in scene.events:
        key = _key(event, channel)
        if key is not None:
            counts[key] = counts.get(key, 0) + 1
    return counts


def _shuffled(
    rng: np.random.Generator, right: str, wrong: list[str]
) -> tuple[tuple[str, str, str, str], int]:
    options = [right, *wrong]
    order = [int(i) for i in rng.permutation(4)]
    a, b, c, d = (options[i] for i in order)
    return (a, b, c, d), order.index(0)


def _pick_answer(rng: np.random.Generator, scene: Scene, events: list[Event], channel: str) -> Event | None:
    """One of `events`, so that the answer on `channel` is the repeated one in REPEATED_SHARE of all questions."""
    counts = _times_seen(scene, channel)
    repeated = [e for e in events if counts[str(_key(e, channel))] > 1]
    single = [e for e in events if counts[str(_key(e, channel))] == 1]
    group = repeated if rng.random() < REPEATED_SHARE else single
    return group[int(rng.integers(len(group)))] if group else None


STEMS = {
    "sound": "which sound is heard while the {} moves?",
    "figure": "which figure moves while the {} is heard?",
}


def _pairing(rng: np.random.Generator, scene: Scene, asked: str, given: str) -> Question | None:
    """Types 1 and 2: `given` occurs once; what is it paired with on channel `asked`?"""
    counts = _times_seen(scene, given)
    events = [e for e in scene.events if e.figure and e.sound and counts[str(_key(e, given))] == 1]
    event = _pick_answer(rng, scene, events, asked)
    if event is None:
        return None
    right = str(_key(event, asked))
    options, answer = _shuffled(rng, right, sorted(set(_times_seen(scene, asked)) - {right}))
    stem = STEMS[asked].format(_key(event, given))
    return Question(1 if asked == "sound" else 2, stem[0].upper() + stem[1:], options, answer)


def boundary(scene: Scene, index: int) -> float | None:
    """The middle of the pause before event `index` (seconds); None where the event overlaps the one ahead of it."""
    before = scene.events[index - 1].end if index > 0 else 0.0
    after = scene.events[index].start if index < len(scene.events) else scene.duration
    return None if after < before else (before + after) / 2


def _ranges(scene: Scene) -> list[tuple[float, float, list[Event]]]:
    """(start, end, events inside) of each range that begins and ends in a pause and leaves something out."""
    found = []
    for first in range(len(scene.events)):
        for last in range(first + 1, len(scene.events) + 1):
            start, end = boundary(scene, first), boundary(scene, last)
            if start is not None and end is not None and last - first < len(scene.events):
                found.append((start, end, list(scene.events[first:last])))
    return found


def _pairing_in_range(rng: np.random.Generator, scene: Scene, asked: str, given: str) -> Question | None:
    """Types 3 and 4: `given` occurs twice; a time range in the stem says which occurrence is meant."""
    twice, counts = _times_seen(scene, given), _times_seen(scene, asked)
    drawn: list[tuple[str, float, float, Event]] = []
    weights: list[float] = []
    for start, end, inside in _ranges(scene):
        meant = [e for e in inside if _key(e, given) is not None and twice[str(_key(e, given))] == 2]
        if len(meant) != 1:
            continue
        keys = [str(_key(e, asked)) for e in inside if _key(e, asked) is not None]
        repeated = sum(counts[key] == 2 for key in keys)
        right = str(_key(meant[0], asked))
        weight = RANGE_WEIGHTS.get((repeated, len(keys) - repeated), (0.0, 0.0))[counts[right] == 1]
        if weight > 0:
            drawn.append((right, start, end, meant[0]))
            weights.append(weight)
    if not drawn:
        return None
    share = np.array(weights) / sum(weights)
    right, start, end, event = drawn[int(rng.choice(len(drawn), p=share))]
    options, answer = _shuffled(rng, right, sorted(set(counts) - {right}))
    stem = f"Between {format_timestamp(start)} and {format_timestamp(end)}, " + STEMS[asked].format(
        _key(event, given)
    )
    return Question(3 if asked == "sound" else 4, stem, options, answer)


def _when(rng: np.random.Generator, scene: Scene) -> Question:
    """Type 5: the event with the repeated figure and the repeated sound; distractors share one of the two."""
    figures, sounds = _times_seen(scene, "figure"), _times_seen(scene, "sound")
    target = next(
        e for e in scene.events if figures.get(str(e.figure)) == 2 and sounds.get(str(e.sound)) == 2
    )
    half = [
        e for e in scene.events if e is not target and (e.figure == target.figure or e.sound == target.sound)
    ]
    others = [e for e in scene.events if e is not target and e not in half]
    wrong = [*half, others[int(rng.integers(len(others)))]]
    spans = [f"{format_timestamp(e.start)} - {format_timestamp(e.end)}" for e in (target, *wrong)]
    options, answer = _shuffled(rng, spans[0], spans[1:])
    return Question(
        5, f"When does the {target.figure} move while the {target.sound} is heard?", options, answer
    )


def make_questions(scene: Scene, seed: int = 0) -> list[Question]:
    """The scene's questions, in order of type; a type that its timeline cannot ask without a leak is left out.

    Args:
        scene: the scene asked about.
        seed: another seed gives other questions of the same types.

    Returns:
        Up to five questions; types 3 and 4 are absent when no time range is ambiguous enough.
    """
    rng = np.random.default_rng([scene.seed, seed, 0x9E57])
    makers = (
        lambda: _pairing(rng, scene, "sound", "figure"),
        lambda: _pairing(rng, scene, "figure", "sound"),
        lambda: _pairing_in_range(rng, scene, "sound", "figure"),
        lambda: _pairing_in_range(rng, scene, "figure", "sound"),
        lambda: _when(rng, scene),
    )
    return [question for make in makers if (question := make()) is not None]
