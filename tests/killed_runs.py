"""`avlm prepare` as a process that is killed again and again, for tests that compare it with one left alone."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(arguments: Sequence[str | os.PathLike[str]], **options) -> subprocess.Popen:
    """`avlm prepare` with these arguments."""
    command = [sys.executable, "-m", "avlm_jax", "prepare", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


def working_folder(out: Path) -> Path:
    """Where the records of --out are made."""
    return out.with_name(f".{out.name}.partial")


def finished_shards(out: Path) -> int:
    """Shards in the working folder that have their sidecar."""
    return len(list(working_folder(out).glob("*.array_record.json")))


def kill_when(
    process: subprocess.Popen, due: Callable[[], bool], delay: float = 0.0, deadline: float = 300.0
) -> bool:
    """SIGKILLs the process `delay` seconds after it is `due`; False if it ended by itself before."""
    end = time.monotonic() + deadline
    while not due():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    return process.wait() < 0


def kill_at_random_points(
    arguments: Sequence[str | os.PathLike[str]], out: Path, shards: int, kills: int, seed: int
) -> list[int]:
    """Starts `avlm prepare` and kills it `kills` times; returns how many shards stood finished at each kill.

    The points are drawn over the shards still to be made, and within one by a random delay.
    """
    rng, found = random.Random(seed), []
    goals = sorted(rng.sample(range(1, shards), kills))
    for goal in goals:
        process = start(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        due = functools.partial(_reached, out, goal)
        assert kill_when(process, due, delay=rng.uniform(0, 0.05)), "it ended before the kill"
        found.append(finished_shards(out))
    return found


def _reached(out: Path, goal: int) -> bool:
    return finished_shards(out) >= goal


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
