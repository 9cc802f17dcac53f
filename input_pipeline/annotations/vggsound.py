"""VGGSound, ten-second clips whose source of sound is in the picture."""

from __future__ import annotations

import dataclasses
import functools
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
from input_pipeline.annotations.rows import AnnotationError, Head, Row, RowError, WrongFile, csv_rows
from input_pipeline.annotations.youtube import (
    BARE_IDS_HELP,
    VIDEO_ID,
    check_bare_ids,
    check_video_id,
    locate,
    seconds,
)

REQUEST = "Which sound does this clip hold, made by what is to be seen in it?"
ANSWER = "The sound is: {}."
COLUMNS = ("youtube id", "start seconds", "label", "split")
SPLITS = ("train", "test", "all")
SECONDS = 10.0  # Length of a clip.


@dataclasses.dataclass(frozen=True)
class VggSound(Importer):
    """www.robots.ox.ac.uk/~vgg/data/vggsound: vggsound.csv.

    No header: YouTube id, start second, label, train or test; a label with commas is quoted.

    Media: <id>_<start in six digits>.mp4, another name below, or the whole video as <id>.mp4.
    """

    name: ClassVar[str] = "vggsound"
    title: ClassVar[str] = "VGGSound"
    summary: ClassVar[str] = "clips with the label of their sound: vggsound.csv"
    fields: ClassVar[frozenset[str]] = frozenset(COLUMNS)

    split: str = dataclasses.field(default="train", metadata={"help": "train, test or all"})
    bare_ids: str = dataclasses.field(default="source", metadata={"help": BARE_IDS_HELP})

    @classmethod
    def recognises(cls, head: Head) -> bool:
        first = head.first
        return len(first) == 4 and bool(VIDEO_ID.fullmatch(first[0])) and first[3] in ("train", "test")

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        check_bare_ids(self.bare_ids)
        if self.split not in SPLITS:
            raise AnnotationError(f"split is {self.split!r}; use one of {', '.join(SPLITS)}")
        convert = functools.partial(self._convert, path=path, files=files)
        return convert_rows(csv_rows(path, (), names=COLUMNS), convert)

    def _convert(self, row: Row, path: Any, files: MediaFiles) -> Iterator[Outcome]:
        values = row.values
        if row.number == 1 and not self.recognises(Head(frozenset(), tuple(values.values()))):
            first = ", ".join(values.values())[:80]
            raise WrongFile(
                f"{path}: its first row is {first!r}, not {', '.join(COLUMNS)} (it has no header)"
            )
        if values["split"] not in SPLITS[:2]:
            raise RowError(f"its split is {values['split']!r}; train or test is expected")
        if self.split not in (values["split"], "all"):
            yield LeftOut(f"split {values['split']}")
            return
        video_id, label = check_video_id(values["youtube id"]), text_of(values, "label")
        start = seconds(values["start seconds"], "start second")
        name, interval = locate(
            files, video_id, start, start + SECONDS, kinds=("video",), bare_ids=self.bare_ids
        )
        turns = dialogue(REQUEST, ANSWER.format(label), "<video>")
        line_id = f"vggsound-{video_id}-{values['start seconds'].strip()}"
        yield entry(line_id, "video", name, "av_caption", turns, interval, label=label)
