"""Rows of a batch: a sample is read, samples are laid into a row, rows are stacked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.mixture import Mixture
from input_pipeline.records import LENGTHS, SAMPLES
from input_pipeline.schedule import RowPlan
from input_pipeline.spec import TEXT_KEYS, Batch
from input_pipeline.transforms.sample import Row, SampleBuilder


@dataclasses.dataclass(frozen=True)
class ReadSample:
    """Global sample number -> Row; numbers from `len(mixture)` on give padding rows (everything masked).

    Attributes:
        mixture: opened sources.
        builders: one per source; they differ in the modalities they show.
    """

    mixture: Mixture
    builders: tuple[SampleBuilder, ...]

    def __call__(self, number: int) -> Row:
        if number >= len(self.mixture):
            return self.padding
        source, within = self.mixture.locate(number)
        index = self.mixture.sources[source]
        try:
            data = index.reader[int(index.records[within])]
            return self.builders[source](data, int(index.samples[within]))
        except UserError as error:
            # Not a note: Grain adds its own, which say nothing to a user.
            raise UserError(f"{index.config.records}, sample {within}: {error}") from error

    @functools.cached_property
    def padding(self) -> Row:
        """The same row for all: as large as any other, and nobody writes into it."""
        return self.builders[0].padding_row()


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """One row of a batch: the clips whose media it holds, empty slots included, and their texts end to end.

    Attributes:
        clips: one per slot; of an empty slot nothing is valid.
        text: the arrays of TEXT_KEYS, [l].
    """

    clips: tuple[Row, ...]
    text: dict[str, np.ndarray]


def pack_row(samples: Sequence[Row], empty: Row | None, slots: int, length: int) -> PackedRow:
    """Lays the texts of samples end to end into a row: segments 1, 2, ..., positions from 0 in each.

    Args:
        samples: at most `slots`; their texts are at most `length` long together.
        empty: a padding row for the slots that are left, and for its text the padding.
        slots: clips per row.
        length: l.
    """
    rows = [*samples, *([empty] * (slots - len(samples)))]
    if len(samples) == 1:  # Right-padded already.
        return PackedRow(tuple(rows), {key: samples[0].arrays[key][:length] for key in TEXT_KEYS})
    assert empty is not None
    text = {key: empty.arrays[key][:length].copy() for key in TEXT_KEYS}
    start = 0
    for segment, sample in enumerate(samples, 1):
        stop = start + sample.plan.total
        for key in TEXT_KEYS:
            text[key][start:stop] = sample.arrays[key][: stop - start]
        text["segment_ids"][start:stop] *= segment
        start = stop
    return PackedRow(tuple(rows), text)


@dataclasses.dataclass(frozen=True)
class ReadRow:
    """RowPlan -> PackedRow."""

    read: ReadSample
    clips_per_row: int

    def __call__(self, planned: RowPlan) -> PackedRow:
        samples = [self.read(number) for number in planned.numbers]
        for number, row, tokens in zip(planned.numbers, samples, planned.tokens, strict=True):
            if row.plan.total != tokens:
                raise UserError(self._other_length(number, row, tokens))
        empty = None if self.clips_per_row == 1 else self.read.padding
        return pack_row(samples, empty, self.clips_per_row, planned.length)

    def _other_length(self, number: int, row: Row, planned: int) -> str:
        source, within = self.read.mixture.locate(number)
        index = self.read.mixture.sources[source]
        records = index.config.records
        if index.line(within)["conversations"] == row.sample["conversations"]:
            remedy = f"the lengths in {records}/{LENGTHS} are out of date; delete that folder"
        else:
            remedy = (
                f"{records}/{SAMPLES} does not belong to its records; prepare them again with --overwrite"
            )
        return (
            f"sample {row.sample.get('id')!r} (number {within} of {records}) takes {row.plan.total} tokens, but {planned} "
            f"were planned for it: {remedy}"
        )


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch and what it holds, one entry per clip.

    Attributes:
        batch: the arrays.
        samples: the samples' own fields (id, task, conversations, ...); None for padding.
        dropped_rounds: dialogue rounds that were dropped because they did not fit.
        dropped_questions: questions whose text the template leaves out.
    """

    batch: Batch
    samples: tuple[dict[str, Any] | None, ...]
    dropped_rounds: int
    dropped_questions: int

    @property
    def num_samples(self) -> int:
        return sum(sample is not None for sample in self.samples)


def stack_rows(rows: Sequence[PackedRow]) -> Rows:
    """Stacks texts by row and media by clip along a new first axis."""
    clips = [clip for row in rows for clip in row.clips]
    batch: Any = {
        key: np.stack([row.text[key] for row in rows] if key in TEXT_KEYS else [c.arrays[key] for c in clips])
        for key in clips[0].arrays
    }
    return Rows(
        batch,
        tuple(clip.sample for clip in clips),
        sum(clip.dropped_rounds for clip in clips),
        sum(clip.dropped_questions for clip in clips),
    )


def as_row(sample: Row) -> PackedRow:
    """A row of one sample, as long as the sample's own arrays."""
    return PackedRow((sample,), {key: sample.arrays[key] for key in TEXT_KEYS})
