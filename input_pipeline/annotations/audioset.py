"""AudioSet, ten-second sounds with labels. It has no captions: the answer names the labels."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, ClassVar

from input_pipeline.annotations.importer import Importer, Outcome, convert_rows, dialogue, entry
from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.rows import AnnotationError, Head, Row, RowError, WrongFile, csv_rows
from input_pipeline.annotations.youtube import (
    BARE_IDS_HELP,
    VIDEO_ID,
    check_bare_ids,
    check_video_id,
    locate,
    seconds,
)

REQUEST = "Name the sounds in this recording."
ANSWER = "Sounds: {}."  # Labels hold commas ("Male speech, man speaking"), so semicolons part them.
COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")
LABELS = "class_labels_indices.csv"


@dataclasses.dataclass(frozen=True)
class AudioSet(Importer):
    """research.google.com/audioset: unbalanced_train_segments.csv, balanced_train_segments.csv or
    eval_segments.csv, and class_labels_indices.csv (index, mid, display_name), which is looked for beside it.

    Three comment lines, then rows without a header: YTID, start_seconds, end_seconds, "mid,mid".

    Media: Y<id>.wav, <id>_<start>_<end>.flac and the like (see below); sound files go ahead of videos.
    """

    name: ClassVar[str] = "audioset"
    title: ClassVar[str] = "AudioSet"
    summary: ClassVar[str] = "sounds with labels: unbalanced_train_segments.csv and class_labels_indices.csv"
    fields: ClassVar[frozenset[str]] = frozenset(COLUMNS)

    labels: str = dataclasses.field(
        default="", metadata={"help": f"path of {LABELS} (default: beside the segments)"}
    )
    bare_ids: str = dataclasses.field(default="source", metadata={"help": BARE_IDS_HELP})

    @classmethod
    def recognises(cls, head: Head) -> bool:
        return len(head.first) == 4 and bool(VIDEO_ID.fullmatch(head.first[0])) and head.first[3][:1] == "/"

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        check_bare_ids(self.bare_ids)
        names = read_labels(self.labels or os.path.join(os.path.dirname(os.fspath(path)), LABELS))
        convert = functools.partial(self._convert, path=path, files=files, names=names)
        return convert_rows(csv_rows(path, (), names=COLUMNS, skip_space=True), convert)

    def _convert(self, row: Row, path: Any, files: MediaFiles, names: Mapping[str, str]) -> Iterator[Outcome]:
        values = row.values
        if row.number == 1 and not self.recognises(Head(frozenset(), tuple(values.values()))):
            first = ", ".join(values.values())[:80]
            raise WrongFile(f"{path}: its first row is {first!r}, not {', '.join(COLUMNS)}")
        video_id = check_video_id(values["YTID"])
        start, end = (seconds(values[key], key) for key in ("start_seconds", "end_seconds"))
        mids = [mid.strip() for mid in values["positive_labels"].split(",") if mid.strip()]
        unknown = [mid for mid in mids if mid not in names]
        if unknown or not mids:
            raise RowError(f"its label {unknown[0]!r} is not in {LABELS}" if unknown else "it has no label")
        name, interval = locate(files, video_id, start, end, kinds=("audio", "video"), bare_ids=self.bare_ids)
        turns = dialogue(REQUEST, ANSWER.format("; ".join(names[mid] for mid in mids)), "<audio>")
        line_id = f"audioset-{video_id}-{values['start_seconds'].strip()}"
        yield entry(line_id, "audio", name, "audio_caption", turns, interval, labels=mids)


def read_labels(path: str | PurePath) -> dict[str, str]:
    """mid -> display name of class_labels_indices.csv.

    Raises:
        AnnotationError: it is missing or no such file.
    """
    try:
        rows = list(csv_rows(path, ("mid", "display_name")))
    except AnnotationError as error:
        remedy = f"AudioSet's rows hold ids of labels only; put {LABELS} beside them or name it by labels="
        raise AnnotationError(f"{error}; {remedy}") from None
    if bad := next((row for row in rows if row.problem), None):
        raise AnnotationError(f"{path}, row {bad.number}: {bad.problem}")
    return {row.values["mid"]: row.values["display_name"] for row in rows}
