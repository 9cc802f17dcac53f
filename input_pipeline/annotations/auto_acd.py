"""Auto-ACD, machine-made captions of sounds of AudioSet and VGGSound."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from input_pipeline.annotations.importer import Importer, Outcome, convert_rows, dialogue, entry, text_of
from input_pipeline.annotations.media_files import MediaFiles, kind_of
from input_pipeline.annotations.rows import Row, RowError, csv_rows
from input_pipeline.annotations.youtube import BARE_IDS_HELP, VIDEO_ID, check_bare_ids, locate

REQUEST = "What is to be heard in this recording, and where might it have been made?"
SECONDS = 10.0  # Length of AudioSet's and VGGSound's clips.
_TIMES = re.compile(r"_(\d+(?:\.\d+)?)(?:_\d+(?:\.\d+)?)?")


@dataclasses.dataclass(frozen=True)
class AutoAcd(Importer):
    """LoieSun/Auto-ACD on GitHub and Hugging Face: train.csv or test.csv.

    Columns youtube_id, caption. An id from VGGSound carries its start ("oPRC3zComfA_000117", LoieSun/Auto-ACD
    issue 1), one from AudioSet has none; either may have a 'Y' ahead. Ids may come twice, with two captions
    (issue 5): both are taken.

    Media: <youtube_id>.wav as the csv writes it, and every name below, with 'Y' and times or without:
    files are matched by the 11 characters of YouTube's id. Without a start in the csv and several clips of one
    video in the folder a row is refused. A file named by the id alone is taken as the clip.
    """

    name: ClassVar[str] = "auto_acd"
    title: ClassVar[str] = "Auto-ACD"
    summary: ClassVar[str] = "sounds with captions: train.csv of LoieSun/Auto-ACD"
    fields: ClassVar[frozenset[str]] = frozenset({"youtube_id", "caption"})

    bare_ids: str = dataclasses.field(default="clip", metadata={"help": BARE_IDS_HELP})

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        check_bare_ids(self.bare_ids)
        clips: dict[str, list[str]] = {}
        for stem, names in files.by_stem.items():
            if all(kind_of(name) == "image" for name in names):
                continue
            for video_id, _ in readings(stem):
                clips.setdefault(video_id, []).append(stem)
        rows = csv_rows(path, ("youtube_id", "caption"))
        return convert_rows(rows, functools.partial(self._convert, files=files, clips=clips))

    def _convert(self, row: Row, files: MediaFiles, clips: Mapping[str, list[str]]) -> Iterator[Outcome]:
        written, caption = text_of(row.values, "youtube_id"), text_of(row.values, "caption")
        known = readings(written)
        if not known:
            raise RowError(f"{written!r} holds no id of YouTube (11 letters, digits, '-' and '_')")
        path, interval = self._find(written, known, files, clips)
        turns = dialogue(REQUEST, caption, "<audio>")
        line_id = f"auto_acd-{row.number}-{written}"
        yield entry(line_id, "audio", path, "audio_caption", turns, interval)

    def _find(
        self,
        written: str,
        known: list[tuple[str, float | None]],
        files: MediaFiles,
        clips: Mapping[str, list[str]],
    ) -> tuple[str, tuple[float, float] | None]:
        kinds = ("audio", "video")
        for video_id, start in known:
            if start is None:
                stems = clips.get(video_id, [])
                if len(stems) > 1:
                    raise RowError(
                        f"its time is not told and {len(stems)} files are clips of it: {stems[:3]}"
                    )
                if stems and not (stems[0] == video_id and self.bare_ids == "source"):
                    return files.find(stems, kinds)[0], None
                if stems:
                    raise RowError(
                        f"{stems[0]} holds the whole video and the row does not tell the clip's time"
                    )
            elif video_id in clips:
                return locate(
                    files,
                    video_id,
                    start,
                    start + SECONDS,
                    kinds=kinds,
                    bare_ids=self.bare_ids,
                    clips=(written,),
                )
        names = " or ".join(dict.fromkeys(video_id for video_id, _ in known))
        files.find([written], kinds)  # Raises, unless the csv's own spelling is a file's.
        raise RowError(f"no sound or video below {files.root} is named by {names}")


def readings(text: str) -> list[tuple[str, float | None]]:
    """(id, start in seconds or None) for every way to read an id with an optional 'Y' ahead and times behind.

    >>> readings("Yoq3zComfA_0_000117")
    [('oq3zComfA_0', 117.0)]
    """
    found = []
    for offset in (0, 1) if text[:1] == "Y" else (0,):
        video_id, rest = text[offset : offset + 11], text[offset + 11 :]
        times = _TIMES.fullmatch(rest) if rest else None
        if VIDEO_ID.fullmatch(video_id) and (not rest or times):
            found.append((video_id, float(times[1]) if times else None))
    return found
