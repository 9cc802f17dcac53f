"""LCS-558K, the pictures and captions of LLaVA's first stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from input_pipeline.annotations.importer import Importer, Outcome, convert_rows, entry, text_of
from input_pipeline.annotations.rows import Row, RowError, json_rows

PLACEHOLDER = "<image>"


@dataclasses.dataclass(frozen=True)
class Lcs558k(Importer):
    """liuhaotian/LLaVA-Pretrain on Hugging Face: blip_laion_cc_sbu_558k.json and images.zip.

    The annotation file is a JSON array of {"id", "image": "00453/004539375.jpg", "conversations"}. A conversation
    has exactly two turns, the first with <image> ahead of its request or behind it; both are kept as they stand.

    Media: the folder into which images.zip was unpacked.
    """

    name: ClassVar[str] = "lcs558k"
    title: ClassVar[str] = "LCS-558K"
    summary: ClassVar[str] = "pictures with captions: blip_laion_cc_sbu_558k.json"
    fields: ClassVar[frozenset[str]] = frozenset({"id", "image", "conversations"})

    def read(self, path: Any, files: Any) -> Iterator[tuple[str, Outcome]]:
        return convert_rows(json_rows(path, ("id", "image", "conversations")), self._convert)

    def _convert(self, row: Row) -> Iterator[Outcome]:
        turns = row.values["conversations"]
        if (
            not isinstance(turns, list)
            or not all(isinstance(turn, dict) for turn in turns)
            or len(turns) != 2
        ):
            raise RowError("its conversation must be exactly two turns, a request and a caption")
        if PLACEHOLDER not in str(turns[0].get("value")):
            raise RowError(f"its request holds no {PLACEHOLDER}")
        # Paths are the data set's own: prepare finds out which files are missing, nothing is looked up here.
        line_id, image = f"lcs558k-{text_of(row.values, 'id')}", text_of(row.values, "image")
        yield entry(line_id, "image", image, "visual_caption", turns)
