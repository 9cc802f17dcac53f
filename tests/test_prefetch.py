"""The next batches are placed while a step runs; nothing of order, errors or positions changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from avlm_jax.prefetch import Prefetch


def counting(stop: int | None = None, log: list[int] | None = None) -> Iterator[int]:
    number = 0
    while stop is None or number < stop:
        if log is not None:
            log.append(number)
        yield number
        number += 1


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_all_comes_in_order_and_then_the_end(depth: int) -> None:
    with Prefetch(counting(20), lambda x: 10 * x, depth) as batches:
        assert list(batches) == [10 * x for x in range(20)]
        with pytest.raises(StopIteration):
            next(batches)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_at_most_so_many_are_placed_ahead(depth: int) -> None:
    log: list[int] = []
    with Prefetch(counting(log=log), lambda x: x, depth) as batches:
        wait_until(lambda: len(log) == depth)
        for number in range(5):
            assert next(batches) == number
            wait_until(lambda ahead=number + 1: len(log) == ahead + depth)
            time.sleep(0.01)
            assert len(log) == number + 1 + depth


def test_placing_goes_on_while_the_consumer_works() -> None:
    here = threading.get_ident()
    placed_by = []
    with Prefetch(counting(3), lambda x: placed_by.append(threading.get_ident()) or x) as batches:
        next(batches)
        wait_until(lambda: len(placed_by) == 3)  # Nobody asked for them yet.
    assert here not in placed_by
    with Prefetch(counting(3), lambda x: placed_by.append(threading.get_ident()) or x, 0) as batches:
        next(batches)
    assert placed_by[3:] == [here]


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_comes_up_at_its_batch_with_its_notes(depth: int, kind: type[BaseException]) -> None:
    def place(number: int) -> int:
        if number == 4:
            error = kind("bad batch")
            error.add_note("while reading sample 7")
            raise error
        return number

    with Prefetch(counting(), place, depth) as batches:
        assert [next(batches) for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(kind, match="bad batch") as caught:
            next(batches)
        assert caught.value.__notes__ == ["while reading sample 7"]
        if depth:  # It is over: the thread has ended.
            with pytest.raises(kind):
                next(batches)


def test_closing_ends_the_thread_also_where_nobody_asks() -> None:
    before = threading.active_count()
    for taken in (0, 1, 3):
        batches = Prefetch(counting(), lambda x: x)
        for _ in range(taken):
            next(batches)
        batches.close()
        batches.close()
        assert threading.active_count() == before
        with pytest.raises(ValueError, match="closed"):
            next(batches)


def test_waiting_is_measured() -> None:
    def slow() -> Iterator[int]:
        while True:
            time.sleep(0.05)
            yield 0

    for depth in (0, 2):
        with Prefetch(slow(), lambda x: x, depth) as batches:
            for _ in range(3):
                next(batches)
            assert 0.1 < batches.waited < 5
    with Prefetch(counting(), lambda x: x) as batches:
        wait_until(lambda: batches._ready.qsize() == 2)
        next(batches)
        assert batches.waited < 0.05
    with pytest.raises(ValueError, match="depth is -1"):
        Prefetch(counting(), lambda x: x, -1)
