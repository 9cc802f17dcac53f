"""Batches on their way to the devices: a thread places the next ones while the current step runs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Failed(NamedTuple):
    error: BaseException


class Prefetch(Generic[T]):
    """Iterator over `place(next(source))`, at most `depth` of them ahead of the consumer; close it.

    What it has taken from `source` and not given out is lost on closing: who saves a position counts what came
    out here, not what `source` gave out.

    Args:
        source: only this object's thread touches it, until `close`.
        place: puts a batch on its devices, e.g. `put_batch`.
        depth: placed batches that wait; 0 takes and places in the caller's thread.

    Attributes:
        waited: seconds that `next` has waited for a batch so far.

    Raises:
        StopIteration, and whatever `source` or `place` raise: in `next`, at the batch where it happened, with its notes.
    """

    def __init__(self, source: Iterator[Any], place: Callable[[Any], T], depth: int = 2):
        if depth < 0:
            raise ValueError(f"depth is {depth}; it is a number of batches")
        self.waited = 0.0
        self._source, self._place = source, place
        self._ready: queue.SimpleQueue[T | _Failed] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self._failed: _Failed | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True) if depth else None
        if self._thread is not None:
            self._thread.start()

    def _run(self) -> None:
        while True:
            self._room.acquire()
            if self._stopped.is_set():
                return
            try:
                item: T | _Failed = self._place(next(self._source))
            except BaseException as error:  # Raised again where the consumer is; KeyboardInterrupt as well.
                item = _Failed(error)
            self._ready.put(item)
            if isinstance(item, _Failed):
                return

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stopped.is_set():
            raise ValueError("the prefetch is closed")
        if self._failed is not None:
            raise self._failed.error
        begun = time.perf_counter()
        if self._thread is None:
            item: T | _Failed = self._place(next(self._source))
        else:
            item = self._ready.get()
        self.waited += time.perf_counter() - begun
        if isinstance(item, _Failed):
            self._failed = item
            raise item.error
        self._room.release()
        return item

    def close(self) -> None:
        """Ends the thread (a batch that is being made is finished first) and lets go of what was placed."""
        self._stopped.set()
        self._room.release()
        if self._thread is not None:
            self._thread.join()
        self._ready = queue.SimpleQueue()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
