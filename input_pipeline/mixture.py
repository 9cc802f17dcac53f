"""Which sample comes when: sources, their weights, and one global order that is a pure function of the seed.

Nothing here reads media. A sample has a global number; the order maps positions 0, 1, 2, ... to numbers in
O(1), so any position can be sought, and neither threads, worker processes nor hosts can change what comes at
a position.
"""

from __future__ import annotations

import array
import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from input_pipeline.errors import UserError
from input_pipeline.records import SAMPLES, RecordError, RecordReader
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
            epoch; 2 takes all of them twice; 0 leaves the source out.
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
        if not 0 <= self.weight < float("inf"):
            raise UserError(
                f"source {self.records!r}: weight is {self.weight}; use a positive one, or 0 to leave it out"
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
        name: what the mixture calls it.
    """

    config: SourceConfig
    reader: RecordReader
    records: np.ndarray
    samples: np.ndarray
    offsets: np.ndarray
    left_out: int
    name: str = ""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def digest(self) -> str:
        """See `RecordReader.digest`."""
        return self.reader.digest

    @functools.cached_property
    def selection(self) -> str:
        """sha256 of which samples these are, and of where their lines stand. The manifest says nothing of samples.jsonl."""
        arrays = (self.records, self.samples, self.offsets)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

    def line(self, number: int) -> dict:
        """The sample's line of samples.jsonl, read from disk."""
        with open(os.path.join(self.config.records, SAMPLES), "rb") as file:
            file.seek(int(self.offsets[number]))
            return json.loads(file.readline())

    def lines(self) -> Iterator[dict]:
        """All its samples' lines, in order, in one pass over the file."""
        with open(os.path.join(self.config.records, SAMPLES), "rb") as file:
            for offset in self.offsets:
                file.seek(int(offset))
                yield json.loads(file.readline())

    def only(self, keep: np.ndarray | slice) -> SourceIndex:
        """The samples that a mask (bool [n]) or a slice keeps."""
        kept = {name: getattr(self, name)[keep] for name in ("records", "samples", "offsets")}
        return dataclasses.replace(self, **kept)


def _is_wanted(line: dict, config: SourceConfig) -> bool:
    if config.tasks and line.get("task") not in config.tasks:
        return False
    has = {"video": line["has_video"], "audio": line["has_audio"]}
    return not config.modalities or any(has[name] for name in config.modalities)


def open_source(config: SourceConfig, spec: MediaSpec | None = None, name: str = "") -> SourceIndex:
    """Reads a folder's manifest and sample list; of a sample it keeps 16 bytes.

    Args:
        config: the source.
        spec: what the model expects; None skips the check.
        name: what the mixture calls it.

    Raises:
        UserError: the folder holds no records, or records prepared for another MediaSpec (see
            `RecordReader`), or no sample that `config` wants. The message names folder, field, both values
            and the remedy.
        RecordError: samples.jsonl is damaged, or not the one that belongs to the manifest.
    """
    reader = RecordReader(config.records, spec)
    records, samples, offsets = array.array("i"), array.array("i"), array.array("q")
    offset = total = 0
    tasks_seen = set()
    path = os.path.join(config.records, SAMPLES)
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError as error:
                raise RecordError(
                    f"{path}: line {total + 1} cannot be read ({error}); copy it again or prepare again"
                ) from None
            tasks_seen.add(line.get("task"))
            if _is_wanted(line, config):
                records.append(line["record"])
                samples.append(line["sample"])
                offsets.append(offset)
            offset += len(raw)
            total += 1
    if total != (expected := reader.manifest["counts"]["samples"]):
        raise RecordError(
            f"{path} has {total} lines, manifest.json says {expected}; copy it again or prepare again"
        )
    if not records:
        raise UserError(
            f"{config.records} has {total} samples but none of tasks {list(config.tasks) or 'any'} "
            f"with modalities {list(config.modalities)}; its tasks are {sorted(map(str, tasks_seen))}"
        )
    return SourceIndex(
        config,
        reader,
        np.frombuffer(records, np.int32),
        np.frombuffer(samples, np.int32),
        np.frombuffer(offsets, np.int64),
        total - len(records),
        name,
    )


# Up to this length an epoch's permutation is held in memory; above it, Grain's cipher permutes in O(1). The
# cipher walks cycles of a domain of 65,536, so that short lengths are slow with it (6 ms an index for 10
# samples, 5 us for 10,000).
HELD_PERMUTATION = 65_536


def permutation(seed: int, stream: int, epoch: int, length: int) -> np.ndarray:
    """A permutation of `length` elements, int32, that will be the same for good."""
    sequence = np.random.SeedSequence([seed, stream, epoch])
    # Raw bits and a stable sort: numpy promises both for good, but not what Generator.permutation returns.
    return np.argsort(np.random.PCG64(sequence).random_raw(length), kind="stable").astype(np.int32)


@functools.lru_cache(maxsize=256)  # At most 64 MB.
def _permutation_key(seed: int, stream: int, epoch: int, length: int) -> np.ndarray | int:
    if length <= HELD_PERMUTATION:
        return permutation(seed, stream, epoch, length)
    return int(np.random.SeedSequence([seed, stream, epoch]).generate_state(1)[0])


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
class MixtureOrder:
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

    @functools.cached_property
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

    @functools.cached_property
    def whole_passes(self) -> bool:
        """Whether every epoch holds the same samples, each as often: all weights are whole numbers."""
        return not any(share % len(s) for share, s in zip(self._shares, self.sources, strict=True))

    @property
    def shares(self) -> dict[str, int]:
        """Samples given out per epoch, by source."""
        return {source.name: share for source, share in zip(self.sources, self._shares, strict=True)}

    def locate(self, number: int) -> tuple[int, int]:
        """(source, number within the source) of a sample's global number."""
        source = bisect.bisect_right(self._ends, number)
        return source, number - (self._ends[source] - len(self.sources[source]))

    def source_of(self, numbers: np.ndarray) -> np.ndarray:
        """Which source each of these global numbers belongs to."""
        return np.searchsorted(self._ends, numbers, side="right")

    def line(self, number: int) -> dict:
        """The sample's line of samples.jsonl."""
        source, within = self.locate(number)
        return self.sources[source].line(within)

    @functools.cached_property
    def _order(self) -> MixtureOrder:
        lengths = tuple(len(source) for source in self.sources)
        return MixtureOrder(lengths, self._shares, self.seed if self.shuffle else None)

    def at(self, position: int) -> int:
        """The global sample number at a position of the endless order, in O(1).

        Shuffled, every epoch is another permutation; in it, a source of weight 1 comes once in full.
        """
        source, index = self._order[position]
        length = len(self.sources[source])
        return self._ends[source] - length + index % length

    def epoch(self, epoch: int) -> np.ndarray:
        """The global sample numbers of a whole epoch, int64 [epoch_length], for plans that need them all.

        What `at` gives, as long as nothing that is permuted is longer than HELD_PERMUTATION; beyond, another
        draw.
        """
        parts = []
        for stream, (source, share, end) in enumerate(
            zip(self.sources, self._shares, self._ends, strict=True), start=1
        ):
            length = len(source)
            rounds, within = np.divmod(np.arange(epoch * share, (epoch + 1) * share), length)
            if self.shuffle and share % length:
                for number in range(int(rounds[0]), int(rounds[-1]) + 1):
                    here = rounds == number
                    within[here] = permutation(self.seed, stream, number, length)[within[here]]
            parts.append(within + (end - length))
        numbers = np.concatenate(parts)
        return numbers[permutation(self.seed, 0, epoch, len(numbers))] if self.shuffle else numbers

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """The global sample numbers of positions `start` .. `stop` - 1 of the epochs laid end to end."""
        length = self.epoch_length
        epochs = range(start // length, -(-stop // length))
        joined = np.concatenate([self.epoch(epoch) for epoch in epochs] or [np.zeros(0, np.int64)])
        return joined[start - epochs.start * length :][: stop - start]

    def fingerprint(self, batch_size: int, *more: Any) -> str:
        """Identifies everything that the order of batches depends on, and nothing else.

        Args:
            batch_size: of the global batch.
            more: JSON values of what else the order depends on.
        """
        parts = [
            [
                source.digest,
                source.selection,
                source.config.tasks,
                source.config.modalities,
                source.config.weight,
            ]
            for source in self.sources
        ]
        text = json.dumps([parts, self.seed, self.shuffle, batch_size, *more])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_mixture(
    sources: Mapping[str, SourceConfig] | Sequence[SourceConfig],
    spec: MediaSpec | None = None,
    *,
    seed: int = 0,
    shuffle: bool = True,
) -> Mixture:
    """Opens every source of a positive weight, see `open_source` for what it raises.

    Args:
        sources: by name; the order of the samples goes by the names' alphabet, not by where they stand. A
            sequence names them by position.
        spec: what the model expects; None skips the check.
        seed, shuffle: of the order.
    """
    if isinstance(sources, Mapping):
        named = sorted(sources.items())
    else:
        named = [(str(number), source) for number, source in enumerate(sources)]
    opened = tuple(open_source(source, spec, name) for name, source in named if source.weight)
    if not opened:
        raise UserError(
            "a stage needs at least one source of a positive weight in config.stage.<name>.sources"
        )
    return Mixture(opened, seed, shuffle)
