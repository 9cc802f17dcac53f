"""Which sample comes when: sources, their weights, and one global order that is a pure function of the seed.

Nothing here reads media. A sample has a global number; the order maps positions 0, 1, 2, ... to numbers in
O(1), so any position can be sought, and neither threads, worker processes nor hosts can change what comes at
a position.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Sequence

import grain
import numpy as np
from grain.experimental import index_shuffle

from input_pipeline.errors import UserError
from input_pipeline.records import SAMPLES, RecordReader
from input_pipeline.spec import FeatureShapes, MediaSpec

MODALITIES = ("video", "audio")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One folder of records in a stage's mixture.

    Attributes:
        records: folder made by `avlm prepare`.
        tasks: only samples of these tasks; empty takes all.
        modalities: what the model is shown of it; the other is masked. ("video",) leaves out samples without
            a picture, ("audio",) those without sound; () shows neither (text alone) and takes all.
        weight: how often each of its samples comes per epoch. 0.5 takes half of them, the other half next
            epoch; 2 takes all of them twice.
    """

    records: str
    tasks: tuple[str, ...] = ()
    modalities: tuple[str, ...] = MODALITIES
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tasks", "modalities"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UserError(f"source {self.records!r}: {name} is the text {value!r}; write ({value!r},)")
            object.__setattr__(self, name, tuple(value))
        unknown = set(self.modalities) - set(MODALITIES)
        if unknown:
            raise UserError(
                f"source {self.records!r}: unknown modalities {sorted(unknown)}; use {MODALITIES}"
            )
        if not self.weight > 0:
            raise UserError(
                f"source {self.records!r}: weight is {self.weight}; use a positive one or drop it"
            )


@dataclasses.dataclass(frozen=True)
class SourceIndex:
    """The samples of one source, without their media: 16 bytes each.

    Attributes:
        config: what was asked for.
        reader: random access to its records.
        records: i32 [n], number of the record that holds the sample.
        samples: i32 [n], its number within the record.
        offsets: i64 [n], where its line begins in samples.jsonl.
        left_out: samples of the folder that tasks or modalities exclude.
    """

    config: SourceConfig
    reader: RecordReader
    records: np.ndarray
    samples: np.ndarray
    offsets: np.ndarray
    left_out: int

    def __len__(self) -> int:
        return len(self.records)

    @property
    def digest(self) -> str:
        """See `RecordReader.digest`."""
        return self.reader.digest

    def line(self, number: int) -> dict:
        """The sample's line of samples.jsonl, read from disk."""
        with open(os.path.join(self.config.records, SAMPLES), "rb") as file:
            file.seek(int(self.offsets[number]))
            return json.loads(file.readline())


def _is_wanted(line: dict, config: SourceConfig) -> bool:
    if config.tasks and line.get("task") not in config.tasks:
        return False
    has = {"video": line["has_video"], "audio": line["has_audio"]}
    return not config.modalities or any(has[name] for name in config.modalities)


def open_source(config: SourceConfig, spec: MediaSpec | None = None) -> SourceIndex:
    """Reads a folder's manifest and sample list.

    Args:
        config: the source.
        spec: what the model expects; None skips the check.

    Raises:
        UserError: the folder holds no records, or records prepared for another MediaSpec (see
            `RecordReader`), or no sample that `config` wants. The message names folder, field, both values
            and the remedy.
    """
    reader = RecordReader(config.records, spec)
    records, samples, offsets = [], [], []
    offset = total = 0
    tasks_seen = set()
    with open(os.path.join(config.records, SAMPLES), "rb") as file:
        for raw in file:
            line = json.loads(raw)
            tasks_seen.add(line.get("task"))
            if _is_wanted(line, config):
                records.append(line["record"])
                samples.append(line["sample"])
                offsets.append(offset)
            offset += len(raw)
            total += 1
    if not records:
        raise UserError(
            f"{config.records} has {total} samples but none of tasks {list(config.tasks) or 'any'} "
            f"with modalities {list(config.modalities)}; its tasks are {sorted(map(str, tasks_seen))}"
        )
    return SourceIndex(
        config,
        reader,
        np.array(records, np.int32),
        np.array(samples, np.int32),
        np.array(offsets, np.int64),
        total - len(records),
    )


# Up to this length an epoch's permutation is held in memory; above it, Grain's cipher permutes in O(1). The
# cipher walks cycles of a domain of 65,536, so that short lengths are slow with it (6 ms an index for 10
# samples, 5 us for 10,000).
HELD_PERMUTATION = 65_536


@functools.lru_cache(maxsize=256)  # At most 64 MB.
def _permutation_key(seed: int, stream: int, epoch: int, length: int) -> np.ndarray | int:
    sequence = np.random.SeedSequence([seed, stream, epoch])
    if length <= HELD_PERMUTATION:
        # Raw bits and a stable sort: numpy promises both for good, but not what Generator.permutation
        # returns.
        return np.argsort(np.random.PCG64(sequence).random_raw(length), kind="stable").astype(np.int32)
    return int(sequence.generate_state(1)[0])


def shuffled(index: int, length: int, seed: int, stream: int = 0) -> int:
    """Element `index` of an endless stream of permutations of `length` elements, another one each epoch.

    Args:
        index: position in the stream.
        length: elements per epoch.
        seed, stream: together choose the permutations.

    Returns:
        epoch * length + element.
    """
    epoch, within = divmod(index, length)
    key = _permutation_key(seed, stream, epoch, length)
    if not isinstance(key, int):
        return epoch * length + int(key[within])
    # Grain 0.2.18 is no permutation when the largest index is a power of two: its cipher is one bit short,
    # one element comes twice and one never. There the next larger domain is permuted and left again by
    # walking the cycle.
    largest = length - 1 if (length - 1) & (length - 2) else length
    element = index_shuffle(within, max_index=largest, seed=key, rounds=4)
    while element >= length:
        element = index_shuffle(element, max_index=largest, seed=key, rounds=4)
    return epoch * length + element


@dataclasses.dataclass(frozen=True)
class MixtureOrder(grain.transforms.DatasetSelectionMap):
    """Position -> (source, position in the source's own endless stream); a pure function, O(1).

    Epoch e holds elements e n .. (e + 1) n - 1 of the stream of a source whose share is n, permuted together
    with those of the other sources. A source is thus exhausted before any of its samples comes again,
    whatever its weight.

    Attributes:
        lengths: samples of each source.
        shares: elements per epoch of each source.
        seed: of all permutations; None keeps everything in order.
    """

    lengths: tuple[int, ...]
    shares: tuple[int, ...]
    seed: int | None

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self.shares))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, position: int) -> tuple[int, int]:
        if self.seed is not None:
            position = shuffled(position, len(self), self.seed)
        epoch, within = divmod(position, len(self))
        source = bisect.bisect_right(self._ends, within)
        share, length = self.shares[source], self.lengths[source]
        index = epoch * share + within - (self._ends[source] - share)
        # Whole passes are shuffled already, by the permutation of the epoch.
        if self.seed is not None and share % length:
            index = shuffled(index, length, self.seed, stream=1 + source)
        return source, index


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Opened sources and the order in which their samples come. Samples are numbered source by source."""

    sources: tuple[SourceIndex, ...]
    seed: int = 0
    shuffle: bool = True

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        """Distinct samples."""
        return self._ends[-1]

    @property
    def epoch_length(self) -> int:
        """Samples given out per epoch; equals `len(self)` when all weights are 1."""
        return sum(self._shares)

    @property
    def _shares(self) -> tuple[int, ...]:
        return tuple(max(1, round(source.config.weight * len(source))) for source in self.sources)

    @functools.cached_property
    def features(self) -> FeatureShapes:
        """Which media come as features; UserError naming two folders if the sources disagree."""
        first = self.sources[0]
        for source in self.sources[1:]:
            if source.reader.features != first.reader.features:
                raise UserError(
                    f"{first.config.records} holds {first.reader.features}, {source.config.records} holds "
                    f"{source.reader.features}; all sources of a stage must come alike, run `avlm "
                    "cache-features` on both with the same --modalities, or on neither"
                )
        return first.reader.features

    def locate(self, number: int) -> tuple[int, int]:
        """(source, number within the source) of a sample's global number."""
        source = bisect.bisect_right(self._ends, number)
        return source, number - (self._ends[source] - len(self.sources[source]))

    def line(self, number: int) -> dict:
        """The sample's line of samples.jsonl."""
        source, within = self.locate(number)
        return self.sources[source].line(within)

    def order(self) -> grain.MapDataset[int]:
        """Position -> global sample number, endless: index it with any position, or `repeat` it.

        Shuffled, every epoch is another permutation; in it, a source of weight 1 comes once in full.
        """
        lengths = tuple(len(source) for source in self.sources)
        numbers = [
            grain.MapDataset.range(end - length, end) for length, end in zip(lengths, self._ends, strict=True)
        ]
        order = MixtureOrder(lengths, self._shares, self.seed if self.shuffle else None)
        return grain.MapDataset.select_from_datasets(numbers, order)

    def fingerprint(self, batch_size: int) -> str:
        """Identifies everything that the order of batches depends on, and nothing else."""
        parts = [
            [source.digest, source.config.tasks, source.config.modalities, source.config.weight]
            for source in self.sources
        ]
        text = json.dumps([parts, self.seed, self.shuffle, batch_size])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_mixture(
    sources: Sequence[SourceConfig], spec: MediaSpec | None = None, *, seed: int = 0, shuffle: bool = True
) -> Mixture:
    """Opens every source, see `open_source` for what it raises."""
    if not sources:
        raise UserError("a stage needs at least one source; config.stage.<name>.sources is empty")
    return Mixture(tuple(open_source(source, spec) for source in sources), seed, shuffle)
