"""Progress of long work: a bar on a terminal, plain lines elsewhere (logs, CI, notebooks' pipes)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

PLAIN_LINE_SECONDS = (
    15.0  # How often a non-terminal gets a line: enough to see life, not enough to drown a log.
)


def track(iterable: Iterable[T], total: int | None = None, label: str = "", unit: str = "it") -> Iterator[T]:
    """Yields the items of `iterable` while reporting progress on stderr.

    Args:
        iterable: what to walk through.
        total: number of items; taken from `len(iterable)` when it has one.
        label: short text in front of the bar.
        unit: what one item is called.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        yield from tqdm(iterable, total=total, desc=label, unit=unit, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= PLAIN_LINE_SECONDS:
            last = now
            of = f"/{total}" if total is not None else ""
            print(f"{label}: {done}{of} {unit}, {now - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{label}: {done} {unit} done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
