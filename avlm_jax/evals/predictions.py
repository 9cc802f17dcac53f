"""Predictions and references as JSON lines: written whole, read strictly, errors with file and line."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from input_pipeline.errors import UserError

SCHEMA = 1


class PredictionError(UserError):
    """A file of predictions or references that cannot be used, or the two do not fit each other."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model answered to one item.

    Attributes:
        benchmark: name of the data set, e.g. the folder of its records.
        task: e.g. "mcq".
        item_key: names the item within the benchmark; joins it with its reference.
        video_id: the media file; items of one video are not independent.
        prompt: the question as it was put, without chat template.
        response: the answer as it came, not stripped of anything but control tokens.
        model: which parameters.
        decoding: e.g. {"method": "greedy", "max_new_tokens": 32}.
        n_frames: frames that were shown.
        modalities: what was shown, of "video", "audio".
        error: why there is no response; None if there is one.
    """

    benchmark: str
    task: str
    item_key: str
    video_id: str
    prompt: str
    response: str
    model: str
    decoding: Mapping[str, Any]
    n_frames: int
    modalities: tuple[str, ...]
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """The right answer of one multiple-choice item.

    Attributes:
        item_key: as in `Prediction`.
        video_id: the media file.
        answer: letter of the right option, "A", "B", ...
        options: their texts, without letters.
        type: kind of question, a column of its own in a report; empty for none.
    """

    item_key: str
    video_id: str
    answer: str
    options: tuple[str, ...]
    type: str = ""

    def __post_init__(self) -> None:
        letters = "ABCDEFGH"[: len(self.options)]
        if len(self.options) < 2 or len(self.answer) != 1 or self.answer not in letters:
            raise ValueError(
                f"answer {self.answer!r} is no letter of {len(self.options)} options ({letters})"
            )


Row = TypeVar("Row", Prediction, Reference)
_REQUIRED = {
    Prediction: {f.name for f in dataclasses.fields(Prediction)} - {"error"},
    Reference: {f.name for f in dataclasses.fields(Reference)} - {"type"},
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "decoding": dict,
    "n_frames": int,
    "modalities": list,
    "options": list,
    "error": (str, type(None)),
}
# Keys of finer-grained benchmarks that the schema allows and these scorers do not read.
_ALLOWED = {Prediction: {"schema", "question_id", "sentence_id"}, Reference: {"schema"}}


def write_rows(path: str | os.PathLike[str], rows: Iterable[Prediction | Reference]) -> None:
    """Writes JSON lines; the file appears complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8") as file:
        for row in rows:
            values = {"schema": SCHEMA, **dataclasses.asdict(row)}
            if values.get("error", "") is None:
                del values["error"]
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


def read_predictions(path: str | os.PathLike[str]) -> list[Prediction]:
    """Reads what `write_rows` wrote.

    Raises:
        PredictionError: naming file and line, for a line that is no JSON object, an unknown, missing or
            mistyped key, another schema, or an item that comes twice.
    """
    return _read(path, Prediction)


def read_references(path: str | os.PathLike[str]) -> list[Reference]:
    """Reads references; errors as `read_predictions`."""
    return _read(path, Reference)


def reference_of_sample(sample: Mapping[str, Any], video_id: str) -> Reference:
    """The reference in a sample of a record: extra keys "answer" (letter), "options" (texts), "qa_type".

    Raises:
        PredictionError: the sample is no multiple-choice question; its id is named.
    """
    try:
        kind = str(sample.get("qa_type", ""))
        return Reference(sample["id"], video_id, sample["answer"], tuple(sample["options"]), kind)
    except (KeyError, TypeError, ValueError) as error:
        raise PredictionError(
            f"sample {sample.get('id')!r} of task {sample.get('task')!r} is no multiple-choice question "
            f'({error}): its line needs "answer" (letter) and "options" (texts); name other --tasks'
        ) from None


def _read(path: str | os.PathLike[str], kind: type[Row]) -> list[Row]:
    rows: list[Row] = []
    seen: dict[str, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise PredictionError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            if any(rest.strip() for rest in lines[number:]):
                raise PredictionError(f"{path}, line {number}: is empty")
            continue
        row = _row(f"{path}, line {number}", line, kind)
        if row.item_key in seen:
            raise PredictionError(
                f"{path}, line {number}: item {row.item_key!r} stands in line {seen[row.item_key]} already"
            )
        seen[row.item_key] = number
        rows.append(row)
    if not rows:
        raise PredictionError(f"{path}: holds no line")
    return rows


def _row(where: str, line: str, kind: type[Row]) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise PredictionError(f"{where}: is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise PredictionError(f"{where}: is {type(values).__name__}, a JSON object is expected")
    names = {field.name for field in dataclasses.fields(kind)}
    missing = sorted((_REQUIRED[kind] | {"schema"}) - values.keys())
    unknown = sorted(values.keys() - names - _ALLOWED[kind])
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown key {unknown[0]!r}"
        raise PredictionError(f"{where}: {what}; keys are {', '.join(['schema', *sorted(names)])}")
    if values["schema"] != SCHEMA:
        raise PredictionError(f"{where}: has schema {values['schema']!r}, this program reads {SCHEMA}")
    fields = {name: values[name] for name in names & values.keys()}
    for name, value in fields.items():
        expected = _TYPES.get(name, str)
        if not isinstance(value, expected) or isinstance(value, bool):
            wanted = getattr(expected, "__name__", "str or null")
            raise PredictionError(f"{where}: {name!r} is {json.dumps(value)[:80]}; a {wanted} is expected")
        if isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                raise PredictionError(f"{where}: {name!r} must be a list of texts")
            fields[name] = tuple(value)
    try:
        return kind(**fields)
    except ValueError as error:
        raise PredictionError(f"{where}: {error}") from None
