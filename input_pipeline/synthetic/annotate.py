"""A scene in SAVEn-Vid's annotation form, and as lines of a training manifest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from input_pipeline.synthetic.described import pairing_dialogue
from input_pipeline.synthetic.questions import Question, boundary, make_questions
from input_pipeline.synthetic.render import FPS, frame_rate
from input_pipeline.synthetic.scene import NUM_EVENTS, Event, Scene
from input_pipeline.synthetic.tasks import (
    NOTHING,
    SILENCE,
    audio_in_order,
    pairings,
    range_caption,
    range_request,
    says_audio,
    says_visual,
    visual_in_order,
)
from input_pipeline.transforms.intervals import format_timestamp, parse_intervals

SOURCE = "synthetic"
# A stem that shares so many consecutive words with the right option gives it away.
SHARED_WORDS = 6
NUM_RANGE_CAPTIONS = 3
NUM_OPEN_WHOLE, NUM_OPEN_RANGE = 3, 3
EXTRA_DRAWS = 4  # Further seeds of `make_questions` for training.
_MANIFEST = 0x3A41  # Stream of the scene's random numbers.


@dataclasses.dataclass(frozen=True)
class Clip:
    """A stretch of the video around one event (seconds)."""

    start: float
    end: float
    event: Event


def clips(scene: Scene, fps: int = FPS) -> list[Clip]:
    """One clip per event. Where two events overlap the earlier clip ends one frame before the later one
    begins: clips do not overlap, and from there on the later event is the one in
    front."""
    frame = 1.0 / frame_rate(scene.duration, fps)
    found = []
    for index, event in enumerate(scene.events):
        end = min([event.end, *(later.start - frame for later in scene.events[index + 1 :])])
        found.append(Clip(event.start, round(end, 3), event))
    return found


def check(question: Question, duration: float) -> dict[str, bool]:
    """The checks of SAVEn-Vid's construction, each True when passed.

    Args:
        question: what is asked.
        duration: seconds of the video.
    """
    # Parsed without the video's bound, for a time beyond the end must not be moved inside before it is looked
    # at.
    stem_times = [t for span in parse_intervals(question.stem, 1e9, 8) for t in span]
    option_times = [parse_intervals(option, 1e9, 8) for option in question.options]
    if question.type == 5:
        options_fit = all(
            len(spans) == 1 and 0 <= spans[0][0] < spans[0][1] <= duration for spans in option_times
        )
    else:
        options_fit = not any(option_times)
    stem, right = _words(question.stem), _words(question.options[question.answer])
    return {
        "distinct_options": len({option.strip().lower() for option in question.options}) == 4,
        "stem_time": bool(stem_times) == (question.type in (3, 4)),
        "times_in_video": all(0 <= t <= duration for t in stem_times),
        "option_times": options_fit,
        "no_shared_words": not _grams(stem) & _grams(right),
    }


def _words(text: str) -> list[str]:
    return re.findall(r"[\w:.]+", text.lower())


def _grams(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def annotate(scene: Scene, questions: Sequence[Question], fps: int = FPS) -> dict[str, Any]:
    """The scene in SAVEn-Vid's form.

    Args:
        scene: the video.
        questions: what is asked about it.
        fps: as given to `generate.write_video`.

    Returns:
        {video_id, source, duration, fps, clips: [{start, end, visual, audio, av}], captions: {visual, audio,
        av}, qa: [{id, type, question, options, answer, checks}]}; start, end and duration in seconds, answer
        a letter.
    """
    rows = []
    whole: dict[str, list[str]] = {"visual": [], "audio": [], "av": []}
    for clip in clips(scene, fps):
        seen, heard = says_visual(clip.event), says_audio(clip.event)
        when = f"From {format_timestamp(clip.start)} to {format_timestamp(clip.end)}"
        captions = {
            "visual": f"{when}, we can see {seen}.",
            "audio": f"{when}, we can hear {heard}.",
            "av": range_caption([clip.event], clip.start, clip.end),
        }
        rows.append({"start": clip.start, "end": clip.end, **captions})
        # The captions of the whole video leave out what is vague: clips with nothing to see, or to hear.
        for kind, empty in (("visual", seen == NOTHING), ("audio", heard == SILENCE), ("av", False)):
            if not empty:
                whole[kind].append(captions[kind])
    return {
        "video_id": scene.id,
        "source": SOURCE,
        "duration": scene.duration,
        "fps": frame_rate(scene.duration, fps),
        "clips": rows,
        "captions": {kind: " ".join(sentences) for kind, sentences in whole.items()},
        "qa": [
            {
                "id": f"{scene.id}-q{question.type}",
                "type": question.type,
                "question": question.stem,
                "options": list(question.options),
                "answer": question.letter,
                "checks": check(question, scene.duration),
            }
            for question in questions
        ],
    }


def manifest_lines(scene: Scene, questions: Sequence[Question], video_path: str) -> list[dict[str, Any]]:
    """The scene's samples for every stage of the recipe, as lines of a manifest.

    Args:
        scene: the video.
        questions: its five questions; they become the task "mcq".
        video_path: as the lines name it, relative to the manifest's folder.

    Returns:
        One line per sample, by task: "visual_caption" and "audio_caption" (one each), "av_caption" (time
        ranges), "open_qa" (with and without a time range, answered in words), "mcq", and "mcq_extra" (other
        questions of the same types, for training). Multiple-choice lines also carry qa_type, answer (letter)
        and options.
    """
    rng = np.random.default_rng([scene.seed, _MANIFEST])
    lines: list[dict[str, Any]] = []

    def add(task: str, name: str, pair: tuple[str, str], **extra: Any) -> None:
        turns = [{"from": "human", "value": f"<video>\n{pair[0]}"}, {"from": "gpt", "value": pair[1]}]
        known = {"id": f"{scene.id}-{name}", "video": video_path, "task": task, "source": SOURCE}
        lines.append({**known, "conversations": turns, **extra})

    def add_question(task: str, name: str, question: Question) -> None:
        extra = {"qa_type": question.type, "answer": question.letter, "options": list(question.options)}
        add(task, name, (question.text(), question.reply()), **extra)

    add("visual_caption", "visual", visual_in_order(scene))
    add("audio_caption", "audio", audio_in_order(scene))
    for number, pair in enumerate(pairings(scene)):
        add("av_pairs", f"pairs{number}", pair)
    for number, (start, end, inside) in enumerate(_some_ranges(rng, scene, NUM_RANGE_CAPTIONS), start=1):
        add("av_caption", f"av{number}", (range_request(start, end), range_caption(inside, start, end)))
    for number, pair in enumerate(_open_questions(rng, scene), start=1):
        add("open_qa", f"open{number}", pair)
    for question in questions:
        add_question("mcq", f"q{question.type}", question)
    for number, question in enumerate(_extra_questions(scene, questions), start=1):
        add_question("mcq_extra", f"x{number}", question)
    return lines


def _some_ranges(rng: np.random.Generator, scene: Scene, most: int) -> list[tuple[float, float, list[Event]]]:
    """Up to `most` different time ranges that begin and end in pauses, with the events inside; short ones as
    likely as long ones."""
    found = []
    for first in range(NUM_EVENTS):
        for last in range(first + 1, NUM_EVENTS + 1):
            start, end = boundary(scene, first), boundary(scene, last)
            if start is not None and end is not None:
                found.append((start, end, list(scene.events[first:last])))
    return [found[int(i)] for i in rng.permutation(len(found))[:most]]


def _open_questions(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """Pairings asked for in words: some of the whole video, some of one time range each."""
    pairs = pairing_dialogue(rng, scene, list(scene.events), open_share=1.0)[:NUM_OPEN_WHOLE]
    ranged: list[tuple[str, str]] = []
    for start, end, inside in _some_ranges(rng, scene, len(scene.events) ** 2):
        if len(ranged) == NUM_OPEN_RANGE:
            break
        prefix = f"Between {format_timestamp(start)} and {format_timestamp(end)}, "
        ranged += pairing_dialogue(rng, scene, inside, open_share=1.0, prefix=prefix)[:1]
    return [*pairs, *ranged]


def _extra_questions(scene: Scene, questions: Sequence[Question]) -> list[Question]:
    """Questions of further seeds that differ from `questions` and each other in more than the order of
    options."""
    known = {(q.stem, frozenset(q.options)) for q in questions}
    extra = []
    for seed in range(1, EXTRA_DRAWS + 1):
        for question in make_questions(scene, seed=seed):
            key = (question.stem, frozenset(question.options))
            if key not in known:
                known.add(key)
                extra.append(question)
    return extra
