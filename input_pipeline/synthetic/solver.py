"""How far one modality gets: guessers that know everything the text, the picture or the sound tells, and the
statistics of the generator.

A guesser first strikes out options that its modality makes impossible (a sound not heard in the question's
time range). Among the rest it picks the likeliest: a conditional logit over what its modality tells about
each option (how often, at which place in time, beside what, how long, ...), singly, in pairs and all
together, fitted on one half of the scenes and tried on the other. A regularity of the generator that gives
answers away shows up as a rate above chance.

`answer` is the opposite: with both modalities and no statistics it finds the one option that fits, or proves
there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from input_pipeline.synthetic.questions import Question
from input_pipeline.synthetic.scene import COLORS, MOTIONS, SHAPES, SOUNDS, Scene
from input_pipeline.transforms.intervals import parse_intervals

MODALITIES = ("text", "picture", "sound")
SAME_TIME = 0.002  # Seconds: times are printed in milliseconds.
STEPS, RATE = 45, 0.1  # Of Adam on the whole half; few thousand questions need no more.
# The guessers that compete: pairs of features or all of them together, and weight decay.
GUESSERS = ((True, 1e-2), (False, 3e-3), (False, 3e-2))


@dataclasses.dataclass(frozen=True)
class Rate:
    """Share of right answers on the half of the scenes that the guesser was not fitted on.

    Attributes:
        overall: over all questions.
        by_type: question type -> share.
        n: questions behind `overall`.
    """

    overall: float
    by_type: dict[int, float]
    n: int

    def __str__(self) -> str:
        types = "  ".join(f"{kind}: {100 * share:.1f}" for kind, share in sorted(self.by_type.items()))
        return f"{100 * self.overall:.1f} % of {self.n} (by type {types})"


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one modality knows of an event: its span (seconds), who or which sound (`key`), and how it
    moves."""

    start: float
    end: float
    key: str
    motion: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A question taken apart by its text alone."""

    type: int
    asked: str  # "sound", "figure" or "time"
    figure: str | None  # named in the stem
    sound: str | None
    span: tuple[float, float] | None  # of the stem
    spans: tuple[tuple[float, float], ...]  # of the options, type 5


def view(scene: Scene, modality: str) -> list[Seen]:
    """The scene's events as far as "picture" or "sound" shows them, in order; nothing for "text"."""
    if modality == "picture":
        return [Seen(e.start, e.end, str(e.figure), str(e.motion)) for e in scene.events if e.figure]
    if modality == "sound":
        return [Seen(e.start, e.end, e.sound, "") for e in scene.events if e.sound]
    return []


def read(question: Question) -> Task:
    """Takes a question apart; only its words are looked at."""
    stem = question.stem
    figure = next((f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" in stem), None)
    sound = next((s for s in SOUNDS if f"the {s} is heard" in stem), None)
    inside = parse_intervals(stem, 1e9, 8)
    spans = tuple(span for option in question.options for span in parse_intervals(option, 1e9, 8))
    asked = "time" if len(spans) == 4 else "sound" if figure is not None else "figure"
    return Task(question.type, asked, figure, sound, inside[0] if inside else None, spans)


def _within(event: Seen, span: tuple[float, float] | None) -> bool:
    return span is None or (event.start >= span[0] - SAME_TIME and event.end <= span[1] + SAME_TIME)


def _at(events: Sequence[Seen], span: tuple[float, float]) -> int | None:
    """Index of the event that fills `span`."""
    for index, event in enumerate(events):
        if abs(event.start - span[0]) <= SAME_TIME and abs(event.end - span[1]) <= SAME_TIME:
            return index
    return None


def possible(question: Question, events: Sequence[Seen], modality: str) -> list[bool]:
    """Which options the modality cannot rule out; logic alone, no statistics."""
    task = read(question)
    named = {"picture": task.figure, "sound": task.sound}.get(modality)
    shows = {"picture": "figure", "sound": "sound"}.get(modality)
    allowed = []
    for number, option in enumerate(question.options):
        if modality == "text":
            allowed.append(True)
        elif task.asked == "time":
            index = _at(events, task.spans[number])
            allowed.append(index is not None and events[index].key == named)
        elif task.asked == shows:
            allowed.append(any(e.key == option and _within(e, task.span) for e in events))
        else:
            allowed.append(True)
    return allowed


def answer(scene: Scene, question: Question) -> int:
    """The option that picture and sound together single out.

    Raises:
        ValueError: none fits, or several do.
    """
    task = read(question)
    fits = []
    for number, option in enumerate(question.options):
        figure = option if task.asked == "figure" else task.figure
        sound = option if task.asked == "sound" else task.sound
        span = task.spans[number] if task.asked == "time" else task.span
        together = (e for e in scene.events if str(e.figure) == figure and e.sound == sound)
        if any(_within(Seen(e.start, e.end, "", ""), span) for e in together):
            fits.append(number)
    if len(fits) != 1:
        raise ValueError(f"{scene.id}: {len(fits)} options fit {question.stem!r} {question.options}")
    return fits[0]


def _gap(before: float, after: float, unit: float) -> int:
    """Bucket of a pause: 0 none because the events overlap, 1..6 longer and longer in units of a typical
    pause."""
    return 0 if after < before else 1 + min(int(2 * (after - before) / unit), 5)


def _option_features(
    task: Task, question: Question, number: int, events: Sequence[Seen], length: float
) -> list[int]:
    """What a modality tells about one option, as small integers; always equally many."""
    option = question.options[number]
    if task.asked == "time":
        return [number, *_span_features(task, number, events, length)]
    words = {w: i for i, w in enumerate((*SOUNDS, *COLORS))}
    given = (task.figure or task.sound or "").split()[0]
    rank = sorted(question.options).index(option)
    own = [i for i, e in enumerate(events) if e.key == option]
    inside = [i for i in own if _within(events[i], task.span)]
    look = (inside or own)[0] if own else None
    base = [number, rank, words[option.split()[0]], words[given], len(own), len(inside)]
    everyone = [i for i, e in enumerate(events) if _within(e, task.span)]
    crowd = len({events[i].key for i in everyone})
    if look is None:
        return [*base, crowd, *[0] * (5 + NUM_NEIGHBOUR_FEATURES)]
    edges = 0
    if task.span is not None:
        # Does the range begin and end midway between events of this modality, or did another event shape it?
        starts = [((events[i - 1].end if i else 0.0) + events[i].start) / 2 for i in range(len(events))]
        ends = [*starts[1:], (events[-1].end + length) / 2]
        edges += any(abs(task.span[0] - s) <= SAME_TIME for s in starts)
        edges += 2 * any(abs(task.span[1] - e) <= SAME_TIME for e in ends)
    other = [events[i].key for i in everyone].count(events[look].key)
    place = everyone.index(look) if look in everyone else 0
    last = len(everyone) - 1 - place
    motion = MOTIONS.index(events[look].motion) if events[look].motion else 0
    return [*base, crowd, edges, other, place, last, motion, *_neighbour_features(events, look, length)]


NUM_NEIGHBOUR_FEATURES = 6


def _neighbour_features(events: Sequence[Seen], index: int, length: float) -> list[int]:
    """Where in time an event stands, how long it is, what comes before and after it and how far off."""
    counts = [sum(o.key == e.key for o in events) for e in events]
    unit = length / 16
    before = events[index - 1].end if index else 0.0
    after = events[index + 1].start if index + 1 < len(events) else length
    event = events[index]
    return [
        index,
        min(int((event.end - event.start) / unit / 0.1) % 32, 31) // 2,
        _gap(before, event.start, unit),
        _gap(event.end, after, unit),
        counts[index - 1] if index else 0,
        counts[index + 1] if index + 1 < len(events) else 0,
    ]


def _span_features(task: Task, number: int, events: Sequence[Seen], length: float) -> list[int]:
    """About an option that is a time range: its place among the ranges and among the events."""
    order = sorted(range(4), key=lambda i: task.spans[i])
    rank = order.index(number)
    start, end = task.spans[number]
    unit = (end - start) / 2.3  # An event lasts about 2.3 moments: the text alone shows the scale too.
    earlier = _gap(task.spans[order[rank - 1]][1], start, unit) if rank else 7
    later = _gap(end, task.spans[order[rank + 1]][0], unit) if rank < 3 else 7
    total = task.spans[order[3]][1] - task.spans[order[0]][0]
    lengths = sorted(e - s for s, e in task.spans)
    base = [
        rank,
        earlier,
        later,
        min(int(start / unit), 15),
        min(int(total / unit), 15),
        lengths.index(end - start),
    ]
    shown = [_at(events, span) for span in task.spans]
    index = shown[number]
    if index is None:
        return [*base, *[0] * (4 + NUM_NEIGHBOUR_FEATURES)]
    own = [i for i, e in enumerate(events) if e.key == events[index].key]

    def role(i: int) -> int:
        """Neighbour `i` on this modality: 0 none, 1 of the same key, 2 another option, 3 no option."""
        if not 0 <= i < len(events):
            return 0
        return 1 if events[i].key == events[index].key else 2 if i in shown else 3

    visible = sum(i is not None for i in shown)
    extra = [own.index(index), role(index - 1), role(index + 1), visible]
    return [*base, *extra, *_neighbour_features(events, index, length)]


def _encode(features: np.ndarray, pairs: bool) -> tuple[np.ndarray, int]:
    """Integers [n 4 f] -> indices [n 4 k] into one weight vector, and its length: each value alone, and
    either each pair of values or all together."""
    n, options, width = features.shape
    columns = [features[..., i] for i in range(width)]
    sizes = [int(c.max()) + 1 for c in columns]
    if pairs:
        for i in range(width):
            for j in range(i + 1, width):
                columns.append(columns[i] * sizes[j] + columns[j])
                sizes.append(sizes[i] * sizes[j])
    else:
        rows, joint = np.unique(features.reshape(n * options, width), axis=0, return_inverse=True)
        columns.append(joint.reshape(n, options))
        sizes.append(len(rows))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return np.stack([c + o for c, o in zip(columns, offsets, strict=False)], axis=-1), int(offsets[-1])


def _fit(index: np.ndarray, size: int, allowed: np.ndarray, right: np.ndarray, decay: float) -> np.ndarray:
    """Weights [size] of a conditional logit over four options: Adam on the mean log-likelihood with decay."""
    weights, first, second = np.zeros(size), np.zeros(size), np.zeros(size)
    n = len(right)
    target = np.eye(4)[right]
    flat = index.reshape(-1)
    for step in range(1, STEPS + 1):
        error = _softmax(weights, index, allowed) - target
        gradient = np.bincount(flat, np.repeat(error.reshape(-1), index.shape[-1]), minlength=size) / n
        gradient += decay * weights
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        weights -= RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-4)
    return weights


def _softmax(weights: np.ndarray, index: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    logits = np.where(allowed, weights[index].sum(axis=-1), -1e9)
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def guess_rates(scenes_and_questions: Sequence[tuple[Scene, Sequence[Question]]]) -> dict[str, Rate]:
    """What guessers with one modality reach.

    For each type of question several guessers compete (GUESSERS), and the best on the unseen half counts:
    rates err upwards, by about a percentage point at a thousand questions a type.

    Args:
        scenes_and_questions: at least a few hundred scenes with their questions; thousands for sharp figures.

    Returns:
        {"text": Rate, "picture": Rate, "sound": Rate}.
    """
    scenes = list(scenes_and_questions)
    rates = {}
    for modality in MODALITIES:
        hits: dict[int, tuple[int, float]] = {}
        for kind in sorted({q.type for _, questions in scenes for q in questions}):
            chosen = [
                (i, s, q) for i, (s, questions) in enumerate(scenes) for q in questions if q.type == kind
            ]
            hits[kind] = _hit_rate(chosen, modality)
        n = sum(count for count, _ in hits.values())
        overall = sum(count * share for count, share in hits.values()) / n
        rates[modality] = Rate(overall, {kind: share for kind, (_, share) in hits.items()}, n)
    return rates


def _hit_rate(chosen: Sequence[tuple[int, Scene, Question]], modality: str) -> tuple[int, float]:
    """(questions tried, share right) of the best guesser on questions of one type; even scenes teach, odd
    ones test."""
    features, allowed = [], []
    for _, scene, question in chosen:
        events, task = view(scene, modality), read(question)
        features.append([_option_features(task, question, i, events, scene.duration) for i in range(4)])
        allowed.append(possible(question, events, modality))
    right = np.array([q.answer for _, _, q in chosen])
    even = np.array([i % 2 == 0 for i, _, _ in chosen])
    mask = np.array(allowed)
    if not mask[np.arange(len(right)), right].all():
        raise ValueError(f"the {modality} alone rules out a right answer: question and scene disagree")
    best = 0.0
    for pairs, decay in GUESSERS:
        index, size = _encode(np.array(features), pairs)
        weights = _fit(index[even], size, mask[even], right[even], decay)
        odds = _softmax(weights, index[~even], mask[~even])
        # A tie is a random pick among the tied.
        top = np.isclose(odds, odds.max(axis=-1, keepdims=True), atol=1e-9)
        share = top[np.arange(len(odds)), right[~even]] / top.sum(axis=-1)
        best = max(best, float(share.mean()))
    return int((~even).sum()), best
