"""local_cpu.sh: real training on virtual devices, in one process and in two, and what becomes of the others when one ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from avlm_jax.assembly import assemble
from avlm_jax.checkpoint import load_tree
from avlm_jax.state import flatten
from avlm_jax.writer import read_metrics
from tests.launch.shell import LAUNCH, ROOT, StandIns, environment
from tests.tiny_system import SIZES, save_tokenizer, tiny_config, write_records

STEPS, ROWS = 2, 8


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


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
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(a folder with `avlm` of this Python, options of `avlm train` without a working directory)."""
    place = tmp_path_factory.mktemp("local")
    tokenizer = save_tokenizer(place / "tokenizer")
    records = write_records(
        place / "records", assemble(tiny_config(tokenizer)).system.spec, videos=ROWS, questions=1
    )
    overrides = (
        *SIZES,
        f"text.tokenizer={tokenizer}",
        f"stage.1a.steps={STEPS}",
        f"stage.1a.batch_size={ROWS}",
        "stage.1a.max_length=0",
        f"stage.1a.sources.visual_caption.records={records}",
        "stage.1a.sources.visual_caption.tasks=()",
        "log_every=1",
    )
    avlm = place / "bin" / "avlm"
    avlm.parent.mkdir()
    avlm.write_text(f'#!/bin/sh\nexec {sys.executable} -m avlm_jax "$@"\n')
    avlm.chmod(0o755)
    config = f"{ROOT}/configs/savenvideo.py:size=demo,stage=1a"
    return avlm.parent, ["--config", config, *(f"--config.{override}" for override in overrides)]


def train(training: tuple[Path, list[str]], workdir: Path, *options: str) -> str:
    path, options_of_train = training
    process = start(path, *options, "--max-restarts", "0", "--", *options_of_train, "--workdir", str(workdir))
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


@pytest.mark.multidevice
def test_devices_and_processes_change_nothing(training: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Eight devices in one process, and in two: the same losses and the same result, but for the order of sums."""
    train(training, tmp_path / "one")
    told = train(training, tmp_path / "two", "--processes", "2", "--port", free_port())
    assert any(line.startswith("[0] ") for line in told.splitlines())
    one, two = (read_metrics(tmp_path / name / "1a") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    for key in ("loss", "grad_norm", "targets"):
        assert [line[key] for line in one] == pytest.approx([line[key] for line in two], rel=1e-5)
    trees = [flatten(load_tree(tmp_path / name / "1a" / "final")[0]) for name in ("one", "two")]
    assert trees[0].keys() == trees[1].keys()


# Notes that it is there, then ends with its code; 0 waits for SIGTERM first, as a process that the others keep waiting.
AVLM = """
import signal
number = int(os.environ["AVLM_PROCESS_ID"])
said = ["AVLM_COORDINATOR", "AVLM_NUM_PROCESSES", "JAX_PLATFORMS", "XLA_FLAGS"]
with open({folder!r} + f"/attempts-{{number}}", "a") as file:
    file.write(json.dumps([os.environ[name] for name in said]) + "\\n")
def save(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
while len(os.listdir({folder!r})) < 4:
    time.sleep(0.05)
code = {codes}[number]
if code is None:
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(code)
"""


def group(tmp_path: Path, codes: list[int | None], *options: str) -> subprocess.Popen[str]:
    stand_ins = StandIns(tmp_path)
    stand_ins.add("avlm", AVLM.format(folder=str(tmp_path), codes=codes))
    checkout = tmp_path / "checkout"  # Without a .venv.
    checkout.mkdir()
    (checkout / "launch").symlink_to(LAUNCH)
    return start(
        stand_ins.path, "--processes", "2", "--port", "4711", *options,
        "--", "--config", "c.py", "--workdir", "w", cwd=checkout,
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
    assert process.returncode == 75 and told.count("[1] saved") == 2, told
    assert [len((tmp_path / f"attempts-{n}").read_text().splitlines()) for n in range(2)] == [2, 2]


def test_a_signal_reaches_all(tmp_path: Path) -> None:
    process = group(tmp_path, [None, None])
    assert process.stdout is not None
    for _ in range(2):
        assert "waiting" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and told.count("saved") == 2
