"""Ends a run that is stuck: a hung collective, loader or disk would else wait for ever, and cost money.

The loop says what it is about to do. When that takes longer than its limit, the stacks are written, the processes behind are
named, and the process ends with exit code 75, on which a launcher starts all of them again, from the newest checkpoint.
A process in which no Python thread can run any more (native code keeps the interpreter's lock) writes its stacks and ends by
SIGALRM, which a shell calls 142; launchers start that again as well.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from avlm_jax.processes import peers
from avlm_jax.processes.multihost import Timeouts
from avlm_jax.processes.rendezvous import EX_TEMPFAIL

T = TypeVar("T")

TICK_SECONDS = 0.5
# So much after a limit faulthandler's own thread, which needs no lock, writes the stacks of a process in which no Python thread
# can run, and DUMP_SECONDS later SIGALRM ends it. Not faulthandler's exit=True: its exit code is 1, after which nothing starts
# again. No other part of the process may use SIGALRM (the decoders do, each in a process of its own).
FROZEN_SECONDS = 60.0
DUMP_SECONDS = 5.0


class Watchdog:
    """Watches over one run in a thread of its own; use it in a `with`.

    Args:
        timeouts: limits of the phases.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._folder: Path | None = None
        self._stage, self._step = "", 0
        self._first: int | None = None
        self._lock = threading.Lock()
        self._phase, self._since = peers.SETS_UP, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def stage(self, name: str, folder: Path) -> None:
        """A stage begins; `folder` gets the stacks."""
        with self._lock:
            self._stage, self._folder, self._step, self._first = name, folder, 0, None
        peers.announce(lambda status: peers.Status(status.stage + 1, waited=status.waited))
        self.at(peers.SETS_UP)

    def step(self, number: int) -> None:
        """A step begins."""
        with self._lock:
            self._step = number
            self._first = number if self._first is None else self._first
        self.at(peers.READS)

    def at(self, phase: str) -> None:
        """Says what comes next, one of `peers.PHASES`."""
        with self._lock:
            # A micro-batch has one limit for its data and for computing: whoever waits for the device may be at either.
            if phase != peers.COMPUTES:
                self._since = time.monotonic()
            self._phase, step = phase, self._step
        peers.announce(lambda status: dataclasses.replace(status, step=step, phase=phase))

    def reading(self, batches: Iterator[T]) -> Iterator[T]:
        """`batches`, while which are waited for the phase is another one than while they are computed."""
        while True:
            self.at(peers.READS)
            begun = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            seconds = time.monotonic() - begun
            peers.announce(
                lambda status, more=seconds: dataclasses.replace(status, waited=status.waited + more)
            )
            self.at(peers.COMPUTES)
            yield batch

    def describe(self) -> str:
        """ "stage 2a, step 120: it computes". Takes no lock: a signal's handler asks, whatever its thread was doing."""
        where = f", step {self._step}" if self._step else ""
        return f"stage {self._stage}{where}: it {self._phase}" if self._stage else "before the first stage"

    def _limit(self) -> tuple[str, float]:
        """Name in config.timeouts and seconds."""
        if self._phase in (peers.SETS_UP, peers.WAITS):
            name = "ready"
        elif self._phase in (peers.SAVES, peers.PUBLISHES):
            name = "save"
        else:
            name = "first_step" if self._step == self._first else "step"
        return name, getattr(self._timeouts, name)

    def __enter__(self) -> Watchdog:
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _run(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            with self._lock:
                (name, limit), seconds = self._limit(), time.monotonic() - self._since
            if seconds > limit:
                self._bark(name, seconds)
            frozen = limit - seconds + FROZEN_SECONDS
            if (stream := _real_stderr()) is not None:
                faulthandler.dump_traceback_later(frozen, file=stream)
            # Its default action is the kernel's: it needs neither a lock nor a thread that can run. Every tick puts it off.
            signal.setitimer(signal.ITIMER_REAL, frozen + DUMP_SECONDS)

    def _bark(self, name: str, seconds: float) -> None:
        here = peers.current()
        told = f"{self.describe()} for {seconds:.0f} s, longer than config.timeouts.{name} allows"
        if here is not None:
            behind = [found.text for found in here.behind()]
            told += "; " + ("; ".join(behind) or "all processes are at the same place")
        stacks = self._dump(here.index if here is not None else 0)
        told += f". {stacks}Start the same command again (all processes of it): it continues from the newest checkpoint"
        if (stream := _real_stderr()) is not None:
            print(f"stuck: {told}", file=stream, flush=True)
        if here is not None:
            here.leave(EX_TEMPFAIL, told)
        os._exit(EX_TEMPFAIL)

    def _dump(self, process: int) -> str:
        """Writes the stacks of all threads; returns where to."""
        if (stream := _real_stderr()) is not None:
            faulthandler.dump_traceback(stream, all_threads=True)
        if self._folder is None:
            return ""
        path = self._folder / f"stacks-{process}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            return f"Its stacks are above ({path}: {error.strerror}). "
        return f"Its stacks are in {path}. "


def _real_stderr() -> TextIO | None:
    """A stderr with a descriptor, which notebooks and tests put something else in place of."""
    for stream in (sys.stderr, sys.__stderr__):
        try:
            if stream is not None:
                stream.fileno()
                return stream
        except (OSError, ValueError, AttributeError):
            continue
    return None
