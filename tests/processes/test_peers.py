"""Who is late, and who has gone, told from what processes say of themselves; and what the environment says of a run."""

from __future__ import annotations

import dataclasses
import socket

import pytest

from avlm_jax.processes.multihost import Launch, Timeouts, find_launch
from avlm_jax.processes.peers import COMPUTES, READS, SAVES, WAITS, DataWait, Lateness, Status, find_behind
from input_pipeline.errors import UserError

NAMES = ["process 0 (a)", "process 1 (b)", "process 2 (c)"]
AHEAD = Status(1, 13, COMPUTES)


def observed(lateness: Lateness, now: float, *statuses: Status) -> list[str]:
    return lateness.observe(
        now, {i: dataclasses.replace(s, beat=s.beat or int(now)) for i, s in enumerate(statuses)}
    )


def test_a_process_is_late_when_the_others_have_gone_on() -> None:
    lateness, reads = Lateness(NAMES, late=30), Status(1, 12, READS)
    assert observed(lateness, 0, reads, reads, reads) == []
    assert observed(lateness, 90, reads, reads, reads) == []  # All read for long: nobody waits for another.
    assert observed(lateness, 100, AHEAD, reads, AHEAD) == []
    assert observed(lateness, 129, AHEAD, reads, AHEAD) == []
    (line,) = observed(lateness, 141, AHEAD, reads, AHEAD)
    assert line == "process 1 (b) is 41 s late at step 12; it waits for data"
    assert observed(lateness, 150, AHEAD, reads, AHEAD) == []  # Said once,
    assert len(observed(lateness, 190, AHEAD, reads, AHEAD)) == 1  # and again when it has doubled.
    assert observed(lateness, 200, AHEAD, AHEAD, AHEAD) == ["process 1 (b) goes on after 100 s"]


def test_a_process_that_gets_on_is_not_late() -> None:
    lateness = Lateness(NAMES, late=30)
    for step in range(1, 9):
        last = Status(1, step, READS)
        assert observed(lateness, 20.0 * step, Status(1, step, COMPUTES), last, Status(1, step, SAVES)) == []


def test_a_process_without_sign_of_life_is_told_as_such() -> None:
    lateness = Lateness(NAMES[:2], late=10)
    stopped = Status(1, 12, COMPUTES, beat=7)
    observed(lateness, 0, AHEAD, stopped)
    (line,) = observed(lateness, 12, AHEAD, stopped)
    assert line.endswith("12 s late at step 12; it computes, and has given no sign of life for 12 s")


def test_of_two_looks_the_second_says_who_is_behind() -> None:
    before = {0: Status(1, 5, COMPUTES, 3), 1: Status(1, 5, READS, 3), 2: Status(1, 5, COMPUTES, 3)}
    now = {0: Status(1, 5, COMPUTES, 5), 1: Status(1, 5, READS, 5), 2: Status(1, 5, COMPUTES, 3)}
    found = find_behind(before, now, [*NAMES, "process 3 (d)"])
    assert [(behind.process, behind.alive) for behind in found] == [(1, True), (2, False), (3, False)]
    assert found[0].text == "process 1 (b) is at step 5; it waits for data"
    assert find_behind({0: Status()}, {0: Status(phase=WAITS, beat=1)}, NAMES[:1]) == []


def test_data_that_hold_all_up_a_little_each_step_are_told_by_process() -> None:
    wait = DataWait(NAMES)

    def seen(now: float, *waited: float) -> list[str]:
        return wait.observe(now, {i: Status(1, 5, READS, waited=w) for i, w in enumerate(waited)})

    assert seen(0, 0, 0, 0) == [] and seen(30, 1, 12, 1) == []
    (line,) = seen(60, 1.2, 24, 1.2)
    assert line.startswith(
        "waiting for data, of the last 60 s: process 1 (b) 40%; half of the processes 2% or"
    )
    assert seen(120, 1.2, 25, 1.2) == []  # Since then it was well.
    assert seen(180, 31, 55, 31) == []  # All wait: it is nobody's own trouble, and in the metrics.


def test_a_process_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("no connection is made")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert find_launch({}, 1.0) is None
    assert find_launch({"AVLM_NUM_PROCESSES": "1"}, 1.0) is None
    assert find_launch({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, 1.0) is None


def test_what_is_stated_is_taken() -> None:
    stated = {"AVLM_COORDINATOR": "a:8476", "AVLM_NUM_PROCESSES": "4", "AVLM_PROCESS_ID": "3"}
    assert find_launch({**stated, "SLURM_NTASKS": "9", "SLURM_PROCID": "1"}, 1.0) == Launch("a:8476", 3, 4)
    ipv6 = {**stated, "AVLM_COORDINATOR": "[fd00::1]:8476"}
    assert find_launch(ipv6, 1.0) == Launch("[fd00::1]:8476", 3, 4)


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"AVLM_PROCESS_ID": ""},
            "AVLM_COORDINATOR=a:8476, AVLM_NUM_PROCESSES=4 is set, but AVLM_PROCESS_ID",
        ),
        ({"AVLM_COORDINATOR": "a"}, "process 0's host:port"),
        ({"AVLM_COORDINATOR": "a:99999"}, "process 0's host:port"),
        ({"AVLM_NUM_PROCESSES": "four"}, "AVLM_NUM_PROCESSES is 'four'"),
        ({"AVLM_PROCESS_ID": "4"}, "AVLM_PROCESS_ID is 4; with AVLM_NUM_PROCESSES=4 it is at most 3"),
    ],
)
def test_half_of_a_statement_is_refused(changed: dict[str, str], message: str) -> None:
    stated = {"AVLM_COORDINATOR": "a:8476", "AVLM_NUM_PROCESSES": "4", "AVLM_PROCESS_ID": "3"}
    with pytest.raises(UserError, match=message):
        find_launch({**stated, **changed}, 1.0)


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    "changed, count, devices",
    [
        ({}, 16, (1,)),  # A task per GPU.
        ({"CUDA_VISIBLE_DEVICES": "5"}, 16, None),  # Slurm has bound the task to its own.
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, 2, None),  # A task per host.
    ],
)
def test_slurm_is_understood(
    changed: dict[str, str], count: int, devices: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = SLURM | changed
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = find_launch(environment, 1.0)
    assert found == Launch("node03:61441", int(environment["SLURM_PROCID"]), count, devices)


def test_a_slice_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "TPU_WORKER_HOSTNAMES": "localhost,w1",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8081",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    import jax

    monkeypatch.setattr(type(jax.config), "jax_platforms", "tpu,cpu", raising=False)
    assert find_launch(environment, 1.0) == Launch("localhost:8482", 3, 4)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # sbatch without srun.
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_processes_that_would_not_know_of_each_other_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="has started several processes.*AVLM_COORDINATOR"):
        find_launch(environment, 1.0)


def test_a_timeout_is_a_number_of_seconds() -> None:
    with pytest.raises(ValueError, match="grace is 0"):
        Timeouts(grace=0)


def test_timeouts_of_a_command_line() -> None:
    found = Timeouts.of_overrides(["--config.timeouts.ready=60", "--config.seed=1"])
    assert found == Timeouts(ready=60.0)
    for override, told in (
        ("timeouts.redy=1", "redy.*known: connect, ready"),
        ("timeouts.ready=soon", "'soon'"),
    ):
        with pytest.raises(UserError, match=told):
            Timeouts.of_overrides([f"--config.{override}"])
