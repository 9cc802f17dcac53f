"""SAVEn-Vid and AVBench: captions of long videos by clip, and questions that need picture and sound.

Neither is released; the form below is this project's own, also written for synthetic videos
(`synthetic/annotate.py`). One object per video, in a JSON array or as JSON lines:

    {"video_id", "source": "VGGSound", "duration": s, "fps",
     "clips": [{"start": s, "end": s, "visual", "audio", "av"}], "captions": {"visual", "audio", "av"},
     "qa": [{"id", "type": 1..5, "question", "options": [4 texts], "answer": "A".."D", "checks": {name: bool},
             "review": {"status": "pending" | "accepted" | "rejected", "reason"}}]}

Types 1 and 2 name no time, 3 and 4 name one in the question, the options of 5 are time ranges (paper,
supplementary figure 10). "review" is AVBench's inspection by people; where it stands, only accepted questions
are taken.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from input_pipeline.annotations.choices import answer_letter, choice_prompt, option_texts
from input_pipeline.annotations.importer import (
    Importer,
    LeftOut,
    Outcome,
    Refused,
    convert_rows,
    dialogue,
    entry,
    text_of,
)
from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.rows import Row, RowError, json_rows
from input_pipeline.synthetic.tasks import range_request
from input_pipeline.transforms.intervals import format_timestamp

KEYS = ("video_id", "clips", "captions", "qa")
TASKS = {"visual": "visual_caption", "audio": "audio_caption", "av": "av_caption"}
# Of the whole video. Captions keep their times ("From 00:00:01.000 to ..."), so the request asks for them.
REQUESTS = {
    "visual": "Go through the video and say what can be seen, and when.",
    "audio": "Go through the video and say what can be heard, and when.",
    "av": "Go through the video and say what can be seen and heard, and when.",
}
# Of a clip; what happens in one is asked as in the synthetic recipe.
CLIP_REQUESTS: dict[str, Callable[[float, float], str]] = {
    "visual": lambda start, end: (
        f"What can be seen between {format_timestamp(start)} and {format_timestamp(end)}?"
    ),
    "audio": lambda start, end: (
        f"What can be heard between {format_timestamp(start)} and {format_timestamp(end)}?"
    ),
    "av": range_request,
}
ACCEPTED, STATUSES = "accepted", ("pending", "accepted", "rejected")
# A sample without its medium: (id, its line given the path of the video).
Part = tuple[str, Callable[[str], Outcome]]


@dataclasses.dataclass(frozen=True)
class SavenVid(Importer):
    """Annotations in the form above: every caption of the video and of its clips, and every question.

    Tasks: "visual_caption", "audio_caption", "av_caption" and "mcq", the last with the keys answer, options and
    qa_type that `avlm evaluate` reads. Media: <video_id>.mp4, whole videos: clips are named by their times.
    """

    name: ClassVar[str] = "saven_vid"
    title: ClassVar[str] = "SAVEn-Vid"
    summary: ClassVar[str] = (
        "audio-visual captions and questions: JSON in this project's form, also synthetic"
    )
    fields: ClassVar[frozenset[str]] = frozenset(KEYS)
    with_captions: ClassVar[bool] = True
    needs_review: ClassVar[bool] = False

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        return convert_rows(json_rows(path, KEYS), functools.partial(self._convert, files=files))

    def _convert(self, row: Row, files: MediaFiles) -> Iterator[Outcome]:
        video_id = text_of(row.values, "video_id")
        path, problem = "", ""
        try:
            path, _ = files.find([video_id])
        except (
            RowError
        ) as error:  # Every sample of the video is then refused on its own: the counts stay true.
            problem = str(error)
        for part in self._parts(row.values, video_id):
            if isinstance(part, Refused | LeftOut):
                yield part
            else:
                yield Refused(problem, part[0]) if problem else part[1](path)

    def _parts(self, values: Mapping[str, Any], video_id: str) -> Iterator[Part | Refused | LeftOut]:
        if self.with_captions:
            yield from self._captions(values, video_id)
        for number, question in enumerate(_list(values, "qa")):
            try:
                yield self._question(question, video_id)
            except RowError as error:
                name = question.get("id") if isinstance(question, Mapping) else None
                yield Refused(f"question {number + 1}: {error}", str(name or f"{video_id}-q{number + 1}"))

    def _captions(self, values: Mapping[str, Any], video_id: str) -> Iterator[Part | Refused]:
        whole = values["captions"]
        if not isinstance(whole, Mapping):
            raise RowError(f"its captions are {str(whole)[:80]!r}; an object is expected")
        for kind, task in TASKS.items():
            yield from _caption(whole, kind, f"{video_id}-{kind}", task, REQUESTS[kind])
        for number, clip in enumerate(_list(values, "clips"), start=1):
            name = f"{video_id}-clip{number}"
            times = (clip.get("start"), clip.get("end")) if isinstance(clip, Mapping) else (None, None)
            if not all(isinstance(t, int | float) for t in times) or not 0 <= times[0] < times[1]:
                yield Refused(f"clip {number} has no start and end: {str(clip)[:80]!r}", name)
                continue
            for kind, task in TASKS.items():
                yield from _caption(clip, kind, f"{name}-{kind}", task, CLIP_REQUESTS[kind](*times))

    def _question(self, question: Any, video_id: str) -> Part | LeftOut:
        if not isinstance(question, Mapping):
            raise RowError(f"is no object but {str(question)[:80]!r}")
        review = question.get("review")
        if review is not None or self.needs_review:
            status = review.get("status") if isinstance(review, Mapping) else None
            if status not in STATUSES:
                raise RowError(f"its review is {review!r}; a status of {', '.join(STATUSES)} is expected")
            if status != ACCEPTED:
                return LeftOut(f"review {status}")
        name, stem = text_of(question, "id"), text_of(question, "question")
        options = option_texts(question.get("options"))
        letter = answer_letter(question.get("answer"))
        if question.get("type") not in (1, 2, 3, 4, 5):
            raise RowError(f"its type is {question.get('type')!r}; 1 to 5 are known")
        extra = {"qa_type": question["type"], "answer": letter, "options": options, "video_id": video_id}
        return _part(name, "mcq", choice_prompt(stem, options), letter, **extra)


@dataclasses.dataclass(frozen=True)
class AvBench(SavenVid):
    """AVBench: the same form; only the questions, and of those only what people have accepted.

    A question without review is refused: nobody has looked at it. Media: <video_id>.mp4.
    """

    name: ClassVar[str] = "avbench"
    title: ClassVar[str] = "AVBench"
    summary: ClassVar[str] = "accepted questions of a file in SAVEn-Vid's form, for evaluation"
    with_captions: ClassVar[bool] = False
    needs_review: ClassVar[bool] = True


def _part(name: str, task: str, request: str, reply: str, **extra: Any) -> Part:
    turns = dialogue(request, reply, "<video>")
    return name, lambda path: entry(name, "video", path, task, turns, **extra)


def _caption(
    captions: Mapping[str, Any], kind: str, name: str, task: str, request: str
) -> Iterator[Part | Refused]:
    caption = captions.get(kind)
    if isinstance(caption, str) and caption.strip():
        yield _part(name, task, request, caption.strip())
    elif caption:  # Empty where nothing is to be seen or heard.
        yield Refused(f"its {kind} caption is {str(caption)[:80]!r}; a text is expected", name)


def _list(values: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(values[key], list):
        raise RowError(f"its {key} is no list but {str(values[key])[:80]!r}")
    return values[key]
