"""supervise.sh: what is started again, how often, and what becomes of signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.shell import LAUNCH, ROOT, StandIns, environment, run

# Ends with the codes of its arguments, one an attempt; counts the attempts in a file.
SCRIPTED = """
import os, signal, sys
from pathlib import Path
file, codes = Path(sys.argv[1]), [int(code) for code in sys.argv[2:]]
attempt = len(file.read_text()) if file.exists() else 0
file.write_text("x" * (attempt + 1))
print("attempt", attempt, "an arg with spaces")
code = codes[min(attempt, len(codes) - 1)]
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
# Says when it is ready, saves for a moment after SIGTERM, and ends as `avlm train` does.
SAVING = """
import os, signal, sys, time
def save(*_):
    print("saving", flush=True)
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def supervise(counter: Path, *codes: int, options: tuple[str, ...] = ()) -> tuple[int, int, str]:
    """(exit code, attempts, stderr)."""
    done = run(
        "supervise.sh",
        "--pause",
        "0",
        *options,
        "--",
        sys.executable,
        "-c",
        SCRIPTED,
        str(counter),
        *map(str, codes),
    )
    return done.returncode, len(counter.read_text()), done.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 130, 126, 127])
def test_what_a_new_start_does_not_mend_is_the_end(code: int, tmp_path: Path) -> None:
    assert supervise(tmp_path / "n", code)[:2] == (code, 1)


@pytest.mark.parametrize("code", [75, 143, 134, 137, 3, -signal.SIGABRT, -signal.SIGKILL, -signal.SIGALRM])
def test_what_a_new_start_mends_is_started_again(code: int, tmp_path: Path) -> None:
    assert supervise(tmp_path / "n", code, code, 0)[:2] == (0, 3)
    assert supervise(tmp_path / "m", code, 2)[:2] == (2, 2)


def test_it_gives_up_after_so_many_short_attempts(tmp_path: Path) -> None:
    code, attempts, told = supervise(tmp_path / "n", 75, options=("--max-restarts", "3"))
    assert (code, attempts) == (75, 4) and "giving up" in told
    assert supervise(tmp_path / "m", 75, options=("--max-restarts", "0"))[:2] == (75, 1)


def test_long_attempts_do_not_count(tmp_path: Path) -> None:
    """--long 0: every attempt was long enough."""
    options = ("--max-restarts", "2", "--long", "0")
    assert supervise(tmp_path / "n", *[75] * 6, 0, options=options)[:2] == (0, 7)


def test_no_such_command(tmp_path: Path) -> None:
    done = run("supervise.sh", "--", "no-such-command")
    assert done.returncode == 127


def test_the_report_outlives_the_machine(tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    supervise(tmp_path / "n", 75, 2, options=("--report", str(reports)))
    (status,), (log,) = reports.glob("*.status"), reports.glob("*.log")
    assert status.read_text() == "ended 2 after 2 attempts\n"
    assert log.read_text() == "attempt 1 an arg with spaces\n"  # Of the last attempt.


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, attempts, told = supervise(
        tmp_path / "n", 75, 0, options=("--report", str(tmp_path / "file" / "x"))
    )
    assert (code, attempts) == (0, 2) and "cannot write" in told


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_it_save_and_is_the_end(signum: int, tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "supervise.sh"), "--report", str(reports), "--", sys.executable, "-c", SAVING],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    (status,) = reports.glob("*.status")
    assert status.read_text() == "running 1\n"
    process.send_signal(signum)
    assert process.wait(timeout=30) == 143
    with pytest.raises(
        ProcessLookupError
    ):  # It was waited for: nothing trains on behind a launcher that has gone.
        os.kill(pid, 0)
    assert process.stdout.read() == "saving\nsaved\n"
    assert status.read_text() == "ended 143 after 1 attempts\n"


# The real one, and then SIGTERM to the script that asked for the pipe: nobody has opened it yet.
MKFIFO = """
import signal, subprocess
subprocess.run(["/usr/bin/mkfifo", *argv], check=True)
os.kill(os.getppid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(
    "script",
    [("supervise.sh", "--", "sleep", "60"), ("local_cpu.sh", "--processes", "2", "--", "--config", "c", "--workdir", "w")],
    ids=["supervise", "local_cpu"],
)  # fmt: skip
def test_a_signal_before_anything_was_said_leaves_nothing_behind(
    script: tuple[str, ...], tmp_path: Path
) -> None:
    stand_ins = StandIns(tmp_path)
    stand_ins.add("mkfifo", MKFIFO)
    stand_ins.add("avlm", "time.sleep(60)")
    checkout = tmp_path / "checkout"  # Without a .venv.
    checkout.mkdir()
    (checkout / "launch").symlink_to(LAUNCH)
    name, *arguments = script
    # Of local_cpu.sh the one attempt, which supervise.sh starts.
    process = subprocess.Popen(
        ["bash", str(checkout / "launch" / name), *arguments],
        cwd=checkout, env=environment(stand_ins.path, AVLM_ONE_ATTEMPT="yes"), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.wait(timeout=30) == 143
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
        pytest.fail("a process of the script lives on")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_signal_between_two_attempts_is_the_end_too(tmp_path: Path) -> None:
    counter = tmp_path / "n"
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "supervise.sh"), "--pause", "60", "--", sys.executable, "-c", SCRIPTED, str(counter), "75"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "starting again in 60 s" in process.stderr.readline()
    time.sleep(0.2)
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 143 and counter.read_text() == "x"
