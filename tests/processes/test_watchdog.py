"""A loop that does not get on ends, with its stacks on file; one that is slow within its limits is left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avlm_jax.processes import peers
from avlm_jax.processes.multihost import Timeouts
from avlm_jax.processes.watchdog import DUMP_SECONDS, FROZEN_SECONDS, Watchdog
from tests.process_group import ROOT

STUCK = """
import sys, time
from pathlib import Path
from avlm_jax.processes import peers
from avlm_jax.processes.multihost import Timeouts
from avlm_jax.processes.watchdog import Watchdog

def hangs():
    {body}

with Watchdog(Timeouts(first_step=2.0, step=1.0, save=1.0, ready=1.0)) as watchdog:
    watchdog.stage("2a", Path(sys.argv[1]))
    {before}
    hangs()
"""
# Holds the interpreter's lock: no Python thread can run any more.
FROZEN = "import ctypes; ctypes.PyDLL(None).sleep(100)"


def run(folder: Path, before: str, body: str = "time.sleep(60)") -> subprocess.CompletedProcess[str]:
    code = STUCK.format(before=before, body=body)
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=90
    )


def test_a_stuck_step_ends_with_its_stacks(tmp_path: Path) -> None:
    before = (
        "watchdog.step(7); list(watchdog.reading(iter('ab'))); watchdog.step(8); watchdog.at(peers.COMPUTES)"
    )
    found = run(tmp_path / "2a", before)
    assert found.returncode == 75
    assert (
        "stuck: stage 2a, step 8: it computes for 1 s, longer than config.timeouts.step allows"
        in found.stderr
    )
    assert f"Its stacks are in {tmp_path}/2a/stacks-0.txt. Start the same command again" in found.stderr
    assert " in hangs" in (tmp_path / "2a" / "stacks-0.txt").read_text() and " in hangs" in found.stderr


def test_an_interpreter_that_is_frozen_ends_too(tmp_path: Path) -> None:
    """By SIGALRM, which launchers start again (tests/launch/test_supervise.py); exit code 1 would be the end."""
    limits = "import avlm_jax.processes.watchdog as w; w.FROZEN_SECONDS, w.DUMP_SECONDS = 1.0, 2.0; "
    found = run(tmp_path, limits + "watchdog.at(peers.SAVES); time.sleep(0.7)", FROZEN)
    assert found.returncode == -signal.SIGALRM, found.stderr
    assert " in hangs" in found.stderr and "Timeout" in found.stderr


def test_no_alarm_outlives_a_watchdog(tmp_path: Path) -> None:
    with Watchdog(Timeouts(step=50.0, ready=50.0)) as watchdog:
        deadline = time.monotonic() + 30
        while not (left := signal.getitimer(signal.ITIMER_REAL)[0]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert 100 < left <= 50 + FROZEN_SECONDS + DUMP_SECONDS
        # Every tick puts it off: what comes next has a limit of its own.
        watchdog.at(peers.SAVES)
        while signal.getitimer(signal.ITIMER_REAL)[0] < 900:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    "phase, step, name",
    [
        (peers.SETS_UP, None, "ready"),
        (peers.WAITS, None, "ready"),
        (peers.READS, 5, "first_step"),
        (peers.COMPUTES, 5, "first_step"),
        (peers.READS, 6, "step"),
        (peers.COMPUTES, 6, "step"),
        (peers.SAVES, 6, "save"),
        (peers.PUBLISHES, 6, "save"),
    ],
)
def test_every_phase_has_its_own_limit(phase: str, step: int | None, name: str, tmp_path: Path) -> None:
    limits = {"ready": 1.5, "first_step": 2.5, "step": 3.5, "save": 4.5}
    watchdog = Watchdog(Timeouts(**limits))
    watchdog.stage("1a", tmp_path)
    for number in range(5, (step or 4) + 1):  # A run that continues after step 4.
        watchdog.step(number)
    watchdog.at(phase)
    assert watchdog._limit() == (name, limits[name])
    watchdog.stage("1b", tmp_path)  # The next stage compiles again.
    watchdog.step(1)
    assert watchdog._limit()[0] == "first_step"


def test_waiting_for_data_is_told_from_computing(tmp_path: Path) -> None:
    watchdog = Watchdog(Timeouts())
    assert watchdog.describe() == "before the first stage"
    watchdog.stage("1a", tmp_path)
    told = []

    def batches():
        for name in "ab":
            told.append(watchdog.describe())
            yield name

    watchdog.step(3)
    for _ in watchdog.reading(batches()):
        told.append(watchdog.describe())
    assert told == [f"stage 1a, step 3: it {phase}" for phase in ("waits for data", "computes") * 2]
