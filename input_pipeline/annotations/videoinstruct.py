"""VideoInstruct100K, questions and answers about videos of ActivityNet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

from input_pipeline.annotations.importer import Importer, Outcome, convert_rows, entry, text_of
from input_pipeline.annotations.media_files import MediaFiles
from input_pipeline.annotations.rows import Row, json_rows


@dataclasses.dataclass(frozen=True)
class VideoInstruct(Importer):
    """MBZUAI/VideoInstruct-100K on Hugging Face: VideoInstruct100K.json.

    A JSON array of {"q", "a", "video_id"}; many rows ask about one video, each becomes a sample of it. The
    medium stands ahead of the question and behind it in turn, as in Video-ChatGPT's training files.

    Media: <video_id>.mp4 (ActivityNet's "v_..."), also without the "v_".
    """

    name: ClassVar[str] = "videoinstruct"
    title: ClassVar[str] = "VideoInstruct100K"
    summary: ClassVar[str] = "questions about ActivityNet's videos: VideoInstruct100K.json"
    fields: ClassVar[frozenset[str]] = frozenset({"q", "a", "video_id"})

    def read(self, path: Any, files: MediaFiles) -> Iterator[tuple[str, Outcome]]:
        rows = json_rows(path, ("q", "a", "video_id"))
        return convert_rows(rows, functools.partial(self._convert, files=files))

    def _convert(self, row: Row, files: MediaFiles) -> Iterator[Outcome]:
        question, answer = text_of(row.values, "q"), text_of(row.values, "a")
        video_id = text_of(row.values, "video_id")
        path, _ = files.find(list(dict.fromkeys([video_id, video_id.removeprefix("v_"), f"v_{video_id}"])))
        asked = f"<video>\n{question}" if row.number % 2 else f"{question}\n<video>"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        yield entry(f"videoinstruct-{row.number}", "video", path, "chat", turns)
