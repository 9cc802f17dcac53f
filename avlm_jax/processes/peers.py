"""What the processes of a run know of each other, through the key-value store of JAX's coordination service.

No device takes part: where a collective would hang without a word, this still says which process is late, where, and why.
A thread of each process tells once a second where it stands and looks whether another one has failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

BEAT_SECONDS = 1.0
SILENT_BEATS = 5  # So many missed: no sign of life.
POLL_SECONDS = (0.05, 1.0)  # How often a waiting process looks who is there: first and at most.
ANSWER_SECONDS = 5.0  # A coordinator that takes longer is stopped or gone.
LEAVE_SECONDS = 10.0  # How long process 0, which holds the store, stays for the others to read why it ends.
WAIT_SECONDS = 60.0  # Over so long data waits are compared.
MUCH = 0.1  # Of the time.
NAMED = 8
PREFIX = "avlm"
STOP, FAILED, LEFT, FINISHED, STATUS = "stop", "failed", "left", "finished", "status"

# What a process does, in the order in which it comes within a step.
SETS_UP, WAITS, READS, COMPUTES, SAVES, PUBLISHES = (
    "sets up",
    "waits for the other processes",
    "waits for data",
    "computes",
    "saves",
    "publishes the result",
)
PHASES = (SETS_UP, WAITS, READS, COMPUTES, SAVES, PUBLISHES)


class Store(Protocol):
    """The part of `jaxlib`'s DistributedRuntimeClient that is used."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_try_get(self, key: str) -> str: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a process stands.

    Attributes:
        stage: how many stages it has begun.
        step: the step it is at; 0 before it knows.
        phase: of PHASES.
        beat: grows each time it says so.
        waited: seconds that it has waited for data since it started.
    """

    stage: int = 0
    step: int = 0
    phase: str = SETS_UP
    beat: int = 0
    waited: float = 0.0

    @property
    def place(self) -> tuple[int, int, int]:
        """Of two processes the one with the smaller place is behind."""
        return self.stage, self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"{f'at step {self.step}' if self.step else 'before its first step'}; it {self.phase}"


class Lateness:
    """Tells from what processes say, over time, which of them the others wait for."""

    def __init__(self, names: Sequence[str], late: float) -> None:
        """`names`: by process; `late`: seconds after which one is named, and again each time that doubles."""
        self._names, self._late = names, late
        self._last: dict[int, Status] = {}
        self._behind_since: dict[int, float] = {}
        self._beat_at: dict[int, float] = {}
        self._told: dict[int, float] = {}

    def observe(self, now: float, statuses: Mapping[int, Status]) -> list[str]:
        """Lines for people about who has become late, and who goes on after having been named."""
        lines = []
        newest = max((status.place for status in statuses.values()), default=(0, 0, 0))
        for process, status in sorted(statuses.items()):
            last = self._last.get(process)
            if last is None or last.beat != status.beat:
                self._beat_at[process] = now
            moved = last is None or last.place != status.place
            self._last[process] = status
            if moved or status.place == newest:
                begun = self._behind_since.pop(process, now)
                if self._told.pop(process, None) is not None:
                    lines.append(f"{self._names[process]} goes on after {now - begun:.0f} s")
            if status.place < newest:
                begun = self._behind_since.setdefault(process, now)
                seconds, told = now - begun, self._told.get(process)
                if seconds >= (self._late if told is None else 2 * told):
                    self._told[process] = seconds
                    lines.append(self._line(process, seconds, now))
        return lines

    def _silent(self, process: int, now: float) -> float:
        seconds = now - self._beat_at[process]
        return seconds if seconds > SILENT_BEATS * BEAT_SECONDS else 0.0

    def _line(self, process: int, seconds: float, now: float) -> str:
        silent = self._silent(process, now)
        told = f", and has given no sign of life for {silent:.0f} s" if silent else ""
        return f"{self._names[process]} is {seconds:.0f} s late {self._last[process]}{told}"


class DataWait:
    """Tells which processes' data hold the others up, a little in every step, so that none is ever late for long."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._since: tuple[float, dict[int, float]] | None = None

    def observe(self, now: float, statuses: Mapping[int, Status]) -> list[str]:
        """A line every WAIT_SECONDS, if some have waited much longer than the others."""
        waited = {process: status.waited for process, status in statuses.items()}
        if self._since is None or self._since[1].keys() != waited.keys():
            self._since = now, waited
        begun, before = self._since
        if now - begun < WAIT_SECONDS:
            return []
        self._since = now, waited
        shares = {process: (waited[process] - before[process]) / (now - begun) for process in waited}
        usual = statistics.median_low(shares.values())
        slow = sorted((p for p in shares if shares[p] > usual + MUCH), key=lambda p: -shares[p])
        if not slow:
            return []
        told = ", ".join(f"{self._names[process]} {shares[process]:.0%}" for process in slow[:NAMED])
        return [
            f"waiting for data, of the last {now - begun:.0f} s: {told}{' and others' * (len(slow) > NAMED)}; half of the "
            f"processes {usual:.0%} or less. The step waits for the slowest"
        ]


class Behind(NamedTuple):
    """A process that the others wait for.

    Attributes:
        process: its number.
        alive: False if it gives no sign of life.
        text: what to tell people.
    """

    process: int
    alive: bool
    text: str


def find_behind(
    before: Mapping[int, Status], now: Mapping[int, Status], names: Sequence[str]
) -> list[Behind]:
    """Who is behind the furthest process, or has given no sign of life between two looks."""
    newest = max(status.place for status in now.values())
    found = []
    for process, name in enumerate(names):
        status = now.get(process)
        if status is None:
            found.append(Behind(process, False, f"{name} has said nothing yet"))
        elif process in before and before[process].beat == status.beat:
            found.append(Behind(process, False, f"{name} gives no sign of life; it was {status}"))
        elif status.place < newest:
            found.append(Behind(process, True, f"{name} is {status}"))
    return found


class Peers:
    """This process's place among those of the run.

    Args:
        store: the coordination service.
        index: this process's number.
        hosts: names of their machines, by process.
        late: seconds after which a process that the others wait for is named; process 0 prints it.
        patience: seconds that they wait for each other where they meet, see `multihost.ready`.
    """

    def __init__(self, store: Store, index: int, hosts: Sequence[str], late: float, patience: float) -> None:
        self.index, self.hosts, self.patience = index, tuple(hosts), patience
        self.leave_by: float | None = (
            None  # When a run that was told to stop has to be gone, by time.monotonic.
        )
        self.status = Status()
        self._store = store
        names = [self.name(process) for process in range(len(hosts))]
        self._lateness, self._data_wait = Lateness(names, late), DataWait(names)
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    def start(self) -> None:
        """Begins to tell where this process stands and to watch the others."""
        self._tell()
        self._thread.start()

    def name(self, process: int) -> str:
        """ "process 3 (its host)"."""
        return f"process {process} ({self.hosts[process]})"

    def post(self, key: str, value: str) -> bool:
        """Writes an entry that nobody has written; False if there is one, or the store cannot be reached."""
        try:
            self._store.key_value_set(f"{PREFIX}/{key}", value)
        except Exception:  # jaxlib has one type for all that may be wrong.
            return False
        return True

    def look(self, key: str) -> str | None:
        """An entry, or None where nobody has written one, or the store cannot be reached."""
        try:
            return self._store.key_value_try_get(f"{PREFIX}/{key}")
        except Exception:
            return None

    def entries(self, key: str) -> dict[int, str]:
        """What the processes have posted as <key>/<process>."""
        try:
            found = self._store.key_value_dir_get(f"{PREFIX}/{key}/")
        except Exception:
            return {}
        return {int(name.rpartition("/")[2]): value for name, value in found}

    def meet(self, key: str, value: str, seconds: float) -> dict[int, str]:
        """Posts <key>/<this process> and waits, so long at most, until all have; what they have posted, by process."""
        deadline, pause = time.monotonic() + seconds, POLL_SECONDS[0]
        self.post(f"{key}/{self.index}", value)
        while len(found := self.entries(key)) < len(self.hosts) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(1.5 * pause, POLL_SECONDS[1])
        return found

    def behind(self) -> list[Behind]:
        """Who the others wait for, now; it takes a few seconds, whatever has happened to the store."""
        reads: list[dict[int, Status]] = []

        def ask() -> None:
            reads.append(self._statuses())
            time.sleep(2.5 * BEAT_SECONDS)
            reads.append(self._statuses())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS)
        if len(reads) < 2 or not reads[1]:
            return [Behind(0, False, f"{self.name(0)}, which coordinates the run, does not answer")]
        return find_behind(*reads, [self.name(process) for process in range(len(self.hosts))])

    def leave(self, code: int, message: str = "") -> None:
        """Ends this process by `code` and lets the others know why; it does not return.

        JAX would wait for minutes at a barrier that nobody else comes to, and then end by SIGABRT.

        Args:
            code: exit code, not 0. The others end by it as well.
            message: what this process has died of; empty if the others know.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        deadline = self.leave_by or time.monotonic() + LEAVE_SECONDS
        thread = threading.Thread(target=self._say_goodbye, args=(code, message, deadline), daemon=True)
        thread.start()
        thread.join(max(deadline - time.monotonic(), BEAT_SECONDS))
        os._exit(code)

    def _say_goodbye(self, code: int, message: str, deadline: float) -> None:
        if message:
            self.post(FAILED, json.dumps({"process": self.index, "code": code, "message": message}))
        if code > 128:  # By a signal, which the others may not have had.
            self.post(STOP, str(code - 128))
        self.post(f"{LEFT}/{self.index}", str(code))
        while self.index == 0 and time.monotonic() < deadline:
            if len(self.entries(LEFT)) == len(self.hosts):
                return
            time.sleep(0.1)

    def follow(self) -> None:
        """Ends this process, as `leave` does, if another one has said that it has failed."""
        failed = json.loads(self.look(FAILED) or "null")
        if failed is not None and failed["process"] != self.index:
            print(
                f"{self.name(failed['process'])} has ended: {failed['message']}\n"
                f"{self.name(self.index)} ends too, exit code {failed['code']}",
                file=sys.stderr,
                flush=True,
            )
            self.leave(failed["code"])

    def finish(self, seconds: float) -> None:
        """Waits, so long at most, until all have come here, and ends the thread; till then others' failures end this one."""
        self.meet(FINISHED, "1", seconds)
        self._ended.set()
        self._thread.join(ANSWER_SECONDS)  # It may hang with the store.

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._tell()
            self.follow()
            if self.index == 0 and (statuses := self._statuses()):
                now = time.monotonic()
                for line in (
                    *self._lateness.observe(now, statuses),
                    *self._data_wait.observe(now, statuses),
                ):
                    print(line, file=sys.stderr, flush=True)

    def _tell(self) -> None:
        self._beats += 1
        value = json.dumps(dataclasses.astuple(dataclasses.replace(self.status, beat=self._beats)))
        with contextlib.suppress(Exception):
            self._store.key_value_set(f"{PREFIX}/{STATUS}/{self.index}", value, allow_overwrite=True)

    def _statuses(self) -> dict[int, Status]:
        return {process: Status(*json.loads(value)) for process, value in self.entries(STATUS).items()}


# Of a run of several processes; see `multihost.initialize`.
_current: list[Peers] = []


def current() -> Peers | None:
    """This run's, or None where there is one process."""
    return _current[-1] if _current else None


def enter(peers: Peers) -> None:
    """Makes them this run's."""
    _current[:] = [peers]


def announce(make: Callable[[Status], Status]) -> None:
    """Changes what this process says of itself; costs nothing where it is alone."""
    if (peers := current()) is not None:
        peers.status = make(peers.status)
