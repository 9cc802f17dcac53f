"""When to save: often enough that a kill at any time costs no more than was allowed."""

from __future__ import annotations

import time
from collections.abc import Callable

from avlm_jax.processes.multihost import gather


class SaveSchedule:
    """After which steps a checkpoint is begun; every process asks after every step, and all get the same answer.

    One is begun every half of what a kill may cost. A checkpoint that is being written at the kill is lost as well, but never
    the one before, which is complete before the next begins.
    """

    def __init__(
        self,
        max_lost_steps: int,
        max_lost_minutes: float,
        *,
        look_every: int,
        start: int,
        total: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        max_lost_steps: that a kill may cost, at least 2.
        max_lost_minutes: about as many; 0: steps alone count. They become steps by the pace of the last ones.
        look_every: steps between two looks at the clock, process 0's; the processes tell each other then.
        start, total: steps done before, and steps in all; the last one is always saved.
        clock: seconds.
        """
        self._every, self._seconds = max_lost_steps // 2, 60 * max_lost_minutes / 2
        self._look_every, self._total, self._clock = look_every, total, clock
        self._looked = self._saved = clock()
        self._looked_after = start
        # The next step to save for the time's sake, and how many then lie between two.
        self._at = self._stride = 0

    def due(self, number: int) -> bool:
        """Whether to save after step `number`."""
        if self._seconds and number % self._look_every == 0:
            self._at, self._stride = map(int, gather("save", self._look(number))[0].split())
        return number % self._every == 0 or number in (self._at, self._total)

    def saved(self, number: int) -> None:
        """Step `number` is being saved."""
        self._saved = self._clock()
        self._at = number + self._stride

    def _look(self, number: int) -> str:
        """This process's view of `_at` and `_stride`."""
        now = self._clock()
        pace = max(now - self._looked, 1e-6) / max(number - self._looked_after, 1)
        self._looked, self._looked_after = now, number
        left = self._seconds - (now - self._saved)
        return f"{number + max(0, int(left / pace))} {max(1, int(self._seconds / pace))}"
