"""The launch scripts as processes, on a machine whose cloud commands are stand-ins that note how they were called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
TRAIN = (
    "--config",
    "configs/savenvideo.py:size=7b,stage=2a",
    "--workdir",
    "/mnt/avlm/runs/7b",
    "--config.stage.2a.batch_size=256",
)
# Written into a stand-in: notes the call, then does what `body` says with sys.argv[1:] as `argv`.
STAND_IN = """#!{python} -IS
import json, os, sys, time
argv = sys.argv[1:]
with open({log!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *argv]) + "\\n")
{body}
"""


def environment(path: Path | None = None, **changes: str) -> dict[str, str]:
    """Of a script: nothing of this machine's that it could depend on; `path` comes first on the PATH."""
    folders = [str(path)] if path else []
    folders += [os.path.dirname(sys.executable), "/usr/local/bin", "/usr/bin", "/bin"]
    return {"PATH": os.pathsep.join(folders), "HOME": "/nonexistent", "LANG": "C.UTF-8", **changes}


def run(
    script: str, *arguments: str, path: Path | None = None, timeout: float = 60, **changes: str
) -> subprocess.CompletedProcess[str]:
    """`launch/<script> <arguments>`, to its end."""
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env=environment(path, **changes),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class StandIns:
    """A folder of commands for the PATH."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bin"
        self.path.mkdir()
        self.log = folder / "calls.jsonl"

    def add(self, name: str, body: str = "") -> None:
        file = self.path / name
        file.write_text(STAND_IN.format(python=sys.executable, log=str(self.log), body=body))
        file.chmod(0o755)

    def calls(self, *begin: str) -> list[list[str]]:
        """The calls whose words begin so."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [call for call in map(json.loads, lines) if call[: len(begin)] == list(begin)]


def words_of(shell: str, path: Path) -> list[list[str]]:
    """How bash splits each command of a text, told by stand-ins on `path` for all of them."""
    done = subprocess.run(["/bin/bash", "-c", shell], env=environment(path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def scripts() -> Sequence[Path]:
    """Every file of shell under launch/."""
    return sorted(LAUNCH.glob("*.sh"))
