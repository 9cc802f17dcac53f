"""Rows planned from a histogram of lengths: everything in, nothing twice, nearly as few rows as there can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.packing import assign, num_rows, plan_patterns


def _bound(tokens: np.ndarray, length: int, clips: int) -> int:
    return max(-(-len(tokens) // clips), -(-int(tokens.sum()) // length))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(1, 5), st.randoms())
def test_every_sample_lies_in_one_row_that_holds_it(tokens, clips, random) -> None:
    tokens = np.array(tokens, np.int32)
    patterns = plan_patterns(np.bincount(tokens, minlength=21), 20, clips)
    numbers = np.array(random.sample(range(1000), len(tokens)))
    rows = assign(patterns, numbers, tokens, clips)
    assert rows.shape == (num_rows(patterns), clips)
    assert sorted(rows[rows >= 0].tolist()) == sorted(numbers.tolist())
    of = dict(zip(numbers.tolist(), tokens.tolist(), strict=True))
    for row in rows:
        filled = row[row >= 0]
        assert len(filled) and (row[: len(filled)] >= 0).all()  # Empty slots come last.
        assert sum(of[number] for number in filled.tolist()) <= 20


def test_a_plan_by_hand() -> None:
    counts = np.bincount([6, 6, 4, 4, 10], minlength=11)
    assert sorted(plan_patterns(counts, 10, 2)) == [((6, 4), 2), ((10,), 1)]
    # Always the longest that fits would pair the long ones and leave the short ones to fill rows with three of ten.
    counts = np.bincount([5] * 4 + [1] * 8, minlength=11)
    assert plan_patterns(counts, 10, 3) == [((5, 1, 1), 4)]


@pytest.mark.parametrize("clips", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "skewed", "two lengths", "uniform"])
def test_rows_are_nearly_as_few_as_can_be(kind: str, clips: int) -> None:
    rng = np.random.default_rng(0)
    tokens = {
        "normal": rng.normal(450, 120, 20_000),
        "skewed": 256 + rng.lognormal(5, 0.9, 20_000),
        "two lengths": np.where(rng.random(20_000) < 0.5, 1000, 300),
        "uniform": rng.integers(260, 2049, 20_000),
    }[kind]
    tokens = np.clip(tokens, 260, 2048).astype(np.int32)
    patterns = plan_patterns(np.bincount(tokens, minlength=2049), 2048, clips)
    # The bound itself cannot be reached: of two lengths, 1000 and 1000 leave 48 positions that nothing fits.
    assert num_rows(patterns) <= 1.06 * _bound(tokens, 2048, clips)


def test_samples_of_one_length_change_rows_with_the_order_they_come_in() -> None:
    tokens = np.array([3] * 6, np.int32)
    patterns = plan_patterns(np.bincount(tokens, minlength=8), 7, 2)
    assert assign(patterns, np.arange(6), tokens, 2).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert assign(patterns, np.array([4, 0, 5, 1, 3, 2]), tokens, 2).tolist() == [[4, 0], [5, 1], [3, 2]]
