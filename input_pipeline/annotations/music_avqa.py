"""MUSIC-AVQA, questions about videos of music, answered in a word; for evaluation."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar

from input_pipeline.annotations.importer import (
    Importer,
    LeftOut,
    Outcome,
    convert_rows,
    dialogue,
    entry,
    text_of,
)
from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.rows import Row, RowError, json_rows

INSTRUCTION = "Answer in one word or a short phrase."
# The nine kinds of question there are (counted in the test file).
CELLS = {
    "Audio": ("Counting", "Comparative"),
    "Visual": ("Counting", "Location"),
    "Audio-Visual": ("Existential", "Counting", "Location", "Comparative", "Temporal"),
}
_SLOT = re.compile(r"<[A-Za-z]+>")


@dataclasses.dataclass(frozen=True)
class MusicAvqa(Importer):
    """GeWu-Lab/MUSIC-AVQA on GitHub: data/json/avqa-test.json (9,185 questions), or data/json_update (9,129).

    A JSON array of {"video_id", "question_id", "type": '["Audio-Visual", "Temporal"]', "question_content":
    "Where is the <FL> sounding instrument?", "templ_values": '["first"]', "question_deleted": 0, "anser"}.
    Slots are filled from left to right, one value each. Question ids repeat in the older file, with other
    answers, so samples are named by their place in the file, counted from 0 ("music_avqa-17").

    Media: <video_id>.mp4.

    Samples of the task "open_qa" carry answer (as the file spells it: "acoustic_guitar"), qa_type
    ("Audio-Visual Temporal"), question_id, video_id and the filled question; in the conversation underscores
    are blanks. There is no official wording of the request for a language model; this one is our own.
    """

    name: ClassVar[str] = "music_avqa"
    title: ClassVar[str] = "MUSIC-AVQA"
    summary: ClassVar[str] = "questions about music, for evaluation: avqa-test.json"
    fields: ClassVar[frozenset[str]] = frozenset({"video_id", "question_content", "templ_values", "anser"})

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        keys = ("video_id", "question_id", "type", "question_content", "templ_values", "anser")
        return convert_rows(json_rows(path, keys), functools.partial(self._convert, files=files))

    def _convert(self, row: Row, files: MediaFiles) -> Iterator[Outcome]:
        values = row.values
        if values.get("question_deleted"):
            yield LeftOut("question_deleted")
            return
        kind = _texts(values["type"], "type")
        if len(kind) != 2 or kind[1] not in CELLS.get(kind[0], ()):
            raise RowError(f"its type is {values['type']!r}, none of the nine that exist")
        question = fill(text_of(values, "question_content"), _texts(values["templ_values"], "templ_values"))
        answer, video_id = text_of(values, "anser"), text_of(values, "video_id")
        path, _ = files.find([video_id])
        extra = {
            "answer": answer,
            "qa_type": " ".join(kind),
            "question": question,
            "question_id": values["question_id"],
            "video_id": video_id,
        }
        turns = dialogue(f"{question.replace('_', ' ')}\n{INSTRUCTION}", answer.replace("_", " "), "<video>")
        yield entry(f"music_avqa-{row.number - 1}", "video", path, "open_qa", turns, **extra)


def fill(question: str, values: list[str]) -> str:
    """The question with its slots filled from left to right; slots of one name may get different values.

    >>> fill("Is the <Object> on the <LR> louder than the <Object> on the <LR>？ ", ["cello", "left", "cello", "right"])
    'Is the cello on the left louder than the cello on the right?'

    Raises:
        RowError: there are more slots than values or the other way round.
    """
    slots = len(_SLOT.findall(question))
    if slots != len(values):
        raise RowError(f"its question has {slots} slots but {len(values)} templ_values")
    rest = iter(values)
    filled = _SLOT.sub(lambda _: next(rest).strip(), question)
    return filled.replace("\uff1f", "?").strip()  # The full-width mark stands in some of the templates.


def _texts(value: Any, what: str) -> list[str]:
    """A list of texts, or the JSON text of one."""
    try:
        items = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise RowError(f"its {what} is {value!r}; the JSON text of a list of texts is expected")
    return items
