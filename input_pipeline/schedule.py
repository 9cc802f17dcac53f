"""What every batch is made of: one sample a row, rows of like length together, or several samples packed into a row.

A plan maps (number of the batch, row) to sample numbers and a text length. It is a pure function of the
mixture, the lengths and the seed: no plan depends on hosts, workers, or on which batches were asked for before.
Plans that look at lengths are made epoch by epoch, when the epoch is reached.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.lengths import Lengths
from input_pipeline.mixture import Mixture, permutation
from input_pipeline.packing import Patterns, assign, num_rows, plan_patterns

# Streams of random numbers beside those of the mixture, which has 0 and one per source.
BATCH_STREAM, ROW_STREAM = 2**30, 2**30 + 1
HELD_EPOCHS = 2  # Batches read ahead may reach into the next epoch.


class RowPlan(NamedTuple):
    """One row of a batch.

    Attributes:
        length: text positions of the whole batch.
        numbers: global sample numbers; fewer than clips_per_row leave slots empty.
        tokens: positions that each of them takes.
    """

    length: int
    numbers: tuple[int, ...]
    tokens: tuple[int, ...]


class Fill(NamedTuple):
    """How much of an epoch's batches is used.

    Attributes:
        rows: of text.
        samples: in them.
        text: share of the text positions that hold a token.
        clips: share of the clip slots that hold a sample.
    """

    rows: int
    samples: int
    text: float
    clips: float


class _Held:
    """Keeps the newest few results of a function of one number; one thread computes, the others wait."""

    def __init__(self, compute: Callable[[int], Any]):
        self._compute = compute
        self._results: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, number: int) -> Any:
        if (found := self._results.get(number)) is not None:
            return found
        with self._lock:
            if number not in self._results:
                results = {**self._results, number: self._compute(number)}
                while len(results) > HELD_EPOCHS:
                    del results[next(iter(results))]
                self._results = results
            return self._results[number]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One sample a row, all of one length.

    Attributes:
        mixture: what comes.
        tokens: i32 [len(mixture)], of every sample.
        batch_size: rows of the global batch.
        length: text positions of a row, at most.
    """

    mixture: Mixture
    tokens: np.ndarray
    batch_size: int
    length: int

    clips_per_row = 1

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes plan for themselves; an epoch's plan is made sooner than sent.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def lengths(self) -> tuple[int, ...]:
        """All text lengths that batches may have."""
        return (self.length,)

    def row(self, batch: int, row: int) -> RowPlan:
        """Row `row` of global batch number `batch`."""
        number = self.mixture.at(batch * self.batch_size + row)
        return RowPlan(self.length, (number,), (int(self.tokens[number]),))

    def numbers(self, batch: int) -> np.ndarray:
        """All sample numbers of a global batch, row by row."""
        first = batch * self.batch_size
        return np.array([self.mixture.at(first + row) for row in range(self.batch_size)], np.int64)

    def num_samples(self, batch: int) -> int:
        """How many `numbers` there are."""
        return self.batch_size

    def batches_in(self, epochs: float) -> float:
        """Batches that so many epochs take."""
        return epochs * self.mixture.epoch_length / self.batch_size

    def fill(self) -> Fill:
        """Of the first epoch."""
        # By shares instead of visits: half of a source is as long as the other half, nearly.
        samples = self.mixture.epoch_length
        starts = np.cumsum([0, *(len(source) for source in self.mixture.sources)])
        mean = [
            share * self.tokens[a:b].mean()
            for share, a, b in zip(self.mixture.shares.values(), starts[:-1], starts[1:], strict=True)
        ]
        return Fill(samples, samples, sum(mean) / (samples * self.length), 1.0)

    def identity(self) -> list[Any]:
        """JSON values of what the order depends on besides the mixture; empty if on nothing."""
        return []


class _Chunk(NamedTuple):
    rows: np.ndarray  # i32 [batches, batch_size], sample numbers
    lengths: np.ndarray  # i32 [batches]


@dataclasses.dataclass(frozen=True)
class BucketPlan(Plan):
    """One sample a row; a batch holds samples of one bucket and is as long as that bucket.

    Batches are formed within the stretch of the order from the first batch that begins in an epoch to the first
    one that begins in the next. What is left of a bucket there, less than a batch, goes into the next larger
    one, so that the last one comes out even. The batches then come in shuffled order.

    Attributes:
        buckets: text lengths, ascending; the last one is `length`.
    """

    buckets: tuple[int, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.buckets

    def row(self, batch: int, row: int) -> RowPlan:
        rows, length = self._batch(batch)
        number = int(rows[row])
        return RowPlan(length, (number,), (int(self.tokens[number]),))

    def numbers(self, batch: int) -> np.ndarray:
        return self._batch(batch)[0]

    def _batch(self, batch: int) -> tuple[np.ndarray, int]:
        epoch = batch * self.batch_size // self.mixture.epoch_length
        chunk: _Chunk = self._chunks(epoch)
        within = batch - self._first_batch(epoch)
        return chunk.rows[within], int(chunk.lengths[within])

    def fill(self) -> Fill:
        chunk = self._chunks(0)
        used = self.tokens[chunk.rows].sum(dtype=np.int64)
        places = chunk.lengths.sum(dtype=np.int64) * self.batch_size
        return Fill(chunk.rows.size, chunk.rows.size, used / places, 1.0)

    def identity(self) -> list[Any]:
        return ["buckets", self.buckets, _digest(self.tokens)]

    def _first_batch(self, epoch: int) -> int:
        return -(-epoch * self.mixture.epoch_length // self.batch_size)

    @functools.cached_property
    def _chunks(self) -> _Held:
        return _Held(self._form)

    def _form(self, epoch: int) -> _Chunk:
        first, last = self._first_batch(epoch), self._first_batch(epoch + 1)
        numbers = self.mixture.numbers(first * self.batch_size, last * self.batch_size)
        bucket = np.searchsorted(self.buckets, self.tokens[numbers])
        rows, left = [], np.zeros(0, np.int64)  # Positions within `numbers`.
        for index in range(len(self.buckets)):
            here = np.concatenate([np.flatnonzero(bucket == index), left])
            even = len(here) // self.batch_size * self.batch_size
            rows.append(here[:even].reshape(-1, self.batch_size))
            left = here[even:]
        positions = np.concatenate(rows)
        if self.mixture.shuffle:
            positions = positions[permutation(self.mixture.seed, BATCH_STREAM, epoch, len(positions))]
        else:
            positions = positions[np.argsort(positions.min(axis=1), kind="stable")]
        chosen = numbers[positions].astype(np.int32)
        longest = self.tokens[chosen].max(axis=1)
        lengths = np.asarray(self.buckets, np.int32)[np.searchsorted(self.buckets, longest)]
        return _Chunk(chosen, lengths)


@dataclasses.dataclass(frozen=True)
class PackedPlan(Plan):
    """Several samples a row, packed by length; see `input_pipeline.packing`.

    Rows are numbered through all epochs, and batch n has the rows n * batch_size and so on. With whole weights
    every epoch has as many rows, and any is found at once; with others, those of the epochs before are counted
    (not planned) when a later one is sought.

    Attributes:
        clips_per_row: k, most samples in a row.
    """

    clips_per_row: int = 1

    def row(self, batch: int, row: int) -> RowPlan:
        samples = self._row(batch * self.batch_size + row)
        numbers = tuple(samples[samples >= 0].tolist())
        return RowPlan(self.length, numbers, tuple(self.tokens[list(numbers)].tolist()))

    def numbers(self, batch: int) -> np.ndarray:
        first = batch * self.batch_size
        rows = np.stack([self._row(row) for row in range(first, first + self.batch_size)])
        return rows[rows >= 0]

    def num_samples(self, batch: int) -> int:
        return len(self.numbers(batch))

    def _row(self, row: int) -> np.ndarray:
        epoch = self._epoch_of(row)
        return self._epochs(epoch)[row - self._first_row(epoch)]

    def batches_in(self, epochs: float) -> float:
        whole = int(epochs)
        rows = self._first_row(whole)
        if epochs > whole:
            rows += (epochs - whole) * self._rows_in(whole)
        return rows / self.batch_size

    def fill(self) -> Fill:
        rows = self._rows_in(0)
        tokens = self.tokens[self.mixture.epoch(0)].sum(dtype=np.int64)
        samples = self.mixture.epoch_length
        return Fill(rows, samples, tokens / (rows * self.length), samples / (rows * self.clips_per_row))

    def identity(self) -> list[Any]:
        return ["pack", self.clips_per_row, self.length, _digest(self.tokens)]

    def _patterns(self, epoch: int) -> Patterns:
        if self.mixture.whole_passes:
            return self._same_patterns
        return self._count(self.mixture.epoch(epoch))

    @functools.cached_property
    def _same_patterns(self) -> Patterns:
        return self._count(self.mixture.epoch(0))

    def _count(self, numbers: np.ndarray) -> Patterns:
        counts = np.bincount(self.tokens[numbers], minlength=self.length + 1)
        return plan_patterns(counts, self.length, self.clips_per_row)

    @functools.cached_property
    def _same_rows(self) -> int:
        return num_rows(self._same_patterns)

    def _rows_in(self, epoch: int) -> int:
        return self._same_rows if self.mixture.whole_passes else num_rows(self._patterns(epoch))

    @functools.cached_property
    def _ends(self) -> list[int]:
        return []

    def _first_row(self, epoch: int) -> int:
        if self.mixture.whole_passes:
            return epoch * self._rows_in(0)
        with _COUNTING:
            while len(self._ends) < epoch:
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + self._rows_in(len(self._ends)))
            return self._ends[epoch - 1] if epoch else 0

    def _epoch_of(self, row: int) -> int:
        if self.mixture.whole_passes:
            return row // self._rows_in(0)
        while not self._ends or self._ends[-1] <= row:
            self._first_row(len(self._ends) + 1)
        return bisect.bisect_right(self._ends, row)

    @functools.cached_property
    def _epochs(self) -> _Held:
        return _Held(self._pack)

    def _pack(self, epoch: int) -> np.ndarray:
        numbers = self.mixture.epoch(epoch)
        rows = assign(self._patterns(epoch), numbers, self.tokens[numbers], self.clips_per_row)
        if self.mixture.shuffle:
            return rows[permutation(self.mixture.seed, ROW_STREAM, epoch, len(rows))]
        return rows[np.argsort(rows[:, 0], kind="stable")]


_COUNTING = threading.Lock()


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()


def make_plan(
    mixture: Mixture,
    lengths: Sequence[Lengths],
    *,
    batch_size: int,
    length: int,
    buckets: Sequence[int] = (),
    pack: int = 1,
) -> Plan:
    """The plan that a stage asks for.

    Args:
        mixture: what comes.
        lengths: of each source's samples, all of which fit `length`.
        batch_size: rows of the global batch.
        length: text positions of a row, at most.
        buckets: shorter text lengths that batches may have.
        pack: k, most samples in a row; 0 and 1 mean no packing.

    Raises:
        UserError: buckets that are not ascending or longer than a row; buckets together with packing.
    """
    buckets = tuple(buckets)
    if any(a >= b for a, b in zip((0, *buckets), (*buckets, length + 1), strict=True)):
        raise UserError(
            f"buckets are {buckets}; give ascending text lengths of at most {length}, the longest row"
        )
    if pack < 0:
        raise UserError(f"pack is {pack}; it is the number of clips that may share a row, 1 for no packing")
    if pack > 1 and buckets:
        raise UserError(f"buckets {buckets} and pack={pack} exclude each other: packed rows are full")
    tokens = np.concatenate([found.tokens for found in lengths])
    if pack > 1:
        return PackedPlan(mixture, tokens, batch_size, length, pack)
    if buckets:
        return BucketPlan(mixture, tokens, batch_size, length, tuple(sorted({*buckets, length})))
    return Plan(mixture, tokens, batch_size, length)
