"""Processes that can be killed: work on one file each, under a time limit that holds even inside C code."""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

STARTUP_SECONDS = 120.0  # Importing the decoder takes 0.3 s; a machine ten times overloaded still makes it.
READ_BYTES = 1 << 20


class WorkerFailure(Exception):
    """A worker process that gave no answer; `stage` is "timeout" or "crash"."""

    def __init__(self, reason: str, stage: str) -> None:
        super().__init__(reason)
        self.reason, self.stage = reason, stage


class Worker:
    """A process that answers messages one at a time and is killed when it is late; started when first needed.

    Messages are bytes behind an eight-byte length, on stdin and stdout. A plain subprocess and not
    multiprocessing: it imports what its command imports and nothing of the calling program (JAX, a notebook).
    One thread at a time may call `run`; `stop` may be called from any.

    Args:
        command: what to run; it must send one empty message when it is ready.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: Any = None
        self._stopped = False

    def run(self, message: bytes, timeout: float) -> bytes:
        """Sends a message and returns the answer.

        Raises:
            WorkerFailure: no answer within `timeout` seconds, or the process ended; the next call starts
                another.
            RuntimeError: the process cannot even start; its error output is in the message.
        """
        if self._stopped:
            raise WorkerFailure("the run was stopped", "crash")
        process = self._process or self._start()
        try:
            send(process.stdin.fileno(), message)
            return _receive(process, timeout)
        except TimeoutError:
            process.kill()
            self.join()
            reason = (
                f"was not decoded within the limit of {timeout:g} s; raise --timeout if the file is sound"
            )
            raise WorkerFailure(reason, "timeout") from None
        except (EOFError, OSError):
            code, _ = self.join()
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise WorkerFailure(f"the decoding process was ended {how}", "crash") from None

    def renew(self) -> None:
        """Ends the process, if there is one; the next call of `run` starts another."""
        if self._process is not None:
            self._process.kill()
            self.join()

    def stop(self) -> None:
        """Kills the process and starts no other; `join` must follow."""
        self._stopped = True
        process = self._process
        if process is not None:
            process.kill()

    def join(self) -> tuple[int, str]:
        """Waits for a process that is ending; returns its exit code and the end of its error output."""
        process, self._process = self._process, None
        if process is None:
            return 0, ""
        process.stdin.close()
        process.stdout.close()
        code = process.wait()
        self._stderr.seek(0)
        errors = self._stderr.read()[-4000:].decode(errors="replace")
        self._stderr.close()
        return code, errors

    def _start(self) -> subprocess.Popen[bytes]:
        self._stderr = tempfile.TemporaryFile()
        process = self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, bufsize=0
        )
        try:
            _receive(process, STARTUP_SECONDS)
        except (EOFError, TimeoutError):
            process.kill()
            _, errors = self.join()
            if self._stopped:
                raise WorkerFailure("the run was stopped", "crash") from None
            raise RuntimeError(f"a decoding process could not start:\n{errors}") from None
        return process


class WorkerPool:
    """Workers that threads share: one at a time has a worker, the others wait for one to be free.

    Args:
        command: of each worker.
        size: how many; each is started when first needed.
    """

    def __init__(self, command: Sequence[str], size: int) -> None:
        self._workers = [Worker(command) for _ in range(size)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    @contextlib.contextmanager
    def worker(self) -> Iterator[Worker]:
        """A worker of one's own for a while."""
        worker = self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put(worker)

    def stop(self) -> None:
        """Kills all processes; whoever waits for an answer gets a WorkerFailure. `join` must follow."""
        for worker in self._workers:
            worker.stop()

    def join(self) -> None:
        """Waits for the processes' end; no thread may be using a worker."""
        for worker in self._workers:
            worker.join()


def send(fd: int, message: bytes) -> None:
    """Writes a message behind its length to a file descriptor."""
    view = memoryview(struct.pack("<Q", len(message)) + message)
    while view:
        view = view[os.write(fd, view) :]


def _receive(process: subprocess.Popen[bytes], timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)

        def read(size: int) -> bytes:
            parts, missing = [], size
            while missing:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                part = os.read(process.stdout.fileno(), min(missing, READ_BYTES))
                if not part:
                    raise EOFError
                parts.append(part)
                missing -= len(part)
            return b"".join(parts)

        (size,) = struct.unpack("<Q", read(8))
        return read(size)
