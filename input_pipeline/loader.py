"""From records to batches, with Grain: a share of the global order, threads, workers, exact resume.

Batch n of a run is a pure function of (sources, lengths of their samples, seed, batch size, n), see
`input_pipeline.schedule`. The loader's whole position is therefore one number, the batches it has given out; Grain's
own iterator state is not used, since it does not move between worker counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.lengths import measure
from input_pipeline.mixture import Mixture, SourceConfig, open_mixture
from input_pipeline.rows import ReadRow, ReadSample, Rows, as_row, stack_rows
from input_pipeline.schedule import Plan, RowPlan, make_plan
from input_pipeline.spec import Batch, check_batch
from input_pipeline.transforms.sample import SampleBuilder

# Two threads are enough to hide JPEG decoding behind a step and do not fight over the interpreter lock;
# Grain's default of 16 threads is slower than none on two cores.
DEFAULT_THREADS = 2


@dataclasses.dataclass(frozen=True)
class ShareOfRows:
    """This process's rows of all batches, end to end. Endless, random access, no state.

    A global batch is cut into `accumulate` runs of rows, the micro-batches; row r of process p in micro-batch m is row
    m * batch_size / accumulate + r * process_count + p of the global batch.
    """

    plan: Plan
    process_index: int
    process_count: int
    accumulate: int = 1

    def __len__(self) -> int:
        # As good as endless. sys.maxsize, Grain's own idea of that, overflows in its batches of one row.
        return 2**50

    def __getitem__(self, index: int) -> RowPlan:
        rows = self.plan.batch_size // self.accumulate
        micro_batch, row = divmod(index, rows // self.process_count)
        batch, run = divmod(micro_batch, self.accumulate)
        return self.plan.row(batch, run * rows + row * self.process_count + self.process_index)


def _apart(rows: Rows) -> tuple[Batch, Rows]:
    """The arrays beside all the rest: Grain hands those of a tuple or dict over in shared memory and pickles what it
    does not know, Rows among it.
    """
    return rows.batch, dataclasses.replace(rows, batch={})


def _joined(parts: tuple[Batch, Rows]) -> Rows:
    return dataclasses.replace(parts[1], batch=parts[0])


def _local_batch_size(batch_size: int, process_index: int, process_count: int, accumulate: int = 1) -> int:
    """Rows of a micro-batch that one process reads."""
    if batch_size % (process_count * accumulate):
        shares = f"{process_count} processes" + (f" x {accumulate} micro-batches" if accumulate > 1 else "")
        raise UserError(f"batch_size {batch_size} does not divide among {shares}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index} of {process_count} processes")
    return batch_size // (process_count * accumulate)


def _make_reader(mixture: Mixture, builder: SampleBuilder) -> ReadSample:
    modalities = [source.config.modalities for source in mixture.sources]
    builder = dataclasses.replace(builder, features=mixture.features)
    return ReadSample(mixture, tuple(dataclasses.replace(builder, modalities=shown) for shown in modalities))


def make_dataset(
    plan: Plan,
    builder: SampleBuilder,
    *,
    process_index: int = 0,
    process_count: int = 1,
    accumulate: int = 1,
) -> grain.MapDataset[Rows]:
    """Micro-batch number -> this process's rows of it; endless, random access, no state."""
    local = _local_batch_size(plan.batch_size, process_index, process_count, accumulate)
    rows = grain.MapDataset.source(ShareOfRows(plan, process_index, process_count, accumulate))
    read = ReadRow(_make_reader(plan.mixture, builder), plan.clips_per_row)
    return rows.map(read).batch(local, batch_fn=stack_rows)


def _iterate(
    dataset: grain.MapDataset[Rows], threads: int, workers: int
) -> grain.DatasetIterator[tuple[Batch, Rows]]:
    """Batches as `_apart` gives them."""
    # A few finished batches ahead of the step; a deeper buffer only costs memory (16 frames of 384² are 7 MB
    # a row).
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads) if threads else 0)
    batches = dataset.map(_apart).to_iter_dataset(options)
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags; avlm does not use them.
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(batches)


class Loader:
    """Endless iterator over this process's share of the global batches; close it or use it in a `with`.

    Args:
        sources: the mixture by name, see `open_mixture`; an opened `Mixture` is taken as it is (then `seed` and
            `shuffle` are its own).
        builder: makes the arrays; its `modalities` are replaced by each source's.
        batch_size: rows of the global batch, over all processes.
        accumulate: micro-batches that a global batch is given out in, one `next` each. They change neither the order nor
            the position, which counts global batches.
        buckets, pack: see `make_plan`.
        oversize: see `measure`.
        seed: of the order.
        shuffle: False keeps the order of the records.
        process_index, process_count: which share of the global batch is ours.
        threads: reading threads; 0 reads in the caller's.
        workers: worker processes; 0 for none. They start anew, so a script that uses them must guard its
            start with `if __name__ == "__main__"`. Their batches wait in shared memory (/dev/shm), a few of each.

    Attributes:
        mixture: of what fits.
        plan: what each batch is made of.
        left_out: samples that do not fit and are left out, by source.
        dropped_rounds: dialogue rounds that do not fit, by source.
        dropped_questions: questions whose text the template leaves out, by source.

    Raises:
        UserError: see `open_source`, `measure` and `make_plan`; a batch size that does not divide among the
            processes. While iterating: a sample that is malformed, by id.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceConfig] | Sequence[SourceConfig] | Mixture,
        builder: SampleBuilder,
        *,
        batch_size: int,
        accumulate: int = 1,
        buckets: Sequence[int] = (),
        pack: int = 1,
        oversize: str = "error",
        seed: int = 0,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = DEFAULT_THREADS,
        workers: int = 0,
    ):
        self.local_batch_size = _local_batch_size(batch_size, process_index, process_count, accumulate)
        if not isinstance(sources, Mixture):
            sources = open_mixture(sources, builder.spec, seed=seed, shuffle=shuffle)
        self.mixture, lengths, self.left_out = measure(sources, builder, oversize)
        by_source = {s.name: found for s, found in zip(self.mixture.sources, lengths, strict=True)}
        self.dropped_rounds = {name: int(found.dropped_rounds.sum()) for name, found in by_source.items()}
        self.dropped_questions = {name: int(x.dropped_questions.sum()) for name, x in by_source.items()}
        self.batch_size = batch_size
        self.plan = make_plan(
            self.mixture,
            lengths,
            batch_size=batch_size,
            length=builder.max_length,
            buckets=buckets,
            pack=pack,
        )
        self._process_index, self._process_count = process_index, process_count
        self._spec = builder.spec
        self._dataset = make_dataset(
            self.plan,
            builder,
            process_index=process_index,
            process_count=process_count,
            accumulate=accumulate,
        )
        self._threads, self._workers = threads, workers
        self._accumulate = accumulate
        self._next_micro_batch = 0
        self._iterator: grain.DatasetIterator[tuple[Batch, Rows]] | None = None
        self._closed = False

    @property
    def next_batch(self) -> int:
        """Number of the global batch that `next` will give out (the next part of)."""
        return self._next_micro_batch // self._accumulate

    def batches_in(self, epochs: float) -> float:
        """Batches that so many epochs take; the last one may reach into the next epoch."""
        return self.plan.batches_in(epochs)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next_rows().batch

    def next_rows(self) -> Rows:
        """As `next`, with the fields of the samples that were read."""
        if self._closed:
            raise ValueError("the loader is closed")
        if self._iterator is None:
            self._iterator = _iterate(self._dataset[self._next_micro_batch :], self._threads, self._workers)
        rows = _joined(next(self._iterator))
        length = self.plan.row(self.next_batch, 0).length
        check_batch(
            rows.batch,
            self._spec,
            self.local_batch_size,
            length,
            clips_per_row=self.plan.clips_per_row,
            features=self.mixture.features,
        )
        self._next_micro_batch += 1
        return rows

    def seek(self, batch: int) -> None:
        """The next batch given out is number `batch`; O(1)."""
        self._stop()
        self._next_micro_batch = batch * self._accumulate

    def sample_numbers(self, batch: int, *, whole: bool = False) -> list[int]:
        """Global sample numbers of batch number `batch`, row by row; nothing is read.

        Args:
            batch: its number.
            whole: of the global batch, in its order, instead of this process's rows.
        """
        if whole:
            return self.plan.numbers(batch).tolist()
        rows = range(self._process_index, self.batch_size, self._process_count)
        return [number for row in rows for number in self.plan.row(batch, row).numbers]

    def sample_ids(self, batch: int, *, whole: bool = False) -> list[str]:
        """Ids of the samples of batch number `batch`, from samples.jsonl; no record is read or decoded."""
        return [self.mixture.line(number)["id"] for number in self.sample_numbers(batch, whole=whole)]

    def count_samples(self, start: int, stop: int) -> dict[str, int]:
        """How many samples of each source the global batches `start` .. `stop` - 1 hold; nothing is read."""
        numbers = [self.plan.numbers(batch) for batch in range(start, stop)]
        of_source = self.mixture.source_of(np.concatenate([np.zeros(0, np.int64), *numbers]))
        counts = np.bincount(of_source, minlength=len(self.mixture.sources)).tolist()
        return {source.name: count for source, count in zip(self.mixture.sources, counts, strict=True)}

    def num_samples(self, batch: int) -> int:
        """Samples in global batch number `batch`."""
        return self.plan.num_samples(batch)

    def summary(self) -> dict[str, Any]:
        """What is trained on, in counts, by source: to be kept with the result."""
        return {
            source.name: {
                "samples": len(source),
                "per_epoch": self.mixture.shares[source.name],
                "of_other_tasks_or_modalities": source.left_out,
                "left_out_as_oversize": self.left_out[source.name],
                "dropped_rounds": self.dropped_rounds[source.name],
                "dropped_questions": self.dropped_questions[source.name],
            }
            for source in self.mixture.sources
        }

    def describe(self) -> str:
        """`summary` and how full the batches are, for people."""
        lines = []
        for name, counts in self.summary().items():
            line = f"source {name}: {counts['samples']} samples, {counts['per_epoch']} an epoch"
            if counts["left_out_as_oversize"]:
                line += (
                    f"; {counts['left_out_as_oversize']} left out, they do not fit {self.plan.length} tokens"
                )
            if counts["dropped_rounds"]:
                line += f"; {counts['dropped_rounds']} rounds dropped that do not fit"
            if counts["dropped_questions"]:
                line += f"; {counts['dropped_questions']} questions left out by the template"
            lines.append(line)
        fill = self.plan.fill()
        line = (
            f"an epoch: {fill.samples} samples in {fill.rows} rows of {_either(self.plan.lengths)} positions"
        )
        line += f", {fill.text:.1%} of them filled"
        if self.plan.clips_per_row > 1:
            line += f"; {fill.clips:.1%} of {self.plan.clips_per_row} clips a row"
        return "\n".join([*lines, line])

    def state(self, next_batch: int | None = None) -> dict[str, Any]:
        """The position, to be saved with a checkpoint; good for any number of threads and processes.

        Args:
            next_batch: another position than the loader's own: that of a consumer who reads ahead.
        """
        return {
            "next_batch": self.next_batch if next_batch is None else next_batch,
            "seed": self.mixture.seed,
            "batch_size": self.batch_size,
            "fingerprint": self._fingerprint,
        }

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self.mixture.fingerprint(self.batch_size, *self.plan.identity())

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at a saved position.

        Raises:
            UserError: the state belongs to another order (sources, records, weights, lengths, seed or batch
                size differ).
        """
        own = self.state()
        for name in ("seed", "batch_size", "fingerprint"):
            if state[name] != own[name]:
                raise UserError(
                    f"cannot continue the data order: its {name} was {state[name]!r} and is now "
                    f"{own[name]!r}. Restore sources, records, weights, buckets, pack, max_length, seed and batch "
                    "size, or start the stage in a new workdir"
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
    sources: Mapping[str, SourceConfig] | Sequence[SourceConfig] | Mixture,
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
    rows = numbers[process_index::process_count].map(_make_reader(mixture, builder)).map(as_row)
    iterator = _iterate(rows.batch(local, batch_fn=stack_rows), threads, workers=0)
    try:
        yield from map(_joined, iterator)
    finally:
        iterator.close()


def _either(lengths: Sequence[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, lengths[:-1])), str(lengths[-1]))))
