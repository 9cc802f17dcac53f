"""From records to batches, with Grain: a share of the global order, threads, workers, exact resume.

Batch n of a run is a pure function of (sources, seed, batch size, n). The loader's whole position is
therefore one number, the batches it has given out; Grain's own iterator state is not used, since it does not
move between worker counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.mixture import Mixture, SourceConfig, open_mixture
from input_pipeline.spec import Batch, check_batch
from input_pipeline.transforms.sample import Row, SampleBuilder

# Two threads are enough to hide JPEG decoding behind a step and do not fight over the interpreter lock;
# Grain's default of 16 threads is slower than none on two cores.
DEFAULT_THREADS = 2


@dataclasses.dataclass(frozen=True)
class ReadRow:
    """Global sample number -> Row; numbers from `len(mixture)` on give padding rows (everything masked).

    Attributes:
        mixture: opened sources.
        builders: one per source; they differ in the modalities they show.
    """

    mixture: Mixture
    builders: tuple[SampleBuilder, ...]

    def __call__(self, number: int) -> Row:
        if number >= len(self.mixture):
            return self.builders[0].padding_row()
        source, within = self.mixture.locate(number)
        index = self.mixture.sources[source]
        try:
            data = index.reader[int(index.records[within])]
            return self.builders[source](data, int(index.samples[within]))
        except UserError as error:
            error.add_note(f"while reading sample {within} of {index.config.records}")
            raise


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch and what its rows are, one entry per row.

    Attributes:
        batch: the arrays.
        samples: the samples' own fields (id, task, conversations, ...); None for padding rows.
        dropped_rounds: dialogue rounds that were dropped because they did not fit.
    """

    batch: Batch
    samples: tuple[dict[str, Any] | None, ...]
    dropped_rounds: int

    @property
    def num_samples(self) -> int:
        return sum(sample is not None for sample in self.samples)


def stack_rows(rows: Sequence[Row]) -> Rows:
    """Stacks unbatched arrays along a new first axis."""
    batch: Any = {key: np.stack([row.arrays[key] for row in rows]) for key in rows[0].arrays}
    return Rows(batch, tuple(row.sample for row in rows), sum(row.dropped_rounds for row in rows))


def _local_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(f"batch_size {batch_size} does not divide among {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index} of {process_count} processes")
    return batch_size // process_count


MOST_POSITIONS = 2**50


def _make_reader(mixture: Mixture, builder: SampleBuilder) -> ReadRow:
    modalities = [source.config.modalities for source in mixture.sources]
    builder = dataclasses.replace(builder, features=mixture.features)
    return ReadRow(mixture, tuple(dataclasses.replace(builder, modalities=shown) for shown in modalities))


def make_dataset(
    mixture: Mixture,
    builder: SampleBuilder,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset[Rows]:
    """Batch number -> this process's rows of that global batch; endless, random access, no state.

    Row r of process p is global position n * batch_size + r * process_count + p of the mixture's order.
    """
    local = _local_batch_size(batch_size, process_index, process_count)
    order = mixture.order()
    # As good as endless. Without a count Grain takes sys.maxsize, which its batches of one row overflow.
    numbers = order.repeat(MOST_POSITIONS // len(order))[process_index::process_count]
    return numbers.map(_make_reader(mixture, builder)).batch(local, batch_fn=stack_rows)


def _iterate(dataset: grain.MapDataset[Rows], threads: int, workers: int) -> grain.DatasetIterator[Rows]:
    # A few finished batches ahead of the step; a deeper buffer only costs memory (16 frames of 384² are 7 MB
    # a row).
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads) if threads else 0)
    batches = dataset.to_iter_dataset(options)
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags; avlm does not use them.
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(batches)


class Loader:
    """Endless iterator over this process's share of the global batches; close it or use it in a `with`.

    Args:
        sources: the mixture; an opened `Mixture` is taken as it is (then `seed` and `shuffle` are its own).
        builder: makes the arrays; its `modalities` are replaced by each source's.
        batch_size: of the global batch, over all processes.
        seed: of the order.
        shuffle: False keeps the order of the records.
        start_batch: number of the first batch to give out; seeking is O(1).
        process_index, process_count: which share of the global batch is ours.
        threads: reading threads; 0 reads in the caller's.
        workers: worker processes; 0 for none. They start anew, so a script that uses them must guard its
            start with `if __name__ == "__main__"`.

    Raises:
        UserError: see `open_source`; a batch size that does not divide among the processes. While iterating:
            a sample that does not fit or is malformed, by id.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig] | Mixture,
        builder: SampleBuilder,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        start_batch: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = DEFAULT_THREADS,
        workers: int = 0,
    ):
        if isinstance(sources, Mixture):
            self.mixture = sources
        else:
            self.mixture = open_mixture(sources, builder.spec, seed=seed, shuffle=shuffle)
        self.batch_size = batch_size
        self.local_batch_size = _local_batch_size(batch_size, process_index, process_count)
        self.dropped_rounds = 0  # Since this loader was made or sought, over the batches given out.
        self._process_index, self._process_count = process_index, process_count
        self._length = builder.max_length
        self._spec = builder.spec
        self._dataset = make_dataset(
            self.mixture,
            builder,
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
        )
        self._threads, self._workers = threads, workers
        self._next_batch = start_batch
        self._iterator: grain.DatasetIterator[Rows] | None = None
        self._closed = False

    @property
    def next_batch(self) -> int:
        """Number of the batch that `next` will give out."""
        return self._next_batch

    @property
    def batches_per_epoch(self) -> float:
        return self.mixture.epoch_length / self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("the loader is closed")
        if self._iterator is None:
            self._iterator = _iterate(self._dataset[self._next_batch :], self._threads, self._workers)
        rows = next(self._iterator)
        check_batch(
            rows.batch, self._spec, self.local_batch_size, self._length, features=self.mixture.features
        )
        self._next_batch += 1
        self.dropped_rounds += rows.dropped_rounds
        return rows.batch

    def seek(self, batch: int) -> None:
        """The next batch given out is number `batch`."""
        self._stop()
        self._next_batch = batch
        self.dropped_rounds = 0

    def sample_numbers(self, batch: int, *, whole: bool = False) -> list[int]:
        """Global sample numbers of the rows of batch number `batch`; nothing is read.

        Args:
            batch: its number.
            whole: of the global batch, in its order, instead of this process's rows.
        """
        positions = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        if not whole:
            positions = positions[self._process_index :: self._process_count]
        order = self._order
        return [int(order[position]) for position in positions]

    @functools.cached_property
    def _order(self) -> grain.MapDataset:
        return self.mixture.order()

    def sample_ids(self, batch: int, *, whole: bool = False) -> list[str]:
        """Ids of the rows of batch number `batch`, from samples.jsonl; no record is read or decoded."""
        return [self.mixture.line(number)["id"] for number in self.sample_numbers(batch, whole=whole)]

    def state(self) -> dict[str, Any]:
        """The position, to be saved with a checkpoint; good for any number of threads and processes."""
        return {
            "next_batch": self._next_batch,
            "seed": self.mixture.seed,
            "batch_size": self.batch_size,
            "fingerprint": self.mixture.fingerprint(self.batch_size),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at a saved position.

        Raises:
            UserError: the state belongs to another order (sources, records, weights, seed or batch size
                differ).
        """
        own = self.state()
        for name in ("seed", "batch_size", "fingerprint"):
            if state[name] != own[name]:
                raise UserError(
                    f"cannot continue the data order: its {name} was {state[name]!r} and is now "
                    f"{own[name]!r}. Restore sources, records, weights, seed and batch size, or start the "
                    "stage in a new workdir"
                )
        self.seek(int(state["next_batch"]))

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def close(self) -> None:
        """Ends threads and worker processes and frees their shared memory."""
        self._stop()
        self._closed = True

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def num_eval_batches(mixture: Mixture, batch_size: int) -> int:
    """Batches that `iter_eval` yields on every process; the last one is filled up with padding rows."""
    return -(-len(mixture) // batch_size)


def iter_eval(
    sources: Sequence[SourceConfig] | Mixture,
    builder: SampleBuilder,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = DEFAULT_THREADS,
) -> Iterator[Rows]:
    """Every sample exactly once, in the order of the records; weights are ignored.

    Args: as for `Loader`.

    Yields:
        Rows, all of the full local batch size. Padding rows of the last batch have False masks throughout and
        None as their sample; `num_samples` counts the others.
    """
    mixture = sources if isinstance(sources, Mixture) else open_mixture(sources, builder.spec, shuffle=False)
    local = _local_batch_size(batch_size, process_index, process_count)
    numbers = grain.MapDataset.range(num_eval_batches(mixture, batch_size) * batch_size)
    rows = numbers[process_index::process_count].map(_make_reader(mixture, builder))
    iterator = _iterate(rows.batch(local, batch_fn=stack_rows), threads, workers=0)
    try:
        yield from iterator
    finally:
        iterator.close()
