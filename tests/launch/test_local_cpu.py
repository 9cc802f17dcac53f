"""local_cpu.sh: real training on virtual devices, in one process and in two, and what becomes of the others when one ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from avlm_jax.monitoring.writer import read_metrics
from tests.launch.shell import LAUNCH, ROOT, StandIns, environment
from tests.process_group import STAGE, TinyRun, free_port, make_run


def start(path: Path, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """`launch/local_cpu.sh`, with the caches that the tests' own process has."""
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("JAX_", "OMP_", "OPENBLAS_"))
    }
    return subprocess.Popen(
        ["bash", str((cwd or ROOT) / "launch" / "local_cpu.sh"), *arguments],
        env=environment(path, PYTHONPATH=str(ROOT), **kept),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyRun]:
    """(a folder with `avlm` of this Python, what it can train on)."""
    place = tmp_path_factory.mktemp("local")
    avlm = place / "bin" / "avlm"
    avlm.parent.mkdir()
    avlm.write_text(f'#!/bin/sh\nexec {sys.executable} -m avlm_jax "$@"\n')
    avlm.chmod(0o755)
    return avlm.parent, make_run(place)


@pytest.mark.multidevice
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_trains_on_eight_devices(processes: int, tiny: tuple[Path, TinyRun], tmp_path: Path) -> None:
    path, run = tiny
    _, *options = run.command(tmp_path, f"stage.{STAGE}.steps=2", f"stage.{STAGE}.batch_size=8")
    group = ("--processes", str(processes), "--port", str(free_port()), "--max-restarts", "0")
    told, _ = start(path, *group, "--", *options).communicate(timeout=500)
    assert [line["step"] for line in read_metrics(tmp_path / STAGE)] == [1, 2], told
    assert (tmp_path / STAGE / "final").is_dir(), told
    assert all(line.startswith(("[0] ", "[1] ")) for line in told.splitlines()) == (processes == 2), told


@pytest.mark.multidevice
def test_two_processes_form_a_cluster(tmp_path: Path) -> None:
    """With the loop of tests/stepping.py in the place of training: each step waits for the other process's devices."""
    avlm = tmp_path / "bin" / "avlm"
    avlm.parent.mkdir()
    avlm.write_text(f"#!/bin/sh\nexec {sys.executable} -m tests.stepping {tmp_path} 3\n")
    avlm.chmod(0o755)
    group = ("--processes", "2", "--port", str(free_port()), "--devices", "4", "--max-restarts", "0")
    process = start(
        avlm.parent, *group, "--", "--config", "c.py", "--workdir", "w", cwd=bare_checkout(tmp_path)
    )
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert "[0] step 3" in told, told


# Notes that it is there, then ends with its code at the first attempt and with 0 at the next; None waits for SIGTERM, as a
# process that another one keeps waiting.
AVLM = """
import signal
number = int(os.environ["AVLM_PROCESS_ID"])
said = ["AVLM_COORDINATOR", "AVLM_NUM_PROCESSES", "JAX_PLATFORMS", "XLA_FLAGS"]
with open({folder!r} + f"/attempts-{{number}}", "a") as file:
    file.write(json.dumps([os.environ[name] for name in said]) + "\\n")
def save(*_):
    os.write(1, b"saved\\n")  # print may be at work already.
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
while len(os.listdir({folder!r})) < 4:
    time.sleep(0.05)
if len(open({folder!r} + f"/attempts-{{number}}").readlines()) > 1:
    sys.exit(0)
code = {codes}[number]
if code is None:
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(code)
"""


def bare_checkout(tmp_path: Path) -> Path:
    """Without a .venv, so that the path decides which `avlm` runs."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "launch").symlink_to(LAUNCH)
    return checkout


def group(tmp_path: Path, codes: list[int | None], *options: str) -> subprocess.Popen[str]:
    stand_ins = StandIns(tmp_path)
    stand_ins.add("avlm", AVLM.format(folder=str(tmp_path), codes=codes))
    return start(
        stand_ins.path, "--processes", "2", "--port", "4711", *options,
        "--", "--config", "c.py", "--workdir", "w", cwd=bare_checkout(tmp_path),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "ends"),
    [([0, 0], 0), ([2, 75], 2), ([75, 2], 2), ([75, 134], (75, 134)), ([1, 137], 1)],
)
def test_the_cause_decides(codes: list[int | None], ends: int | tuple[int, ...], tmp_path: Path) -> None:
    process = group(tmp_path, codes, "--max-restarts", "0")
    process.communicate(timeout=60)
    assert process.returncode in (ends if isinstance(ends, tuple) else (ends,))


def test_every_process_is_told_who_it_is(tmp_path: Path) -> None:
    group(tmp_path, [0, 0]).communicate(timeout=60)
    for number in range(2):
        (line,) = (tmp_path / f"attempts-{number}").read_text().splitlines()
        assert json.loads(line) == ["localhost:4711", "2", "cpu", "--xla_force_host_platform_device_count=4"]


def test_when_one_ends_all_are_started_again(tmp_path: Path) -> None:
    """The other one waits for it for ever: it is told to save, and both begin anew."""
    process = group(tmp_path, [75, None], "--max-restarts", "1", "--pause", "0")
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and told.count("[1] saved") == 1, told
    assert [len((tmp_path / f"attempts-{n}").read_text().splitlines()) for n in range(2)] == [2, 2]


def test_a_signal_reaches_all(tmp_path: Path) -> None:
    process = group(tmp_path, [None, None])
    assert process.stdout is not None
    for _ in range(2):
        assert "waiting" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and told.count("saved") == 2
