"""Several processes as one run: they train what one trains, and whatever happens to one of them, the others end and say why."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from avlm_jax import cli
from avlm_jax.assembly import Assembly, assemble
from avlm_jax.checkpoints.stage_result import TREE_FILE, load_tree
from avlm_jax.monitoring.writer import read_metrics
from avlm_jax.state import flatten
from tests.process_group import SAVE_EVERY, STAGE, STEPPING, STEPS, Group, TinyRun, make_run
from tests.tiny_system import publish, random_params, tiny_config

pytestmark = pytest.mark.multidevice

HOST = socket.gethostname()
FIRST, SECOND = f"process 0 ({HOST})", f"process 1 ({HOST})"


def toy(folder: Path, steps: int, *options: str, count: int = 2, absent: tuple[int, ...] = ()) -> Group:
    """Processes of tests/stepping.py."""
    arguments = [str(folder), str(steps), *options]
    return Group(folder / "logs", arguments, count, code=dict.fromkeys(range(count), STEPPING), absent=absent)


def test_a_process_that_is_not_started_is_named(tmp_path: Path) -> None:
    with toy(tmp_path, 1, "connect=6", count=3, absent=(2,)) as group:
        assert group.wait() == {0: 75, 1: 75}
        for index in range(2):
            told = (
                f"of 3 processes process 2 did not come within 6 s; there are {FIRST}, {SECOND}. See the log"
            )
            assert told in group.text(index)


@pytest.mark.slow
def test_a_process_that_is_not_ready_is_named(tmp_path: Path) -> None:
    with toy(tmp_path, 1, "sets_up=500", "ready=4", "late=2") as group:
        assert group.wait() == {0: 75, 1: 75}
        told = group.text(0)
    assert f"{SECOND} is 2 s late before its first step; it sets up" in told
    why = f"before the first step: {SECOND} did not come within 4 s ({SECOND} is before its first step; it sets up)"
    assert why in told or "stuck: stage toy: it" in told  # Its watchdog is as quick.


def test_a_slow_process_is_named_and_waited_for(tmp_path: Path) -> None:
    with toy(tmp_path, 80, "slow=3", "seconds=6", "late=2") as group:
        assert group.wait() == {0: 0, 1: 0}
        told = group.text(0)
    assert re.search(rf"{re.escape(SECOND)} is [23] s late at step 3; it waits for data", told)
    assert re.search(rf"{re.escape(SECOND)} goes on after \d+ s", told)
    assert "step 80" in told and "late" not in group.text(1)


def test_processes_that_have_finished_end_by_0(tmp_path: Path) -> None:
    """A thread that talks to the coordinator while the interpreter is taken down would end half of them by SIGABRT."""
    busy = f"from avlm_jax.processes import peers; peers.BEAT_SECONDS = 0.0005; {STEPPING}"
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        with Group(folder / "logs", [str(folder), "2"], 4, code=dict.fromkeys(range(4), busy)) as group:
            assert group.wait() == dict.fromkeys(range(4), 0), "\n".join(map(group.text, group.logs))


def test_a_failure_after_the_last_meeting_ends_those_that_have_finished_too(tmp_path: Path) -> None:
    """As when the process that writes an evaluation's results finds the disk full."""
    with toy(tmp_path, 2, "fails_at_the_end=3") as group:
        assert group.wait(60) == {0: 2, 1: 2}
        assert f"{FIRST} has ended: the disk is full" in group.text(1)


def test_a_loader_that_hangs_ends_the_run_with_stacks(tmp_path: Path) -> None:
    with toy(tmp_path, 4, "slow=3", "seconds=500", "step=5", "late=2") as group:
        group.until(lambda: "step 2" in group.text(1))
        begun = time.monotonic()
        assert group.wait() == {0: 75, 1: 75}
        assert time.monotonic() - begun < 40
        told = group.text(0) + group.text(1)
    assert f"config.timeouts.step allows; {SECOND} is at step 3; it waits for data" in told
    assert any("tests/stepping.py" in path.read_text() for path in tmp_path.glob("stacks-*.txt"))


def test_a_stopped_process_ends_the_others_with_stacks(tmp_path: Path) -> None:
    with toy(tmp_path, 1000, "step=6", "late=2") as group:
        group.until(lambda: "step 3" in group.text(1))
        begun = group.send(signal.SIGSTOP, 1)
        assert group.wait(but=[1]) == {0: 75}
        assert time.monotonic() - begun < 40
        told = group.text(0)
    assert f"longer than config.timeouts.step allows; {SECOND} gives no sign of life; it was" in told
    assert f"{SECOND} is 2 s late" in told
    assert "tests/stepping.py" in (tmp_path / "stacks-0.txt").read_text()


def test_the_others_end_as_one_that_fails_and_say_why(tmp_path: Path) -> None:
    with toy(tmp_path, 9, "raises=2") as group:
        assert group.wait(60) == {0: 2, 1: 2}
        assert f"{SECOND} has ended: shard 3 is not there" in group.text(0)


@pytest.mark.slow
def test_a_killed_process_has_the_run_started_again(tmp_path: Path) -> None:
    with toy(tmp_path, 1000) as group:
        group.until(lambda: "step 3" in group.text(1))
        group.send(signal.SIGKILL, 1)
        assert group.wait(60) == {0: 75, 1: -signal.SIGKILL}
        assert f"{SECOND} gives no sign of life" in group.text(0)


@pytest.mark.parametrize("target", [0, 1])
def test_a_signal_to_one_process_stops_all_at_the_same_step(target: int, tmp_path: Path) -> None:
    with toy(tmp_path, 1000) as group:
        group.until(lambda: "step 3" in group.text(1))
        sent = group.send(signal.SIGTERM, target)
        assert group.wait(25) == {0: 143, 1: 143}
        assert time.monotonic() - sent < 25
    first, second = (int((tmp_path / f"saved-{index}").read_text()) for index in range(2))
    assert first == second >= 3
    assert f"stopped by SIGTERM at step {first}; the same command continues" in group.text(1 - target)


def test_a_signal_during_set_up_stops_all(tmp_path: Path) -> None:
    with toy(tmp_path, 1000, "sets_up=500") as group:
        group.until(lambda: "sets up" in group.text(0))
        group.send(signal.SIGTERM, 0)
        assert group.wait(25) == {0: 143, 1: 143}


# Stays before the loop, where a signal ends it at once.
NOT_YET = """
import runpy, time
from avlm_jax.processes.preemption import StopSignal
def deferred(self):
    print("not yet", flush=True)
    time.sleep(500)
StopSignal.deferred = deferred
runpy.run_module("tests.stepping", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_signal_while_one_is_in_the_loop_and_the_other_is_not(tmp_path: Path) -> None:
    code = {0: NOT_YET, 1: STEPPING}
    with Group(tmp_path / "logs", [str(tmp_path), "9"], 2, code=code) as group:
        group.until(lambda: "not yet" in group.text(0))
        time.sleep(2)  # Until the other one waits for it at its first step.
        sent = group.send(signal.SIGTERM, 0)
        assert group.wait(60) == {0: 143, 1: 143}
        assert time.monotonic() - sent < 15 and "was not at a step" in group.text(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def two(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of an undisturbed run of two processes."""
    place = tmp_path_factory.mktemp("two")
    with Group(place / "logs", tiny.command(place / "run"), 2) as group:
        assert group.wait() == {0: 0, 1: 0}, group.text(0)
        assert "loss" not in group.text(1) and "stage" not in group.text(1)  # Process 0 speaks for all.
    return place / "run"


def assert_same(found: Path, expected: Path) -> None:
    """Bit for bit, and the same trace."""
    for name in (TREE_FILE, "metadata.json", "config.json"):
        ours, theirs = ((run / STAGE / "final" / name).read_bytes() for run in (found, expected))
        assert ours == theirs, name
    ours, theirs = (
        [{key: line[key] for key in ("step", "loss", "accuracy", "grad_norm", "targets")} for line in trace]
        for trace in (read_metrics(found / STAGE), read_metrics(expected / STAGE))
    )
    assert ours == theirs and [line["step"] for line in ours] == list(range(1, STEPS + 1))


def assert_alike(found: Path, expected: Path) -> None:
    """fp32 sums over other numbers of devices differ in their last digits, and AdamW divides small gradients by small ones."""
    ours, theirs = (flatten(load_tree(run / STAGE / "final")[0]) for run in (found, expected))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_allclose(value, theirs[path], rtol=1e-4, atol=1e-4, err_msg=path)
    for line, other in zip(read_metrics(found / STAGE), read_metrics(expected / STAGE), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_two_processes_train_what_one_trains(tiny: TinyRun, two: Path, tmp_path: Path) -> None:
    assert cli.main(tiny.command(tmp_path)) == 0
    assert_alike(two, tmp_path)
    moved = [abs(v).max() for p, v in flatten(load_tree(two / STAGE / "final")[0]).items() if "bias" in p]
    assert max(moved) > 1e-3  # Biases began at zero: by 10 times the tolerance and more, training moved them.


def saved(workdir: Path) -> list[int]:
    found = (workdir / STAGE / "checkpoints").glob("[0-9]*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


# Steps of the tiny system are over in an instant; this waits before one until a file is there.
SLOW = """
import os, sys, time
from pathlib import Path
from avlm_jax import cli, train
learning_rate = train.learning_rate
def rate(config, step, total):
    print("at step", step + 1, flush=True)
    time.sleep(0.7)
    return learning_rate(config, step, total)
train.learning_rate = rate
sys.exit(cli.main(sys.argv[1:]))
"""


def test_sigterm_to_one_of_two_saves_and_the_same_command_continues(
    tiny: TinyRun, two: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    code = {0: SLOW, 1: SLOW}
    with Group(tmp_path / "stopped", tiny.command(workdir), 2, code=code) as group:
        group.until(lambda: f"at step {SAVE_EVERY + 2}" in group.text(1))
        sent = group.send(signal.SIGTERM, 1)
        assert group.wait() == {0: 143, 1: 143}
        seconds = time.monotonic() - sent
        (step,) = re.findall(r"stopped by SIGTERM at step (\d+); the same command continues", group.text(0))
    assert seconds < 25
    assert saved(workdir)[-1] == int(step) > SAVE_EVERY and not (workdir / STAGE / "final").exists()
    print(f"SIGTERM to one of two training processes: {seconds:.1f} s until both had ended")
    with Group(tmp_path / "continued", tiny.command(workdir), 2) as group:
        assert group.wait() == {0: 0, 1: 0}
        assert f"continues at step {step} of {STEPS}" in group.text(0)
    assert_same(workdir, two)


@pytest.mark.slow
def test_four_processes_train_what_one_trains_and_always_the_same(
    tiny: TinyRun, two: Path, tmp_path: Path
) -> None:
    for name in ("once", "again"):
        with Group(tmp_path / f"{name}-logs", tiny.command(tmp_path / name), 4) as group:
            assert group.wait() == dict.fromkeys(range(4), 0)
    assert_same(tmp_path / "again", tmp_path / "once")
    assert_alike(tmp_path / "once", two)


@pytest.mark.slow
def test_fsdp_over_processes_trains_the_same(tiny: TinyRun, two: Path, tmp_path: Path) -> None:
    settings = ("mesh.data=2", "mesh.fsdp=2")
    with Group(tmp_path / "logs", tiny.command(tmp_path / "run", *settings), 2, devices=2) as group:
        assert group.wait() == {0: 0, 1: 0}, group.text(0)
    assert_alike(tmp_path / "run", two)


def ends_within(group: Group, due: Callable[[], bool], code: int, what: str) -> None:
    group.until(due)
    sent = group.send(signal.SIGTERM)
    assert set(group.wait(60).values()) == {code}, "\n".join(map(group.text, group.logs))
    seconds = time.monotonic() - sent
    print(f"SIGTERM {what}: {seconds:.1f} s")
    assert seconds < 25


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_while_it_compiles_and_before(count: int, tiny: TinyRun, tmp_path: Path) -> None:
    """The run ends in time, leaves nothing half done, and the same command then does all."""
    workdir = tmp_path / "run"
    never_cached = ("loss_chunk=63",)
    with Group(tmp_path / "set up", tiny.command(workdir), count) as group:
        ends_within(group, lambda: (workdir / STAGE).exists() or "stage" in group.text(), 143, "in set-up")
    with Group(tmp_path / "compiling", tiny.command(workdir, *never_cached), count) as group:
        ends_within(group, (workdir / STAGE / "metrics.jsonl").exists, 143, "while the step compiles")
    with Group(tmp_path / "whole", tiny.command(workdir), count) as group:
        assert set(group.wait().values()) == {0}


# Says when the first questions are asked, for which two programs are compiled.
ASKING = """
import sys
from avlm_jax import cli
from avlm_jax.generate import Generator
texts = Generator.texts
def say(self, *arguments):
    print("asks", flush=True)
    return texts(self, *arguments)
Generator.texts = say
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_sigterm_while_it_evaluates(tiny: TinyRun, tmp_path: Path) -> None:
    assembly = assemble(tiny_config(tiny.tokenizer))
    checkpoint = publish(assembly, random_params(assembly), tmp_path / "checkpoint")
    command = ["evaluate", "--checkpoint", str(checkpoint), "--records", str(tiny.records), "--out"]
    with Group(tmp_path / "logs", [*command, str(tmp_path / "out")], code={0: ASKING}) as group:
        ends_within(group, lambda: "asks" in group.text(), 143, "while it evaluates")
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_named_before_weights_are_read(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = shutil.copytree(tiny.records, tmp_path / "records")
    shard = next(records.glob("*.array_record"))
    shard.unlink()

    def parameters(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(Assembly, "parameters", parameters)
    assert cli.main(TinyRun(records, tiny.tokenizer).command(tmp_path / "run")) == 2
    assert str(shard) in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_questions(tiny: TinyRun, tmp_path: Path) -> None:
    assembly = assemble(tiny_config(tiny.tokenizer))
    checkpoint = publish(assembly, random_params(assembly), tmp_path / "checkpoint")
    command = ["evaluate", "--checkpoint", str(checkpoint), "--records", str(tiny.records), "--batch-size=4"]
    assert cli.main([*command, "--out", str(tmp_path / "one")]) == 0
    with Group(tmp_path / "logs", [*command, "--out", str(tmp_path / "two")], 2) as group:
        assert group.wait() == {0: 0, 1: 0}, group.text(0) + group.text(1)
        assert "written" in group.text(0) and "written" not in group.text(1)
    for name in ("predictions.jsonl", "references.jsonl", "metrics.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    assert len((tmp_path / "two" / "predictions.jsonl").read_text().splitlines()) == 5
