"""Runs of `avlm train` as real processes, one or several that form a cluster, on a system that compiles in seconds."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from avlm_jax.assembly import assemble
from avlm_jax.processes.multihost import VARIABLES
from tests.tiny_system import CONFIG, SIZES, save_tokenizer, tiny_config, write_records

ROOT = Path(__file__).resolve().parents[1]
STAGE, STEPS, BATCH, SAVE_EVERY = "1a", 6, 4, 3
DEADLINE = 600.0  # Seconds after which a test gives up waiting; a busy machine takes long to compile.


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """Records and tokenizer, and the command that trains a tiny stage on them."""

    records: Path
    tokenizer: Path

    def command(self, workdir: Path, *more: str) -> list[str]:
        """`avlm` arguments; `more` are further overrides."""
        overrides = (
            *SIZES,
            f"text.tokenizer={self.tokenizer}",
            f"stages={STAGE},",
            f"stage.{STAGE}.sources.visual_caption.records={self.records}",
            f"stage.{STAGE}.sources.visual_caption.tasks=()",
            f"stage.{STAGE}.max_length=0",
            f"stage.{STAGE}.steps={STEPS}",
            f"stage.{STAGE}.batch_size={BATCH}",
            "log_every=1",
            f"max_lost_steps={2 * SAVE_EVERY}",
            *more,
        )
        settings = [f"--config.{override}" for override in overrides]
        return ["train", "--config", f"{CONFIG}:size=demo", "--workdir", str(workdir), *settings]


def make_run(place: Path) -> TinyRun:
    """The folders of a TinyRun."""
    tokenizer = save_tokenizer(place / "tokenizer")
    spec = assemble(tiny_config(tokenizer)).system.spec
    return TinyRun(write_records(place / "records", spec, videos=5, questions=1), tokenizer)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


AVLM = "import sys; from avlm_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
STEPPING = "import runpy; runpy.run_module('tests.stepping', run_name='__main__', alter_sys=True)"


class Group:
    """Processes of one command, killed when the `with` ends.

    Args:
        folder: gets what each of them prints.
        arguments: of `avlm`.
        count: how many, which form a cluster.
        code: Python run in place of `avlm`, by process; it is given the arguments.
        absent: processes that are not started.
        devices: CPU devices of each.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        count: int = 1,
        *,
        code: dict[int, str] | None = None,
        absent: Sequence[int] = (),
        devices: int = 1,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        address = f"localhost:{free_port()}"
        self.logs = {index: folder / f"{index}.log" for index in range(count) if index not in absent}
        self.processes: dict[int, subprocess.Popen] = {}
        for index, log in self.logs.items():
            values = zip(VARIABLES, (address, str(count), str(index)), strict=True) if count > 1 else ()
            environment = {
                **os.environ,
                **dict(values),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "PYTHONUNBUFFERED": "1",
            }
            program = (code or {}).get(index, AVLM)
            with log.open("w") as file:
                self.processes[index] = subprocess.Popen(
                    [sys.executable, "-c", program, *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )

    def text(self, index: int = 0) -> str:
        """What a process has printed so far."""
        return self.logs[index].read_text(errors="replace")

    def wait(self, deadline: float = DEADLINE, but: Sequence[int] = ()) -> dict[int, int]:
        """Exit codes by process, without those of `but`; all must end."""
        end = time.monotonic() + deadline
        codes = {}
        for index, process in self.processes.items():
            if index not in but:
                try:
                    codes[index] = process.wait(max(end - time.monotonic(), 0.01))
                except subprocess.TimeoutExpired:
                    raise AssertionError(f"process {index} does not end:\n{self.text(index)}") from None
        return codes

    def until(self, due: Callable[[], bool], deadline: float = DEADLINE) -> None:
        """Waits until something is so."""
        end = time.monotonic() + deadline
        while not due():
            assert time.monotonic() < end, "\n".join(map(self.text, self.logs))
            ended = [i for i, p in self.processes.items() if p.poll() is not None]
            assert not ended or due(), f"{ended} ended before:\n" + "\n".join(map(self.text, self.logs))
            time.sleep(0.02)

    def send(self, signum: int, index: int = 0) -> float:
        """Sends a signal; returns when."""
        self.processes[index].send_signal(signum)
        return time.monotonic()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
