"""Rows of public annotation files, CSV or JSON, read as a stream; a bad row is told, a wrong file is an error."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from input_pipeline.errors import UserError
from input_pipeline.paths import to_path

CHUNK = 1 << 20  # characters
FIELD_LIMIT = (
    2**31 - 1
)  # Python's csv stops at 131072 characters a field; list cells of Panda-70M are longer.
SHOWN_FIELDS = 12
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        number: counted from 1; the header, comments and blank lines are no rows.
        values: by column name or JSON key.
        problem: why it has no values; "" if it has.
    """

    number: int
    values: Mapping[str, Any]
    problem: str = ""


class AnnotationError(UserError):
    """An annotation file or a media folder that cannot be used at all; bad rows are rejections instead."""


class WrongFile(AnnotationError):
    """The file is not of the data set it was given for: a column or key is missing."""


class RowError(Exception):
    """One row cannot be used; the message says why."""


def open_text(path: str | os.PathLike[str]) -> IO[str]:
    """Opens a file, or an object of a bucket (gs://), as UTF-8 text.

    Raises:
        AnnotationError: it cannot be opened.
    """
    try:
        # epath opens text without these options.
        return io.TextIOWrapper(to_path(path).open("rb"), encoding="utf-8-sig", newline="")
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror or error})") from None


# CSV


def csv_rows(
    path: str | os.PathLike[str],
    required: Sequence[str],
    *,
    names: Sequence[str] = (),
    skip_space: bool = False,
) -> Iterator[Row]:
    """Rows of a CSV file.

    Args:
        path: the file.
        required: columns that its header must name; none for a file without a header.
        names: of the columns, for a file without a header.
        skip_space: whether a blank behind a comma is no part of the field. Lines that begin with "#" ahead of
            the first row are then skipped as well (AudioSet).

    Raises:
        WrongFile: a column is missing.
        AnnotationError: the file cannot be read.
    """
    with open_text(path) as file:
        lines = _without_comments(file) if skip_space else file
        reader = _reader(lines, strict=True, skipinitialspace=skip_space)
        names = [name.strip() for name in names or _next_or_none(path, reader) or ()]
        for column in required:
            if column not in names:
                raise WrongFile(f"{path}: its header has no column {column!r} but {_shown(names)}")
        number = 0
        while True:
            began = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                number += 1
                if number == 1 and not required:
                    raise WrongFile(f"{path}: its first row is no CSV ({error})") from None
                yield Row(number, {}, f"is no CSV ({error}; it begins in line {began})")
                continue
            except UnicodeDecodeError as error:
                raise AnnotationError(f"{path}: is no UTF-8 text ({error.reason})") from None
            if fields is None:
                return
            if not fields:
                continue
            number += 1
            if len(fields) != len(names):
                if number == 1 and not required:
                    raise WrongFile(f"{path}: its first row has {len(fields)} fields, not {_shown(names)}")
                yield Row(number, {}, f"has {len(fields)} fields where {len(names)} are expected")
            else:
                yield Row(number, dict(zip(names, fields, strict=True)))


def _reader(lines: Iterable[str], **form: Any) -> Any:
    # Of the whole process: Python has no other.
    csv.field_size_limit(max(csv.field_size_limit(), FIELD_LIMIT))
    return csv.reader(lines, **form)


def _next_or_none(path: str | os.PathLike[str], reader: Iterator[list[str]]) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise WrongFile(f"{path}: is no CSV file ({error})") from None
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: is no UTF-8 text ({error.reason})") from None


def _without_comments(lines: IO[str]) -> Iterator[str]:
    ahead = True
    for line in lines:
        ahead = ahead and line.startswith("#")
        if not ahead:
            yield line


# JSON


def json_rows(path: str | os.PathLike[str], required: Sequence[str]) -> Iterator[Row]:
    """Objects of a JSON array or of JSON lines.

    Args:
        path: the file.
        required: keys of every object; "a|b" stands for either.

    Raises:
        WrongFile: the file is no JSON, or its first object lacks a key.
        AnnotationError: it cannot be read, or an array is damaged; the line is named.
    """
    with open_text(path) as file:
        try:
            start = file.read(CHUNK)
            kind = start.lstrip()[:1]
            if kind == "[":
                rows = _array_rows(path, file, start)
            elif kind == "{":
                file.seek(0)
                rows = _line_rows(path, file)
            else:
                raise WrongFile(
                    f"{path}: is neither a JSON array nor JSON lines, it begins with {start[:20]!r}"
                )
            for row in rows:
                if row.problem:
                    yield row
                elif not isinstance(row.values, Mapping):
                    yield Row(row.number, {}, f"is no JSON object but a {type(row.values).__name__}")
                elif lacking := _lacking(row.values, required):
                    if row.number == 1:
                        raise WrongFile(f"{path}: its objects have no {lacking} but {_shown(row.values)}")
                    yield Row(row.number, {}, f"has no {lacking}")
                else:
                    yield row
        except UnicodeDecodeError as error:
            raise AnnotationError(f"{path}: is no UTF-8 text ({error.reason})") from None


def _lacking(values: Mapping[str, Any], required: Sequence[str]) -> str:
    for key in required:
        if not any(name in values for name in key.split("|")):
            return " or ".join(repr(name) for name in key.split("|"))
    return ""


def _line_rows(path: str | os.PathLike[str], file: IO[str]) -> Iterator[Row]:
    number = 0
    for line in file:
        if not line.strip():
            continue
        number += 1
        try:
            yield Row(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            if number == 1:  # One object over many lines, or JSON that is damaged from the start.
                raise WrongFile(
                    f"{path}: its first line is no whole JSON object ({error}); a JSON array of objects or "
                    f"one object per line is expected{_comma_hint(line, error)}"
                ) from None
            yield Row(number, {}, f"is no JSON ({error})")


def _array_rows(path: str | os.PathLike[str], file: IO[str], text: str) -> Iterator[Row]:
    """Items of a JSON array; no more of it is held than a chunk and the item at hand."""
    decoder = json.JSONDecoder()
    at, line, number = text.index("[") + 1, 1, 0
    comma = False  # whether a comma stands behind the last item

    def more() -> bool:
        nonlocal text, at, line
        new = file.read(max(CHUNK, len(text) - at))  # Doubling: one long item is not parsed again and again.
        if new:
            line += text.count("\n", 0, at)
            text, at = text[at:] + new, 0
        return bool(new)

    def broken(what: str, position: int) -> AnnotationError:
        return AnnotationError(f"{path}, line {line + text.count(chr(10), 0, position)}: {what}")

    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            if not more():
                raise broken("the JSON array is not closed; is the file cut off?", at)
            continue
        if text[at] == "]":
            if comma:
                raise broken(f"is no JSON: {_COMMA}", at)
            return
        if number and not comma:
            if text[at] != ",":
                raise broken(f"is no JSON: a comma is expected, {text[at : at + 20]!r} was found", at)
            at, comma = at + 1, True
            continue
        try:
            item, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if more():
                continue
            position = getattr(error, "pos", at)
            message = getattr(error, "msg", str(error))
            raise broken(f"is no JSON ({message}){_comma_hint(text[:position], error)}", position) from None
        if end == len(text) and not isinstance(item, dict | list | str) and more():
            continue  # A number may go on in the next chunk.
        at, comma, number = end, False, number + 1
        yield Row(number, item)


_COMMA = (
    "a comma stands ahead of a closing bracket (Video-MME's own result template has such commas); "
    "write the file with a JSON library"
)


def _comma_hint(before: str, error: Exception) -> str:
    text = before[: getattr(error, "pos", len(before))].rstrip()
    return f": {_COMMA}" if text.endswith(",") or "trailing comma" in str(error) else ""


# What a file looks like


@dataclasses.dataclass(frozen=True)
class Head:
    """The beginning of a file, from which a data set is recognised.

    Attributes:
        fields: names of its columns, or keys of its first object.
        first: fields of its first row that is no comment, header or not.
    """

    fields: frozenset[str]
    first: tuple[str, ...] = ()


def read_head(path: str | os.PathLike[str]) -> Head:
    """What can be told of a file from its beginning; nothing of one that cannot be read."""
    try:
        with open_text(path) as file:
            text = file.read(CHUNK)
        if text.lstrip()[:1] in ("[", "{"):
            row = next(json_rows(path, ()), None)
            return Head(frozenset(row.values if row else ()))
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        first = next(_reader(lines, skipinitialspace=True), [])
    except (UserError, UnicodeDecodeError, csv.Error):
        return Head(frozenset())
    names = tuple(name.strip() for name in first)
    return Head(frozenset(names), names)


def _shown(names: Any) -> str:
    names = [str(name)[:40] for name in names]
    return ", ".join(names[:SHOWN_FIELDS]) + (", ..." if len(names) > SHOWN_FIELDS else "") or "none at all"
