"""InternVid, clips of YouTube videos with captions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
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
from input_pipeline.annotations.rows import Row, json_rows
from input_pipeline.annotations.youtube import BARE_IDS_HELP, check_bare_ids, clock_seconds, locate

REQUEST = "What goes on in this part of the video? One sentence will do."


@dataclasses.dataclass(frozen=True)
class InternVid(Importer):
    """OpenGVLab/InternVid on Hugging Face: InternVid-10M-flt.jsonl, or another of its files.

    JSON lines of {"YoutubeID", "Start_timestamp": "00:00:10.677", "End_timestamp", "Caption", ...}. A row that
    repeats clip and caption of an earlier one is left out and counted.

    Media: <YoutubeID>_<Start_timestamp>_<End_timestamp>.mp4 and the names below, or the whole video
    as <YoutubeID>.mp4.
    """

    name: ClassVar[str] = "internvid"
    title: ClassVar[str] = "InternVid"
    summary: ClassVar[str] = "clips with captions: InternVid-10M-flt.jsonl"
    fields: ClassVar[frozenset[str]] = frozenset({"YoutubeID", "Start_timestamp", "End_timestamp", "Caption"})

    bare_ids: str = dataclasses.field(default="source", metadata={"help": BARE_IDS_HELP})

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        check_bare_ids(self.bare_ids)
        rows = json_rows(path, ("YoutubeID", "Start_timestamp", "End_timestamp", "Caption"))
        return convert_rows(rows, functools.partial(self._convert, files=files, seen=set()))

    def _convert(self, row: Row, files: MediaFiles, seen: set[bytes]) -> Iterator[Outcome]:
        values = row.values
        video_id, caption = text_of(values, "YoutubeID"), text_of(values, "Caption")
        first, last = values["Start_timestamp"], values["End_timestamp"]
        start, end = clock_seconds(first, "Start_timestamp"), clock_seconds(last, "End_timestamp")
        key = hashlib.blake2b(repr((video_id, start, end, caption)).encode(), digest_size=16).digest()
        if key in seen:
            yield LeftOut("same clip and caption as an earlier row")
            return
        seen.add(key)
        named = (f"{video_id}_{first}_{last}", f"{video_id}_{first}_{last}".replace(":", "-"))
        path, interval = locate(
            files, video_id, start, end, kinds=("video",), bare_ids=self.bare_ids, clips=named
        )
        turns = dialogue(REQUEST, caption, "<video>")
        yield entry(f"internvid-{row.number}-{video_id}", "video", path, "visual_caption", turns, interval)
