"""Auto-ACD, machine-made captions of sounds of AudioSet and VGGSound."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, ClassVar

from input_pipeline.annotations.importer import Importer, Outcome, convert_rows, dialogue, entry, text_of
from input_pipeline.annotations.media_files import MediaFiles, kind_of
from input_pipeline.annotations.rows import Row, RowError, csv_rows
from input_pipeline.annotations.youtube import BARE_IDS_HELP, VIDEO_ID, check_bare_ids, clip_stems, locate

REQUEST = "What is to be heard in this recording, and where might it have been made?"
SECONDS = 10.0  # Length of AudioSet's and VGGSound's clips.
KINDS = ("audio", "video")  # The preferred one first.
_TIMES = re.compile(r"_(\d+(?:\.\d+)?)(?:_\d+(?:\.\d+)?)?")


@dataclasses.dataclass(frozen=True)
class AutoAcd(Importer):
    """LoieSun/Auto-ACD on GitHub and Hugging Face: train.csv or test.csv.

    Columns youtube_id, caption. An id from VGGSound carries its start ("oPRC3zComfA_000117", LoieSun/Auto-ACD
    issue 1), one from AudioSet has none; either may have a 'Y' ahead. Ids may come twice, with two captions
    (issue 5): both are taken.

    Media: <youtube_id>.wav as the csv writes it, and every name below, with 'Y' and times or without:
    files are matched by the 11 characters of YouTube's id. A file named by the id alone is taken as the clip. A
    row without a start takes that, or else the only clip of the video that no row with a start names; with several
    it is refused. A row with a start takes no file that a row without one names.
    """

    name: ClassVar[str] = "auto_acd"
    title: ClassVar[str] = "Auto-ACD"
    summary: ClassVar[str] = "sounds with captions: train.csv of LoieSun/Auto-ACD"
    fields: ClassVar[frozenset[str]] = frozenset({"youtube_id", "caption"})

    bare_ids: str = dataclasses.field(default="clip", metadata={"help": BARE_IDS_HELP})

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        check_bare_ids(self.bare_ids)
        columns = ("youtube_id", "caption")
        # The file is read twice: which clip is whose is known when all rows are.
        clips = _Clips.of(files, csv_rows(path, columns))
        return convert_rows(
            csv_rows(path, columns), functools.partial(self._convert, files=files, clips=clips)
        )

    def _convert(self, row: Row, files: MediaFiles, clips: _Clips) -> Iterator[Outcome]:
        written, caption = text_of(row.values, "youtube_id"), text_of(row.values, "caption")
        known = reading(written)
        if known is None:
            raise RowError(f"{written!r} holds no id of YouTube (11 letters, digits, '-' and '_')")
        video_id, start = known
        if video_id not in clips.stems:
            raise RowError(f"no sound or video below {files.root} is named by {video_id}")
        if start is None:
            path, interval = files.find([self._stem(written, video_id, clips)], KINDS)[0], None
        else:
            path, interval = self._locate(written, video_id, start, files, clips)
        turns = dialogue(REQUEST, caption, "<audio>")
        line_id = f"auto_acd-{row.number}-{written}"
        yield entry(line_id, "audio", path, "audio_caption", turns, interval)

    def _stem(self, written: str, video_id: str, clips: _Clips) -> str:
        """The file of a row without a start: of the same name, or the only clip that is no other row's."""
        stems = clips.stems[video_id]
        for stem in (written, f"Y{video_id}", video_id):
            if stem in stems and not (stem == video_id and self.bare_ids == "source"):
                return stem
        if video_id in stems:
            raise RowError(f"{video_id} holds the whole video and the row does not tell the clip's time")
        free = [stem for stem in stems if stem not in clips.named]
        if not free:
            raise RowError(f"its time is not told and {stems[0]} is the clip of a row that tells it")
        if len(free) > 1:
            raise RowError(f"its time is not told and {len(free)} files are clips of it: {free[:3]}")
        return free[0]

    def _locate(
        self, written: str, video_id: str, start: float, files: MediaFiles, clips: _Clips
    ) -> tuple[str, tuple[float, float] | None]:
        path, interval = locate(
            files,
            video_id,
            start,
            start + SECONDS,
            kinds=KINDS,
            bare_ids=self.bare_ids,
            clips=(written,),
        )
        timed = reading(PurePosixPath(path).stem) != (video_id, None)
        if interval is None and not timed and video_id in clips.without_start:
            raise RowError(f"{path} is the clip of a row without a start, and no other file is this row's")
        return path, interval


@dataclasses.dataclass
class _Clips:
    """What is known of each video's clips.

    Attributes:
        stems: names of its files, without suffix, by YouTube's id.
        named: those with a start that a row tells.
        without_start: ids of rows that tell no start.
    """

    stems: dict[str, list[str]]
    named: set[str]
    without_start: set[str]

    @classmethod
    def of(cls, files: MediaFiles, rows: Iterable[Row]) -> _Clips:
        """Files and rows together; rows without a file, and bad ones, say nothing."""
        clips = cls({}, set(), set())
        for stem, names in files.by_stem.items():
            known = reading(stem)
            if known and any(kind_of(name) != "image" for name in names):
                clips.stems.setdefault(known[0], []).append(stem)
        for row in rows:
            known = reading(str(row.values.get("youtube_id", "")).strip())
            if known is None or known[0] not in clips.stems:
                continue
            video_id, start = known
            if start is None:
                clips.without_start.add(video_id)
            else:
                names = {row.values["youtube_id"].strip(), *clip_stems(video_id, start, start + SECONDS)}
                clips.named.update(names.intersection(clips.stems[video_id]) - {f"Y{video_id}"})
        return clips


def reading(text: str) -> tuple[str, float | None] | None:
    """(id, start in seconds or None) of an id with an optional 'Y' ahead and times behind; None if it is none.

    There is no text with two readings: behind the id stands nothing or a '_' and a digit, in one place.

    >>> reading("Yoq3zComfA_0_000117")
    ('oq3zComfA_0', 117.0)
    """
    for offset in (0, 1) if text[:1] == "Y" else (0,):
        video_id, rest = text[offset : offset + 11], text[offset + 11 :]
        times = _TIMES.fullmatch(rest) if rest else None
        if VIDEO_ID.fullmatch(video_id) and (not rest or times):
            return video_id, float(times[1]) if times else None
    return None
