"""What every importer is: options and a way from the rows of a public file to lines of a native manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.rows import Head, Row, RowError


@dataclasses.dataclass(frozen=True)
class Refused:
    """A row, or a part of one, that cannot be used."""

    reason: str
    id: str = ""


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A row, or a part of one, that an option left out; counted by reason."""

    reason: str


# A line of a native manifest as an object (see manifest.py), or why there is none.
Outcome = dict[str, Any] | Refused | LeftOut


@dataclasses.dataclass(frozen=True)
class Importer:
    """Base of the importers. A data set's options are the fields of its class, each with a default.

    Attributes:
        name: what --dataset calls it.
        title: what the field calls it.
        summary: one line: which file it reads.
        fields: columns or keys by which its files are recognised.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    fields: ClassVar[frozenset[str]]

    def read(self, path: Path | str, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        """("row 7", outcome) for every sample of the file at `path`, in order.

        Raises:
            AnnotationError: the file, an option or a file beside it cannot be used.
        """
        raise NotImplementedError

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """Whether a file that begins so may be of this data set."""
        return cls.fields <= head.fields


def convert_rows(
    rows: Iterable[Row], convert: Callable[[Row], Iterable[Outcome]]
) -> Iterator[tuple[str, Outcome]]:
    """`convert` of every row; a RowError refuses the row."""
    for row in rows:
        where = f"row {row.number}"
        if row.problem:
            yield where, Refused(row.problem)
            continue
        try:
            for outcome in convert(row):
                yield where, outcome
        except RowError as error:
            yield where, Refused(str(error))


def dialogue(request: str, answer: str, placeholder: str) -> list[dict[str, str]]:
    """One question about a medium and its answer; the medium stands ahead of the question."""
    return [
        {"from": "human", "value": f"{placeholder}\n{request}"},
        {"from": "gpt", "value": answer},
    ]


def entry(
    line_id: str,
    kind: str,
    path: str,
    task: str,
    conversations: list[dict[str, str]],
    interval: tuple[float, float] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """A line of a native manifest; "source" is added by `import_annotations`."""
    line = {"id": line_id, kind: path, "task": task, "conversations": conversations, **extra}
    if interval is not None:
        line["interval"] = list(interval)
    return line


def text_of(values: Any, key: str) -> str:
    """The text under `key` without blanks around it; RowError if there is none."""
    value = values.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"its {key} is {value!r}; a text is expected")
    return value.strip()
