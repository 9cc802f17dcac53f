"""AudioCaps, captions of ten-second sounds of AudioSet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

from input_pipeline.annotations.importer import Importer, Outcome, convert_rows, dialogue, entry, text_of
from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.rows import Row, csv_rows
from input_pipeline.annotations.youtube import (
    BARE_IDS_HELP,
    check_bare_ids,
    check_video_id,
    locate,
    seconds,
)

REQUEST = "Describe what can be heard in this recording."
SECONDS = 10.0  # Length of AudioSet's segments.


@dataclasses.dataclass(frozen=True)
class AudioCaps(Importer):
    """cdjkim/audiocaps on GitHub, folder dataset: train.csv, val.csv or test.csv.

    Columns audiocap_id, youtube_id, start_time, caption; the clip is the ten seconds from start_time. The
    training file has one caption per clip, the others five, a row each: they become samples of one medium.

    Media: Y<id>.wav, <audiocap_id>.wav, <id>_<start>.wav and the like (see below); sound files go ahead
    of videos.
    """

    name: ClassVar[str] = "audiocaps"
    title: ClassVar[str] = "AudioCaps"
    summary: ClassVar[str] = "sounds with captions: train.csv, val.csv or test.csv of cdjkim/audiocaps"
    fields: ClassVar[frozenset[str]] = frozenset({"audiocap_id", "youtube_id", "start_time", "caption"})

    bare_ids: str = dataclasses.field(default="source", metadata={"help": BARE_IDS_HELP})

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        check_bare_ids(self.bare_ids)
        rows = csv_rows(path, ("audiocap_id", "youtube_id", "start_time", "caption"))
        return convert_rows(rows, functools.partial(self._convert, files=files))

    def _convert(self, row: Row, files: MediaFiles) -> Iterator[Outcome]:
        values = row.values
        caption, audiocap_id = text_of(values, "caption"), text_of(values, "audiocap_id")
        video_id, start = check_video_id(values["youtube_id"]), seconds(values["start_time"], "start_time")
        path, interval = locate(
            files,
            video_id,
            start,
            start + SECONDS,
            kinds=("audio", "video"),
            bare_ids=self.bare_ids,
            clips=(audiocap_id,),
        )
        turns = dialogue(REQUEST, caption, "<audio>")
        yield entry(f"audiocaps-{audiocap_id}", "audio", path, "audio_caption", turns, interval)
