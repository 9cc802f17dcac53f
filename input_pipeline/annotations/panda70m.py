"""Panda-70M, clips of YouTube videos with one caption each."""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from input_pipeline.annotations.importer import (
    Importer,
    LeftOut,
    Outcome,
    Refused,
    convert_rows,
    dialogue,
    entry,
)
from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.rows import AnnotationError, Row, RowError, csv_rows
from input_pipeline.annotations.youtube import BARE_IDS_HELP, check_bare_ids, clock_seconds, locate

REQUEST = "Say in one sentence what this clip shows."
COMPARED = 20  # Captions written beside clips that are compared; another csv differs in the first.


@dataclasses.dataclass(frozen=True)
class Panda70m(Importer):
    """snap-research/Panda-70M on GitHub: panda70m_training_2m.csv (or _10m, _full, _validation, _testing).

    Each row is one source video: videoID, url, and the Python lists timestamp ([["0:00:22.977",
    "0:00:34.001"], ...]), caption and matching_score with one item per clip; later files have further list
    columns, which are not used. Every clip becomes a sample.

    Media, below the media root in any folder:
      * 00000/0000000_00000.mp4, as the repository's own video2dataset writes: the number of the csv's row and
        of the clip. The csv must be the one that was downloaded from; the captions it wrote beside the clips
        (.txt) are compared for the first clips;
      * <videoID>_<start>_<end>.mp4 and the like, clips already cut (see below);
      * <videoID>.mp4, the whole video: the clips are taken out of it.

    The paper's stage 1a takes "a train set" of it: the 2M split, cut to max_samples=500000 to balance LCS-558K.
    """

    name: ClassVar[str] = "panda70m"
    title: ClassVar[str] = "Panda-70M"
    summary: ClassVar[str] = "clips with captions: panda70m_training_2m.csv"
    fields: ClassVar[frozenset[str]] = frozenset({"videoID", "timestamp", "caption", "matching_score"})

    min_score: float = dataclasses.field(
        default=0.0, metadata={"help": "least matching_score of a clip's caption; the 10M split holds > 0.43"}
    )
    bare_ids: str = dataclasses.field(default="source", metadata={"help": BARE_IDS_HELP})

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        check_bare_ids(self.bare_ids)
        rows = csv_rows(path, ("videoID", "timestamp", "caption", "matching_score"))
        check = _CaptionCheck(os.fspath(path), files.root)
        return convert_rows(rows, functools.partial(self._convert, files=files, check=check))

    def _convert(self, row: Row, files: MediaFiles, check: _CaptionCheck) -> Iterator[Outcome]:
        lists = {key: _list(row.values[key], key) for key in ("timestamp", "caption", "matching_score")}
        if len({len(items) for items in lists.values()}) > 1:
            counts = ", ".join(f"{key} {len(items)}" for key, items in lists.items())
            raise RowError(f"its lists differ in length: {counts}")
        video_id = row.values["videoID"].strip()
        for number, (times, caption, score) in enumerate(zip(*lists.values(), strict=True)):
            clip_id = f"panda70m-{video_id}-{number:05d}"
            try:
                if not isinstance(score, int | float):
                    raise RowError(f"the matching_score of clip {number} is {score!r}")
                if score < self.min_score:
                    yield LeftOut(f"matching_score below {self.min_score:g}")
                    continue
                if not isinstance(caption, str) or not caption.strip():
                    raise RowError(f"the caption of clip {number} is {caption!r}")
                if not isinstance(times, list | tuple) or len(times) != 2:
                    raise RowError(f"the timestamp of clip {number} is {times!r}; [start, end] is expected")
                start, end = (clock_seconds(time, "timestamp") for time in times)
                counted = f"{row.number - 1:07d}_{number:05d}"
                path, interval = locate(
                    files, video_id, start, end, kinds=("video",), bare_ids=self.bare_ids, clips=(counted,)
                )
                if Path(path).stem == counted:
                    check(path, caption)
            except RowError as error:
                yield Refused(str(error), clip_id)
                continue
            turns = dialogue(REQUEST, caption.strip(), "<video>")
            yield entry(clip_id, "video", path, "visual_caption", turns, interval, matching_score=score)


def _list(cell: str, what: str) -> list[Any]:
    """A cell that holds a Python list."""
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = None
    if not isinstance(value, list):
        raise RowError(f"its {what} is no Python list: {cell[:80]!r}")
    return value


@dataclasses.dataclass
class _CaptionCheck:
    """Compares captions beside the first clips with the csv's: rows are counted, so another csv would mislabel all."""

    csv: str
    root: str
    left: int = COMPARED

    def __call__(self, path: str, caption: str) -> None:
        if not self.left or "://" in self.root:
            return
        self.left -= 1
        beside = Path(self.root, path).with_suffix(".txt")
        try:
            written = beside.read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        if written.strip() != caption.strip():
            raise AnnotationError(
                f"{beside} says {written.strip()[:60]!r} but {self.csv} has {caption.strip()[:60]!r} there: "
                "these clips were downloaded from another csv; clips are numbered by its rows, so pass that one"
            )
