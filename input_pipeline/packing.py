"""Which samples share a row: packing by the histogram of their lengths.

A row has `length` text positions and room for `clips` samples. The rows are planned for lengths, not for
samples: a pattern of lengths and how often it comes. That takes as long for a million samples as for a
thousand, and every epoch with the same lengths gets the same number of rows, whichever sample comes to lie in
which (Krell et al., "Efficient Sequence Packing without Cross-contamination", 2021, plan by histogram too;
their algorithm knows no limit of samples per row).
"""

from __future__ import annotations

import collections

import numpy as np

Patterns = list[tuple[tuple[int, ...], int]]  # (lengths of one row, longest first; how many such rows)


def plan_patterns(counts: np.ndarray, length: int, clips: int) -> Patterns:
    """Rows for a histogram of lengths, as few as the better of three greedy rules needs.

    Each row takes the longest sample there is, then again and again the longest that fits what is left, with a
    reserve held back for the slots behind it: nothing (few long samples fill a row), the shortest sample there
    is (every slot is to be filled), or the mean one.

    Args:
        counts: int [length + 1], how many samples have each length; counts[0] is 0.
        length: text positions of a row.
        clips: most samples in a row.
    """
    plans = [_fill(counts, length, clips, rule) for rule in ("nothing", "shortest", "mean")]
    return min(plans, key=num_rows)


def num_rows(patterns: Patterns) -> int:
    return sum(times for _, times in patterns)


class _Stock:
    """How many samples of each length are left; finds the longest of at most some length."""

    def __init__(self, counts: np.ndarray):
        self.counts = [int(count) for count in counts]
        self._below = [x if count else x - 1 for x, count in enumerate(self.counts)]
        self.samples = sum(self.counts)
        self.tokens = sum(x * count for x, count in enumerate(self.counts))
        self._shortest = 1

    def longest(self, limit: int) -> int:
        """The longest length that is left and at most `limit`; 0 if there is none."""
        root = limit
        while root > 0 and self._below[root] != root:
            root = self._below[root]
        while limit > 0 and self._below[limit] != limit:
            self._below[limit], limit = root, self._below[limit]
        return max(root, 0)

    def shortest(self) -> int:
        while not self.counts[self._shortest]:
            self._shortest += 1
        return self._shortest

    def take(self, length: int, count: int) -> None:
        self.counts[length] -= count
        self.samples -= count
        self.tokens -= length * count
        if not self.counts[length]:
            self._below[length] = length - 1


def _fill(counts: np.ndarray, length: int, clips: int, rule: str) -> Patterns:
    stock = _Stock(counts)
    patterns: Patterns = []
    while stock.samples:
        reserve = {"nothing": 0, "shortest": stock.shortest(), "mean": stock.tokens // stock.samples}[rule]
        pattern = _one_row(stock, length, clips, reserve)
        times = min(stock.counts[x] // uses for x, uses in pattern.items())
        for x, uses in pattern.items():
            stock.take(x, times * uses)
        patterns.append((tuple(sorted(pattern.elements(), reverse=True)), times))
    return patterns


def _one_row(stock: _Stock, length: int, clips: int, reserve: int) -> collections.Counter[int]:
    pattern: collections.Counter[int] = collections.Counter()
    room = length
    for slot in range(clips):
        held_back = reserve * (clips - slot - 1) if slot else 0
        found = _available(stock, pattern, room - held_back) or _available(stock, pattern, room)
        if not found:
            break
        pattern[found] += 1
        room -= found
    return pattern


def _available(stock: _Stock, pattern: collections.Counter[int], limit: int) -> int:
    found = stock.longest(limit)
    while found and stock.counts[found] <= pattern[found]:
        found = stock.longest(found - 1)
    return found


def assign(patterns: Patterns, numbers: np.ndarray, lengths: np.ndarray, clips: int) -> np.ndarray:
    """Samples into the slots of their lengths.

    Args:
        patterns: from `plan_patterns` of the histogram of `lengths`.
        numbers: the samples, in the order in which they take the slots of their length.
        lengths: theirs.
        clips: slots of a row.

    Returns:
        int32 [rows, clips]: the samples of each row, the longest first, then -1 for empty slots.
    """
    slots = np.zeros((len(patterns), clips), np.int32)
    for row, (pattern, _) in enumerate(patterns):
        slots[row, : len(pattern)] = pattern
    slots = np.repeat(slots, [times for _, times in patterns], axis=0).reshape(-1)
    by_length = np.argsort(slots, kind="stable")
    rows = np.full(len(slots), -1, np.int32)
    rows[by_length[len(slots) - len(numbers) :]] = numbers[np.argsort(lengths, kind="stable")]
    return rows.reshape(-1, clips)
