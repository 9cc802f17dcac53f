"""Video-MME, 2,700 multiple-choice questions about 900 videos; for evaluation."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from input_pipeline.annotations.choices import answer_letter, choice_prompt, without_letters
from input_pipeline.annotations.importer import (
    Importer,
    Outcome,
    Refused,
    convert_rows,
    dialogue,
    entry,
    text_of,
)
from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.rows import Head, Row, RowError, json_rows
from input_pipeline.annotations.youtube import VIDEO_ID

DURATIONS = ("short", "medium", "long")
# What the older of the benchmark's scripts calls the three.
OLD_NAMES = {"duration": "duration_category", "domain": "video_category", "sub_category": "video_subcategory"}


@dataclasses.dataclass(frozen=True)
class VideoMme(Importer):
    """lmms-lab/Video-MME on Hugging Face, or the benchmark's own file of answers (MME-Benchmarks/Video-MME).

    Flat rows as JSON array or JSON lines (Hugging Face keeps them as parquet: `datasets.load_dataset(...)
    .to_json(...)` writes them): {"video_id", "duration", "domain", "sub_category", "url", "videoID",
    "question_id": "001-1", "task_type", "question", "options": ["A. ...", ...], "answer": "C"}. Or the nested
    form, a JSON array of {"video_id", "duration", "domain", "sub_category", "questions": [...]}; the template
    that the benchmark ships has trailing commas and is no JSON.

    Media: <videoID>.mp4; of a nested file, whose rows may have neither videoID nor url, <video_id>.mp4.

    The prompt is the benchmark's for questions without subtitles.
    """

    name: ClassVar[str] = "videomme"
    title: ClassVar[str] = "Video-MME"
    summary: ClassVar[str] = (
        "multiple-choice questions, for evaluation: rows as JSON or JSON lines, flat or nested"
    )
    fields: ClassVar[frozenset[str]] = frozenset({"video_id", "questions"})

    @classmethod
    def recognises(cls, head: Head) -> bool:
        flat = {"videoID", "question_id", "options", "task_type"}
        return cls.fields <= head.fields or flat <= head.fields

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        rows = json_rows(path, ("video_id", "duration|duration_category", "questions|options"))
        return convert_rows(rows, functools.partial(self._convert, files=files))

    def _convert(self, row: Row, files: MediaFiles) -> Iterator[Outcome]:
        video = row.values
        questions = video.get("questions", [video])
        if not isinstance(questions, list) or not questions:
            raise RowError(f"its questions are {str(questions)[:80]!r}; a list is expected")
        for question in questions:
            number = question.get("question_id") if isinstance(question, Mapping) else None
            try:
                if not isinstance(question, Mapping):
                    raise RowError(f"a question is no object but {str(question)[:80]!r}")
                yield self._question(video, question, files)
            except RowError as error:
                yield Refused(str(error), f"videomme-{number}" if number else "")

    def _question(self, video: Mapping[str, Any], question: Mapping[str, Any], files: MediaFiles) -> Outcome:
        about = {key: _either(video, key, old) for key, old in OLD_NAMES.items()}
        if about["duration"] not in DURATIONS:
            raise RowError(
                f"its duration is {about['duration']!r}; one of {', '.join(DURATIONS)} is expected"
            )
        question_id, task_type = text_of(question, "question_id"), text_of(question, "task_type")
        options = without_letters(question.get("options"))
        letter = answer_letter(question.get("answer"))
        path, _ = files.find(_names(video))
        extra: dict[str, Any] = {
            "qa_type": about["duration"],  # The rows of the benchmark's own table.
            "answer": letter,
            "options": options,
            "question_id": question_id,
            "task_type": task_type,
            "duration_class": about["duration"],
            "domain": about["domain"],
            "sub_category": about["sub_category"],
            "video_id": text_of(video, "video_id"),
        }
        turns = dialogue(choice_prompt(text_of(question, "question"), options), letter, "<video>")
        return entry(f"videomme-{question_id}", "video", path, "mcq", turns, **extra)


def _either(video: Mapping[str, Any], key: str, old: str) -> str:
    return text_of(video, key if key in video else old)


def _names(video: Mapping[str, Any]) -> list[str]:
    """Names that the video's files may have, without suffix."""
    url = re.search(rf"(?:v=|youtu\.be/)({VIDEO_ID.pattern})", str(video.get("url", "")))
    names = [video.get("videoID"), url[1] if url else None, text_of(video, "video_id")]
    return list(dict.fromkeys(str(name) for name in names if name))
