"""`avlm train` of one tiny stage as a process that is killed, for tests that compare it with one left alone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from avlm_jax.assembly import assemble
from avlm_jax.checkpoints.stage_result import CONFIG_FILE, METADATA_FILE, TREE_FILE
from avlm_jax.checkpoints.step_folders import MANIFEST_FILE, PARTIAL
from avlm_jax.monitoring.writer import read_metrics
from tests.tiny_system import CONFIG, SIZES, save_tokenizer, tiny_config, write_records

ROOT = Path(__file__).parents[1]
STAGE, SAMPLES, BATCH = "1a", 3, 2  # Which samples a batch holds depends on the position in the data.
# Of a step's metrics; the others tell of time and memory.
LEARNT = {"step", "loss", "accuracy", "grad_norm", "lr", "targets", "skipped"}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a finished run left that must not depend on how often it was killed.

    Attributes:
        files: of `final/`.
        metrics: what every step learnt, and from how many samples.
        leaves: sums of parameters, moments, counts and random key at the last step.
        data: position in the data at the last step.
    """

    files: dict[str, bytes]
    metrics: list[dict]
    leaves: dict
    data: dict


class Run:
    """Processes whose output `cat` writes to a log, so that what limits a process does not limit the log."""

    def __init__(self, command: list[str], log: Path, processes: int, **options) -> None:
        with log.open("ab") as file:
            self._cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        pipe, environment = self._cat.stdin, os.environ | {"AVLM_NUM_PROCESSES": str(processes)}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                environment["AVLM_COORDINATOR"] = f"localhost:{free.getsockname()[1]}"
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=pipe,
                stderr=pipe,
                env=environment | {"AVLM_PROCESS_ID": str(index)},
                **options,
            )
            for index in range(processes)
        ]
        pipe.close()

    def running(self) -> bool:
        """Whether none has ended."""
        return all(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        """SIGKILLs the last process; the others have to notice that it is gone."""
        self.processes[-1].kill()
        assert self.wait()[-1] == -9, "it ended before the kill"

    def wait(self) -> list[int]:
        """The exit codes, once all output is in the log."""
        codes = [process.wait(600) for process in self.processes]
        self._cat.wait(60)
        return codes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The command of a run.

    Attributes:
        place: where its data and logs are.
        overrides: of the configuration.
        steps: of the stage.
        max_lost: steps that a kill may cost.
        processes: that train together.
    """

    place: Path
    overrides: tuple[str, ...]
    steps: int
    max_lost: int
    processes: int = 1

    @classmethod
    def make(cls, place: Path, steps: int, max_lost: int, *more: str, processes: int = 1) -> Recipe:
        """Writes tokenizer and records to `place`."""
        tokenizer = save_tokenizer(place / "tokenizer")
        spec = assemble(tiny_config(tokenizer)).system.spec
        records = write_records(place / "records", spec, videos=SAMPLES, questions=1)
        stage = {
            "steps": steps,
            "batch_size": BATCH,
            "max_length": 0,
            "sources.visual_caption.records": records,
            "sources.visual_caption.tasks": "()",
        }
        overrides = (
            *SIZES,
            f"text.tokenizer={tokenizer}",
            f"stages={STAGE}",
            "log_every=1",
            f"max_lost_steps={max_lost}",
            *(f"stage.{STAGE}.{key}={value}" for key, value in stage.items()),
            *more,
        )
        return cls(place, overrides, steps, max_lost, processes)

    def start(self, workdir: Path, **options) -> Run:
        """The command as one process or several."""
        overrides = [f"--config.{override}" for override in self.overrides]
        command = [sys.executable, "-m", "avlm_jax", "train", "--config", f"{CONFIG}:size=demo"]
        return Run(
            [*command, "--workdir", str(workdir), *overrides], self.log(workdir), self.processes, **options
        )

    def log(self, workdir: Path) -> Path:
        """Where all that the processes of a working directory print goes: never to the disk that is filled."""
        return self.place / f"{workdir.parent.name}-{workdir.name}.log"

    def printed(self, workdir: Path) -> str:
        """What is in the log."""
        return self.log(workdir).read_text(errors="replace")

    def resumed_at(self, workdir: Path) -> list[int]:
        """At which steps the starts that found a checkpoint went on."""
        return [int(step) for step in re.findall(r"continues at step (\d+)", self.printed(workdir))]

    def finish(self, workdir: Path) -> Trained:
        """Runs the command to its end."""
        assert self.start(workdir).wait() == [0] * self.processes, self.printed(workdir)[-3000:]
        folder = workdir / STAGE
        manifest = json.loads((folder / "checkpoints" / str(self.steps) / MANIFEST_FILE).read_text())
        metrics = [
            {key: line[key] for key in line if key in LEARNT or key.startswith("samples/")}
            for line in read_metrics(folder)
        ]
        files = {
            name: (folder / "final" / name).read_bytes() for name in (TREE_FILE, CONFIG_FILE, METADATA_FILE)
        }
        return Trained(files, metrics, manifest["leaves"], manifest["data_state"])

    def kill(self, workdir: Path, due: Callable[[], bool], delay: float = 0.0) -> int:
        """Starts the command and kills it `delay` seconds after it is `due`; returns the step it had reached."""
        begun, run = time.time(), self.start(workdir)
        metrics, end = workdir / STAGE / "metrics.jsonl", time.monotonic() + 600
        while not (metrics.exists() and metrics.stat().st_mtime > begun and due()):
            assert run.running(), f"it ended before the kill: {self.printed(workdir)[-3000:]}"
            assert time.monotonic() < end, "the run does not get on"
            time.sleep(0.002)
        time.sleep(delay)
        run.kill()
        return reached(workdir)


def reached(workdir: Path) -> int:
    """The last step whose metrics are on disk."""
    try:
        lines = (workdir / STAGE / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    numbers = [int(found[1]) for line in lines if (found := re.search(r'"step": (\d+)', line))]
    return max(numbers, default=0)


def begun_steps(workdir: Path) -> list[int]:
    """Checkpoints that are being written, or were when the run was killed."""
    names = [path.name for path in (workdir / STAGE / "checkpoints").glob(f"*{PARTIAL}")]
    done = complete_steps(workdir)  # What is being removed has this name as well.
    return sorted(step for name in names if (step := int(name.partition(".")[0])) > max(done, default=0))


def complete_steps(workdir: Path) -> list[int]:
    """Checkpoints that count."""
    return sorted(
        int(path.name) for path in (workdir / STAGE / "checkpoints").glob("*") if path.name.isdecimal()
    )
