"""What the processes of a run tell each other, through JAX's coordination service.

No device takes part, so a thread beside the training may call it: a collective there could meet one of the training's.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed

from avlm_jax.processes import peers
from avlm_jax.processes.rendezvous import PeerError
from input_pipeline.errors import UserError

POLL_SECONDS = 5.0  # How often a waiting process looks who is there.
# A process that gives no sign of life for so long is gone. JAX finds out after 100 s, and ends the others by SIGABRT.
LOST_SECONDS = 30.0


class Shared(Exception):
    """What one process raises of this within `Agreement.everywhere`, all raise."""


class Agreement:
    """A sequence of exchanges; each process makes them in the same order, one at a time."""

    _made = itertools.count()

    def __init__(self, name: str, timeout: float) -> None:
        """Every process makes its agreements in the same order.

        Args:
            name: what for, for messages.
            timeout: seconds that a process waits for another one.
        """
        self._name, self._timeout = name, timeout
        self._prefix = f"avlm/{name}/{next(self._made)}"
        self._rounds = itertools.count()

    def exchange(self, message: str) -> list[str]:
        """Every process's message, in order of process; returns when all have sent theirs.

        Raises:
            PeerError: a process is gone, or did not send one in time; it is named, with its host.
        """
        if jax.process_count() == 1:
            return [message]
        client, number, mine = distributed.global_state.client, next(self._rounds), jax.process_index()
        client.key_value_set(f"{self._prefix}/{number}/{mine}", f"={message}")  # A value must not be empty.
        deadline = time.monotonic() + self._timeout
        messages = [
            self._receive(client, number, process, deadline)[1:] for process in range(jax.process_count())
        ]
        if number:  # Who is in this round has read all of the last one.
            client.key_value_delete(f"{self._prefix}/{number - 1}/{mine}")
        return messages

    def _receive(self, client: Any, number: int, process: int, deadline: float) -> str:
        """What `process` has sent in this round."""
        begun = alive_at = time.monotonic()
        while True:
            wait = min(POLL_SECONDS, max(deadline - time.monotonic(), 0.001))
            try:
                return client.blocking_key_value_get(
                    f"{self._prefix}/{number}/{process}", math.ceil(wait * 1000)
                )
            except jax.errors.JaxRuntimeError as error:
                name, alive, told = _ask_after(process)
                now = time.monotonic()
                alive_at = now if alive else alive_at
                if "DEADLINE_EXCEEDED" not in str(error):  # The coordinator cannot be asked.
                    told = told or str(error)
                elif now < min(deadline, alive_at + LOST_SECONDS):
                    continue
                raise PeerError(
                    f"{self._name}: {name} did not come within {now - begun:.0f} s{f' ({told})' if told else ''}; "
                    "see the log of that host, then start all processes again"
                ) from error

    def everywhere(self, action: Callable[[], Any], shared: type[Shared] = Shared) -> list[Any]:
        """Does `action` and learns how it went in every process: either all go on, or none.

        Returns:
            What it returned in each process, JSON values.

        Raises:
            Exception: what it raised here, or, where it did not, a UserError that names the process where it did.
            PeerError: a process is gone, or too late; that may also be why it raised something here.
            Shared: of type `shared`, if it raised nothing worse anywhere; the same text in every process.
        """
        mine: Exception | None = None
        try:
            outcome = {"value": action()}
        except Shared as error:
            outcome = {"shared": str(error)}
        except Exception as error:
            mine, outcome = error, {"failed": f"{type(error).__name__}: {error}"}
        try:
            outcomes = [json.loads(message) for message in self.exchange(json.dumps(outcome))]
        except PeerError as error:
            if mine is None:
                raise
            raise PeerError(f"{error}. Before that, here: {outcome['failed']}") from mine
        if mine is not None:
            raise mine
        for kind, exception in (("failed", UserError), ("shared", shared)):
            for process, found in enumerate(outcomes):
                if kind in found:
                    raise exception(f"process {process}: {found[kind]}" if len(outcomes) > 1 else found[kind])
        return [found["value"] for found in outcomes]


def _ask_after(process: int) -> tuple[str, bool, str]:
    """Its name; whether all of the run, which cannot go on with less, give a sign of life; what is to be told of them."""
    if (here := peers.current()) is None:
        return f"process {process}", True, ""
    found = [behind for behind in here.behind() if behind.process == process or not behind.alive]
    return (
        here.name(process),
        all(behind.alive for behind in found),
        "; ".join(behind.text for behind in found),
    )
