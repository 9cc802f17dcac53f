"""What the processes of a run tell each other, through JAX's coordination service.

No device takes part, so a thread beside the training may call it: a collective there could meet one of the training's.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed

from avlm_jax.rendezvous import EX_TEMPFAIL
from input_pipeline.errors import UserError

TIMEOUT = 1200  # Seconds. A process that is gone is noticed by the coordination service long before.


class NoAnswer(UserError):
    """A process did not take part; starting all of them again may help."""

    exit_code = EX_TEMPFAIL


class Shared(Exception):
    """What one process raises of this within `Agreement.everywhere`, all raise."""


class Agreement:
    """A sequence of exchanges; each process makes them in the same order, one at a time."""

    _made = itertools.count()

    def __init__(self, name: str) -> None:
        """Every process makes its agreements in the same order."""
        self._prefix = f"avlm/{name}/{next(self._made)}"
        self._rounds = itertools.count()

    def exchange(self, message: str, timeout: int = TIMEOUT) -> list[str]:
        """Every process's message, in order of process; returns when all have sent theirs.

        Raises:
            NoAnswer: a process did not send one within `timeout` seconds; it is named.
        """
        if jax.process_count() == 1:
            return [message]
        client, number, mine = distributed.global_state.client, next(self._rounds), jax.process_index()
        client.key_value_set(f"{self._prefix}/{number}/{mine}", f"={message}")  # A value must not be empty.
        messages = []
        for process in range(jax.process_count()):
            try:
                found = client.blocking_key_value_get(f"{self._prefix}/{number}/{process}", timeout * 1000)
            except jax.errors.JaxRuntimeError as error:
                raise NoAnswer(
                    f"process {process} did not answer within {timeout} s ({self._prefix}, round {number}): {error}"
                ) from error
            messages.append(found[1:])
        if number:  # Who is in this round has read all of the last one.
            client.key_value_delete(f"{self._prefix}/{number - 1}/{mine}")
        return messages

    def everywhere(self, action: Callable[[], Any], shared: type[Shared] = Shared) -> list[Any]:
        """Does `action` and learns how it went in every process: either all go on, or none.

        Returns:
            What it returned in each process, JSON values.

        Raises:
            Exception: what it raised here, or, where it did not, a UserError that names the process where it did.
            Shared: of type `shared`, if it raised nothing worse anywhere; the same text in every process.
        """
        mine: Exception | None = None
        try:
            outcome = {"value": action()}
        except Shared as error:
            outcome = {"shared": str(error)}
        except Exception as error:
            mine, outcome = error, {"failed": f"{type(error).__name__}: {error}"}
        outcomes = [json.loads(message) for message in self.exchange(json.dumps(outcome))]
        if mine is not None:
            raise mine
        for kind, exception in (("failed", UserError), ("shared", shared)):
            for process, found in enumerate(outcomes):
                if kind in found:
                    raise exception(f"process {process}: {found[kind]}" if len(outcomes) > 1 else found[kind])
        return [found["value"] for found in outcomes]
