"""Scenes described in words, with many questions each: the text on which the demo's language model learns to read.

The stand-in for a released language model must be able to answer questions about a scene that it is told, before it ever
meets a picture or a sound. `describe` draws such texts; the caller raises `level` to the full six events.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from input_pipeline.synthetic.questions import LETTERS, STEMS, Question, boundary, make_questions
from input_pipeline.synthetic.scene import (
    NUM_EVENTS,
    Event,
    Scene,
    make_scene,
)
from input_pipeline.synthetic.tasks import (
    BRIEFLY,
    audio_in_order,
    moment_words,
    pairings,
    range_caption,
    range_request,
    visual_in_order,
)
from input_pipeline.transforms.intervals import format_timestamp


@dataclasses.dataclass(frozen=True)
class DescribedScene:
    """`words`: 64 words that describe the scene; `dialogue`: (question, answer) pairs about it."""

    words: list[str]
    dialogue: list[tuple[str, str]]


def _choices(rng: np.random.Generator, scene: Scene, asked: str, right: str) -> list[str]:
    values = sorted({str(getattr(e, asked)) for e in scene.events if getattr(e, asked) is not None} - {right})
    wrong = [values[int(i)] for i in rng.permutation(len(values))[:3]]
    options = [*wrong, right]
    return [options[int(i)] for i in rng.permutation(4)]


def pairing_dialogue(
    rng: np.random.Generator, scene: Scene, events: list[Event], open_share: float, prefix: str = ""
) -> list[tuple[str, str]]:
    """Which sound goes with which figure and back, for each pairing that is unique among `events`; in random order.

    Args:
        rng: source of order, options and form.
        scene: gives the cast from which wrong options are drawn (four figures, four sounds).
        events: what the description tells.
        open_share: how many of the questions have no options and are answered in words.
        prefix: stands before the stem ("Between ... and ..., ").
    """
    pairs: list[tuple[str, str]] = []
    for asked, given in (("sound", "figure"), ("figure", "sound")):
        for event in events:
            key = getattr(event, given)
            if (
                key is None
                or getattr(event, asked) is None
                or sum(getattr(e, given) == key for e in events) != 1
            ):
                continue
            stem = prefix + STEMS[asked].format(key)
            stem = stem[0].upper() + stem[1:]
            right = str(getattr(event, asked))
            if rng.random() < open_share:
                pairs.append((f"{stem}\n{BRIEFLY}", right))
                continue
            a, b, c, d = _choices(rng, scene, asked, right)
            question = Question(1, stem, (a, b, c, d), [a, b, c, d].index(right))
            pairs.append((question.text(), question.reply()))
    return [pairs[int(i)] for i in rng.permutation(len(pairs))]


def drills(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """Many small look-ups at once: what moves, what is heard, figure to sound, sound to figure; in random order.

    One question with four options teaches one look-up in fifty tokens; a drill teaches four in half as many.
    """
    pairs = []
    for request, answer in pairings(scene):
        items = answer.split(", ")
        pairs.append((request, ", ".join(items[int(i)] for i in rng.permutation(len(items)))))
    dialogue = [visual_in_order(scene), audio_in_order(scene), *pairs]
    return [dialogue[int(i)] for i in rng.permutation(len(dialogue))]


def describe(
    rng: np.random.Generator, level: int, max_questions: int = 6, drill_share: float = 0.0
) -> DescribedScene:
    """Draws a scene with `level` of its six events, described for the whole video or for one time range.

    Args:
        rng: source of everything.
        level: 1..6 events kept.
        max_questions: pairs in the dialogue.
        drill_share: how many of the scenes are followed by drills instead of questions.
    """
    scene = make_scene(int(rng.integers(2**31)))
    keep = sorted(int(i) for i in rng.permutation(NUM_EVENTS)[:level])
    told = dataclasses.replace(scene, events=tuple(scene.events[i] for i in keep))
    if rng.random() < drill_share:
        return DescribedScene(moment_words(told), drills(rng, told))
    open_share = 0.3
    kind = rng.random()
    if kind < 0.45:  # The whole video.
        dialogue = pairing_dialogue(rng, scene, list(told.events), open_share)
        extra: list[tuple[str, str]] = []
        if rng.random() < 0.25:
            extra.append(visual_in_order(told))
        if rng.random() < 0.25:
            extra.append(audio_in_order(told))
        if level == NUM_EVENTS and rng.random() < 0.3:
            extra += [(q.text(), q.reply()) for q in make_questions(scene) if q.type == 5]
        dialogue = [*extra, *dialogue]
        return DescribedScene(moment_words(told), _cut(rng, dialogue, max_questions))
    while True:  # A time range that starts and ends in pauses.
        first, last = sorted(int(i) for i in rng.choice(NUM_EVENTS + 1, size=2, replace=False))
        start, end = boundary(scene, first), boundary(scene, last)
        if start is not None and end is not None:
            break
    inside = [e for e in told.events if e in scene.events[first:last]]
    prefix = f"Between {format_timestamp(start)} and {format_timestamp(end)}, "
    dialogue = pairing_dialogue(rng, scene, inside, open_share, prefix)
    caption = (range_request(start, end), range_caption(inside, start, end))
    if not dialogue or rng.random() < 0.3:
        dialogue.insert(0, caption)
    return DescribedScene(moment_words(told, (start, end)), _cut(rng, dialogue, max_questions))


def _cut(rng: np.random.Generator, dialogue: list[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    chosen = sorted(int(i) for i in rng.permutation(len(dialogue))[:most])
    return [dialogue[i] for i in chosen]


def corpus(seed: int, scenes: int) -> list[str]:
    """Plain texts of `scenes` described scenes, for training a tokenizer."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(scenes):
        scene = describe(rng, NUM_EVENTS, drill_share=0.3)
        texts.append(" ".join(scene.words))
        for question, answer in scene.dialogue:
            texts += [question, answer]
    texts += [f"{letter}:" for letter in LETTERS]
    return texts
