"""SIGTERM and Ctrl-C: the loop ends between two steps, everything else at once, and what hangs after its grace."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from avlm_jax.processes import preemption
from avlm_jax.processes.preemption import Stopped, StopSignal
from tests.process_group import STEPPING, Group

GRACE = 20.0


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(0.05)  # Python's handler runs between two instructions.


def test_elsewhere_than_in_the_loop_a_signal_ends_it_at_once() -> None:
    with pytest.raises(
        Stopped, match=r"stopped by SIGTERM \(loading\); the same command continues"
    ) as stopped:
        with StopSignal(GRACE, lambda: "loading"):
            send(signal.SIGTERM)
            raise AssertionError("it goes on")
    assert stopped.value.exit_code == 143


def test_nobody_takes_it_for_an_error() -> None:
    """Orbax's restore, for one, would take a sound checkpoint for a damaged one."""
    assert not issubclass(Stopped, Exception)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_in_the_loop_it_waits_for_the_end_of_the_step(signum: int, code: int) -> None:
    done = []
    with pytest.raises(Stopped, match="at step 2; the same command continues") as stopped:
        with StopSignal(GRACE) as stop, stop.deferred():
            for step in range(1, 9):
                if stop.reached(step - 1):
                    done.append("saved")
                    stop.end(step - 1)
                done.append(f"begins {step}")
                if step == 2:
                    send(signum)
                done.append(f"ends {step}")
    assert done == ["begins 1", "ends 1", "begins 2", "ends 2", "saved"]
    assert stopped.value.exit_code == code


def test_after_the_last_step_it_ends_all_the_same() -> None:
    with pytest.raises(Stopped, match="after its last step"), StopSignal(GRACE) as stop, stop.deferred():
        send(signal.SIGTERM)


def test_an_error_that_comes_of_stopping_is_told_as_stopping() -> None:
    with pytest.raises(Stopped, match="OSError: a worker is gone") as stopped:
        with StopSignal(GRACE) as stop, stop.deferred():
            send(signal.SIGTERM)
            raise OSError("a worker is gone")
    assert isinstance(stopped.value.__cause__, OSError)
    with pytest.raises(OSError, match="gone"), StopSignal(GRACE) as stop, stop.deferred():
        raise OSError("a worker is gone")


def test_afterwards_signals_are_as_before() -> None:
    before = [signal.getsignal(signum) for signum in preemption.SIGNALS]
    with StopSignal(GRACE) as stop:
        assert not stop.reached(1)
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    assert [signal.getsignal(signum) for signum in preemption.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_signals_that_a_library_has_taken_are_taken_back() -> None:
    with StopSignal(GRACE) as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with pytest.raises(Stopped), stop.deferred():
            send(signal.SIGTERM)
            assert stop.reached(0)
            stop.end(0)


def start(folder: Path, *options: str) -> Group:
    return Group(folder, [str(folder), "1000", *options], code={0: STEPPING})


def test_what_hangs_outside_of_python_ends_after_its_grace(tmp_path: Path) -> None:
    with start(tmp_path, "compiles=1", "grace=2") as group:
        group.until(lambda: "compiles" in group.text())
        sent = group.send(signal.SIGTERM)
        assert group.wait() == {0: 143}
        assert 2 < time.monotonic() - sent < 12
        told = group.text()
    assert "stopped by SIGTERM (stage toy, step 1: it computes); the same command continues" in told
    assert "came to no end within 2 s (config.timeouts.grace)" in told and "newest checkpoint stands" in told


def test_a_second_ctrl_c_ends_it_on_the_spot(tmp_path: Path) -> None:
    with start(tmp_path, "compiles=1", "grace=60") as group:
        group.until(lambda: "compiles" in group.text())
        group.send(signal.SIGINT)
        with pytest.raises(AssertionError, match="does not end"):
            group.wait(0.5)
        sent = group.send(signal.SIGINT)
        assert group.wait() == {0: 130} and time.monotonic() - sent < 10
