"""What ran, with what and on what: one line of <workdir>/<stage>/runs.jsonl for every start of a stage."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from avlm_jax import __version__

RUNS_FILE = "runs.jsonl"
COMMIT_FILE = "launch/commit.txt"
ROOT = Path(__file__).resolve().parents[2]
# Beside `versions`: what decides about speed.
PACKAGES = ("jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cudnn-cu12", "grain")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS")
_SECRET = re.compile(r"(?:^|[._-])(?:key|token|secret|password|credentials?)$", re.IGNORECASE)


def record_start(
    directory: Path, config: Mapping[str, Any], mesh: Mesh, *, start: int, total: int
) -> dict[str, Any]:
    """Adds a line about the run that begins now, and returns it.

    Args:
        directory: of the stage; made if missing.
        config: resolved, as JSON values.
        mesh: of the devices.
        start: steps done before; total: steps in all.
    """
    devices = list(mesh.devices.flat)
    line = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": redacted(sys.argv),
        "start": start,
        "steps": total,
        "versions": {**versions(), **installed(PACKAGES)},
        "git": git_state(ROOT),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "processes": jax.process_count(),
        "config": config,
    }
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / RUNS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def versions() -> dict[str, str]:
    """What a result depends on besides configuration and data."""
    import flax
    import optax

    found = {"python": platform.python_version(), "avlm_jax": __version__}
    return found | {m.__name__: m.__version__ for m in (jax, flax, optax, np)}


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those that are there."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(root: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the repository whose top `root` is, or of the one that `git archive` has made `root` from.

    None where there is none, or no git.
    """
    if archived := _archived_commit(root):
        return {"commit": archived, "dirty": False}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # Installed somewhere inside of another project's repository.
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _archived_commit(root: Path) -> str | None:
    """The commit that `git archive` writes into COMMIT_FILE (see .gitattributes), as the launch scripts ship the code."""
    try:
        text = (root / COMMIT_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return text if re.fullmatch(r"[0-9a-f]{40,64}", text) else None


def redacted(arguments: Sequence[str]) -> list[str]:
    """A command line in which the value of whatever is named like a secret is "..."."""
    kept: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        before = kept[-1] if kept else ""
        if equals and _SECRET.search(name):
            kept.append(f"{name}=...")
        elif before.startswith("--") and "=" not in before and _SECRET.search(before):
            kept.append("...")
        else:
            kept.append(argument)
    return kept
