"""Batches by bucket and packed rows: every epoch whole, a pure function of the batch's number."""

from __future__ import annotations

import collections
import pickle
import threading

import numpy as np
import pytest

from input_pipeline.errors import UserError
from input_pipeline.lengths import Lengths
from input_pipeline.mixture import Mixture, SourceConfig, SourceIndex
from input_pipeline.schedule import BucketPlan, PackedPlan, Plan, make_plan

LENGTH, BATCH = 64, 4
WHOLE, FRACTIONS = (1.0, 2.0, 1.0), (1.0, 0.5, 2.0)
MODES = {"plain": {}, "buckets": {"buckets": (16, 32)}, "packed": {"pack": 3}}


def make_mixture(weights=WHOLE, sizes=(23, 14, 9), seed=5, shuffle=True) -> Mixture:
    def source(number: int, size: int, weight: float) -> SourceIndex:
        config = SourceConfig(f"folder{number}", weight=weight)
        zeros = np.zeros(size, np.int32)
        return SourceIndex(config, None, zeros, zeros, zeros, 0, f"s{number}")

    sources = (source(i, *pair) for i, pair in enumerate(zip(sizes, weights, strict=True)))
    return Mixture(tuple(sources), seed, shuffle)


def make(mode: str, mixture: Mixture | None = None, batch_size: int = BATCH) -> Plan:
    mixture = mixture or make_mixture()
    tokens = np.random.default_rng(0).integers(5, LENGTH + 1, len(mixture)).astype(np.int32)
    tokens[::3] //= 4
    tokens = np.maximum(tokens, 5)
    parts, start = [], 0
    for source in mixture.sources:
        stop = start + len(source)
        parts.append(Lengths(tokens[start:stop], *np.zeros((2, stop - start), np.int32)))
        start = stop
    return make_plan(mixture, parts, batch_size=batch_size, length=LENGTH, **MODES[mode])


def visits(plan: Plan, batches: range) -> collections.Counter[int]:
    return collections.Counter(number for batch in batches for number in plan.numbers(batch).tolist())


def expected(mixture: Mixture, positions: int) -> collections.Counter[int]:
    return collections.Counter(mixture.numbers(0, positions).tolist())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weights", [WHOLE, FRACTIONS])
@pytest.mark.parametrize("mode", ["plain", "buckets"])
def test_an_epochs_batches_hold_its_samples_and_those_that_fill_the_last_one(mode, weights, shuffle) -> None:
    mixture = make_mixture(weights, shuffle=shuffle)
    plan = make(mode, mixture)
    for epochs in range(1, 6):
        batches = -(-epochs * mixture.epoch_length // BATCH)
        assert batches == np.ceil(plan.batches_in(epochs))
        assert visits(plan, range(batches)) == expected(mixture, batches * BATCH)


@pytest.mark.parametrize("weights", [WHOLE, FRACTIONS])
@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_any_batch_size_gets_all_samples(weights, batch_size) -> None:
    mixture = make_mixture(weights)
    for mode in ("plain", "buckets"):
        plan = make(mode, mixture, batch_size)
        batches = int(np.ceil(plan.batches_in(3)))
        assert visits(plan, range(batches)) == expected(mixture, batches * batch_size)
    plan = make("packed", mixture, batch_size)
    rows = round(plan.batches_in(3) * batch_size)
    numbers = [n for r in range(rows) for n in plan.row(*divmod(r, batch_size)).numbers]
    assert collections.Counter(numbers) == expected(mixture, 3 * mixture.epoch_length)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weights", [WHOLE, FRACTIONS])
def test_the_rows_of_packed_epochs_hold_exactly_their_samples(weights, shuffle) -> None:
    mixture = make_mixture(weights, shuffle=shuffle)
    plan = make("packed", mixture)
    for epoch in range(5):
        first, last = (round(plan.batches_in(e) * BATCH) for e in (epoch, epoch + 1))
        rows = [plan.row(*divmod(row, BATCH)) for row in range(first, last)]
        found = collections.Counter(number for row in rows for number in row.numbers)
        assert found == collections.Counter(mixture.epoch(epoch).tolist())
        assert all(1 <= len(row.numbers) <= 3 and sum(row.tokens) <= LENGTH for row in rows)
        assert last - first < 0.8 * mixture.epoch_length
    between = plan.batches_in(1.5)
    assert plan.batches_in(1) < between < plan.batches_in(2)


def test_batches_are_of_one_bucket_as_long_as_they_need_and_interleave() -> None:
    mixture = make_mixture((1.0, 1.0, 1.0), sizes=(90, 60, 51))
    plan = make("buckets", mixture)
    assert plan.lengths == (16, 32, LENGTH)
    count = -(-mixture.epoch_length // BATCH)
    lengths = []
    mixed = 0
    for batch in range(count):
        rows = [plan.row(batch, row) for row in range(BATCH)]
        tokens = [row.tokens[0] for row in rows]
        (length,) = {row.length for row in rows}
        lengths.append(length)
        buckets = {min(size for size in plan.lengths if size >= t) for t in tokens}
        assert length == max(buckets)
        mixed += len(buckets) > 1
    assert mixed <= 2  # What was left of a bucket went into the next larger one.
    assert lengths != sorted(lengths) and set(lengths) == set(plan.lengths)
    assert lengths != [plan.row(count + batch, 0).length for batch in range(count)]
    assert plan.fill().text > 1.3 * make("plain", mixture).fill().text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", [WHOLE, FRACTIONS])
def test_any_batch_is_found_without_those_before(mode, weights) -> None:
    plan = make(mode, make_mixture(weights))
    batches = list(range(120))
    walked = [plan.numbers(batch).tolist() for batch in batches]
    assert walked != [make(mode, make_mixture(weights, seed=6)).numbers(batch).tolist() for batch in batches]
    for batch in reversed(batches):
        fresh = make(mode, make_mixture(weights)) if batch % 17 == 0 else plan
        assert fresh.numbers(batch).tolist() == walked[batch]
        assert [n for row in range(BATCH) for n in fresh.row(batch, row).numbers] == walked[batch]
        assert fresh.num_samples(batch) == len(walked[batch])
    sent = pickle.loads(pickle.dumps(plan))
    assert [sent.numbers(batch).tolist() for batch in batches] == walked


@pytest.mark.parametrize("mode", MODES)
def test_threads_agree(mode) -> None:
    mixture = make_mixture(FRACTIONS)
    alone = [make(mode, mixture).numbers(batch).tolist() for batch in range(100)]
    plan, found = make(mode, mixture), {}

    def read(start: int) -> None:
        for batch in range(start, 100, 4):
            found[batch] = plan.numbers(batch).tolist()

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[batch] for batch in range(100)] == alone


def test_what_packing_saves() -> None:
    mixture = make_mixture()
    plain, packed = make("plain", mixture).fill(), make("packed", mixture).fill()
    tokens = make("plain", mixture).tokens[mixture.epoch(0)].sum()
    assert plain.text == pytest.approx(tokens / (plain.rows * LENGTH))
    assert packed.text == pytest.approx(tokens / (packed.rows * LENGTH))
    assert plain.samples == packed.samples == mixture.epoch_length == plain.rows
    assert packed.clips == pytest.approx(mixture.epoch_length / (3 * packed.rows))


def test_the_kind_of_plan_follows_the_options() -> None:
    assert [type(make(mode)) for mode in MODES] == [Plan, BucketPlan, PackedPlan]
    assert make("plain").identity() == []
    identities = {str(make(mode).identity()) for mode in MODES}
    assert len(identities) == 3
    for options, message in (
        ({"buckets": (32, 16)}, "ascending"),
        ({"buckets": (16, 65)}, "at most 64"),
        ({"buckets": (0, 16)}, "ascending"),
        ({"pack": -1}, "pack is -1"),
        ({"pack": 2, "buckets": (16,)}, "exclude each other"),
    ):
        lengths = [
            Lengths(np.ones(len(s), np.int32), *np.zeros((2, len(s)), np.int32))
            for s in make_mixture().sources
        ]
        with pytest.raises(UserError, match=message):
            make_plan(make_mixture(), lengths, batch_size=4, length=LENGTH, **options)
