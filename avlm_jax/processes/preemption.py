"""SIGTERM (a preempted machine, a launcher) and Ctrl-C: the run saves at the next step and ends, to be continued.

    while it steps    all processes stop after the same step, save it and end; a signal to one of them is enough
    elsewhere         it ends at once; what was saved before stands
    stuck in C++      (compiling, a collective) no Python handler can run: after config.timeouts.grace a thread ends the
                      process. A checkpoint that is being written then is left out when the run continues.

Exit codes are those of shells: 143 after SIGTERM, 130 after Ctrl-C. A second Ctrl-C ends the process on the spot.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

from avlm_jax.processes import peers

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LEAVE_SECONDS = 3.0  # After the grace, for the processes to end together.
POLL_SECONDS = 0.5  # How often the store is asked whether another process has been told to stop.


class Stopped(KeyboardInterrupt):
    """The run was told to stop. Like Ctrl-C it is no Exception: whoever expects errors does not take it for one.

    Attributes:
        exit_code: 128 + the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignal:
    """Watches for signals to stop, in all processes of a run; use it in a `with`, in the main thread.

    Elsewhere than in the main thread it does nothing: Python takes no handlers there.

    Args:
        grace: seconds from the signal to the end of the process, whatever it is doing.
        describe: what the process is doing, for messages.
    """

    def __init__(self, grace: float, describe: Callable[[], str] = lambda: "") -> None:
        self._grace, self._describe = grace, describe
        self._signum: int | None = None  # Set by Python's handler, in the main thread.
        self._heard: float | None = None  # Set by the thread: when it has heard of a signal, and of which.
        self._told: int | None = None
        self._interrupts = 0
        self._deferred = False
        self._lock = threading.Lock()  # Held while the processes agree on a step.
        self._boundary: int | None = None
        self._stop_at: int | None = None
        self._alone = (
            False  # Whether a process is not in the loop: it ends at once, and the others' step never does.
        )
        self._ended = threading.Event()
        self._timer = threading.Timer(grace, self._give_up)  # Of its own: the thread may hang with the store.
        self._timer.daemon = True
        self._thread = threading.Thread(target=self._watch, name="stop signal", daemon=True)
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopSignal:
        if self._active:
            jax.devices()  # libtpu takes SIGTERM for itself when it starts; who comes later has it.
            self._read, self._write = socket.socketpair()
            self._write.setblocking(False)
            self._old: list[Any] = [signal.getsignal(signum) for signum in SIGNALS]
            self._install()
            self._old_descriptor = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not self._active:
            return
        self._ended.set()
        self._timer.cancel()
        self._write.send(b"\0")  # Wakes the thread.
        self._thread.join(2 * POLL_SECONDS)  # It may hang with the store.
        signal.set_wakeup_fd(self._old_descriptor)
        for signum, handler in zip(SIGNALS, self._old, strict=True):
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        if not self._thread.is_alive():
            self._read.close()
            self._write.close()

    def _install(self) -> None:
        for signum in SIGNALS:
            signal.signal(signum, self._handle)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In here a signal waits for `reached`."""
        if self._active:
            self._install()  # Whatever has been loaded since may have taken the signals.
        self._deferred = True
        try:
            yield
        except Exception as error:
            if self._signum is None:
                raise
            # A launcher's signal reaches the loader's worker processes as well, and they end before they are asked.
            raise self._stopped(f"({self._describe()}; {type(error).__name__}: {error})") from error
        finally:
            self._deferred = False
            with self._lock:
                self._boundary = None
        if self._signum is not None:
            raise self._stopped("after its last step")

    def reached(self, step: int) -> bool:
        """Whether the run ends after `step`; every process gets the same answer for the same step.

        The loop asks between two steps, once each, and when the answer is yes it saves and calls `end`.
        """
        with self._lock:
            self._boundary = step
            if peers.current() is None:
                return self._signum is not None
            return self._stop_at is not None and step >= self._stop_at

    def end(self, step: int) -> None:
        """Raises Stopped; `step` has been saved."""
        raise self._stopped(f"at step {step}")

    def _stopped(self, where: str) -> Stopped:
        signum = self._signum or self._told or signal.SIGTERM
        return Stopped(
            f"stopped by {signal.Signals(signum).name} {where}; the same command continues", signum
        )

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first, self._signum = self._signum is None, self._signum or self._told or signum
        if first and not self._deferred:
            raise self._stopped(f"({self._describe()})" if self._describe() else "before its first step")
        if first and signum == signal.SIGINT:
            print("stopping after this step; Ctrl-C once more ends it at once", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        here, agreed = peers.current(), False
        while not self._ended.is_set():
            if select.select([self._read], [], [], POLL_SECONDS)[0]:
                for signum in self._read.recv(4096):  # A byte for each signal.
                    self._interrupts += signum == signal.SIGINT
                    if signum in SIGNALS and self._heard is None:
                        self._hear(signum)
                if self._interrupts > 1:
                    os._exit(128 + signal.SIGINT)
            if here is not None and self._heard is None and (found := here.look(peers.STOP)) is not None:
                self._hear(int(found))
                os.kill(os.getpid(), signal.SIGTERM)  # Python's handler in the main thread, if it can run.
            if here is not None and self._heard is not None and not agreed:
                agreed = self._agree(here)
            if here is not None and self._alone and self._deferred and here.entries(peers.LEFT):
                self._give_up("Another process was not at a step, and has ended")

    def _hear(self, signum: int) -> None:
        self._heard, self._told = time.monotonic(), signum
        self._timer.start()
        if (here := peers.current()) is not None:
            here.leave_by = self._heard + self._grace + LEAVE_SECONDS
            here.post(peers.STOP, str(signum))

    def _agree(self, here: peers.Peers) -> bool:
        """Which step is the last one: the first that no process has begun beyond. The loop waits meanwhile."""
        with self._lock:
            here.post(f"{peers.STOP}/{here.index}", str(-1 if self._boundary is None else self._boundary))
            while len(found := here.entries(peers.STOP)) < len(here.hosts):
                if self._ended.is_set() or time.monotonic() - (self._heard or 0) > self._grace:
                    return True  # One of them does not answer: this process ends without saving.
                time.sleep(0.05)
            boundaries = [int(value) for value in found.values()]
            self._stop_at, self._alone = 1 + max(boundaries), min(boundaries) < 0
        return True

    def _give_up(self, why: str = "") -> None:
        """Ends the process, whatever its main thread is doing."""
        stopped = self._stopped(f"({self._describe()})")
        why = why or f"It came to no end within {self._grace:g} s (config.timeouts.grace)"
        sys.stdout.flush()
        print(
            f"{stopped}. {why}, so nothing more was saved; the newest checkpoint stands",
            file=sys.stderr,
            flush=True,
        )
        if (here := peers.current()) is not None:
            here.leave(stopped.exit_code)
        os._exit(stopped.exit_code)
