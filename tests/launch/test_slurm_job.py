"""slurm_job.sh under stand-ins for srun and scontrol: when the job is queued again."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.shell import LAUNCH, StandIns, environment

# Starts one task after the other as srun would, each with its number, and ends with the highest code; SIGTERM is passed on.
SRUN = """
import signal, subprocess
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
command = argv[argv.index("bash"):]
for number in range(2):
    tasks.append(subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(number)}))
sys.exit(max(task.wait() for task in tasks))
"""
# `avlm`: a task ends with the code of its number.
AVLM = """
import signal
if {saving}:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    open("ready-" + os.environ["SLURM_PROCID"], "w").close()
    time.sleep(60)
sys.exit({codes}[int(os.environ["SLURM_PROCID"])])
"""


class Job:
    def __init__(self, folder: Path, codes: tuple[int, int], saving: bool = False) -> None:
        self.commands = StandIns(folder)
        self.commands.add("srun", SRUN)
        self.commands.add("scontrol")
        self.commands.add("avlm", AVLM.format(codes=codes, saving=saving))
        self.root = folder / "checkout"  # Without a .venv.
        self.root.mkdir()
        (self.root / "launch").symlink_to(LAUNCH)
        script = folder / "slurm_script"  # Slurm runs a copy.
        script.write_bytes((LAUNCH / "slurm_job.sh").read_bytes())
        self.command = [
            "bash",
            str(script),
            "--max-requeues",
            "3",
            "--",
            "--config",
            "c.py",
            "--workdir",
            "w x",
        ]

    def start(self, restarts: int = 0) -> subprocess.Popen[str]:
        changed = environment(
            self.commands.path, SLURM_JOB_ID="17", SLURM_RESTART_COUNT=str(restarts), SLURM_CPUS_PER_TASK="4"
        )
        return subprocess.Popen(
            self.command,
            cwd=self.root,
            env=changed,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, restarts: int = 0) -> int:
        process = self.start(restarts)
        process.communicate(timeout=60)
        return process.returncode

    @property
    def requeued(self) -> bool:
        return self.commands.calls("scontrol") == [["scontrol", "requeue", "17"]]


@pytest.mark.parametrize(
    ("codes", "ends", "requeued"),
    [
        ((0, 0), 0, False),
        ((75, 75), 75, True),
        ((75, 134), 134, True),
        ((1, 1), 1, False),
        ((2, 137), 2, False),  # One task knows better than the highest code.
        ((137, 1), 1, False),
        ((143, 143), 143, False),  # scancel, or a preemption after which Slurm queues the job by itself.
    ],
)
def test_what_is_queued_again(codes: tuple[int, int], ends: int, requeued: bool, tmp_path: Path) -> None:
    job = Job(tmp_path, codes)
    assert job.run() == ends and job.requeued == requeued
    (started,) = job.commands.calls("srun")
    assert "--cpus-per-task=4" in started
    assert started[started.index("--") + 1 :] == ["avlm", "train", "--config", "c.py", "--workdir", "w x"]


def test_not_for_ever(tmp_path: Path) -> None:
    job = Job(tmp_path, (75, 75))
    assert job.run(restarts=3) == 75 and not job.requeued


def test_before_its_time_limit_training_saves_and_the_job_is_queued_again(tmp_path: Path) -> None:
    job = Job(tmp_path, (0, 0), saving=True)
    process = job.start()
    deadline = time.monotonic() + 30
    while len(list(job.root.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # As --signal=B:TERM@60 sends it: to this script alone.
    _, told = process.communicate(timeout=30)
    assert process.returncode == 143 and job.requeued, told


def test_reports_of_an_earlier_start_do_not_count(tmp_path: Path) -> None:
    job = Job(tmp_path, (75, 75))
    earlier = job.root / "runs" / "slurm" / "17"
    earlier.mkdir(parents=True)
    (earlier / "host-0.status").write_text("ended 2 after 1 attempts\n")
    assert job.run() == 75 and job.requeued
