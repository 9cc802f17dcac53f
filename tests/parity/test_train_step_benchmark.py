"""The benchmark's two sides train the same parameters on the same batch, from the same loss at random weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("what", ["lora", "stage2"])
def test_both_sides_run_and_train_the_same(repository: Path, what: str) -> None:
    command = [sys.executable, "benchmarks/train_step.py", "--what", what, "--size", "tiny", "--peer"]
    command += ["--rounds", "1", "--steps", "1", "--warmup", "1", "--peer_python", sys.executable]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"]["trained"] == found["peer"]["trained"] > 0
    assert found["ratio"] == pytest.approx(found["peer"]["step_ms"] / found["ours"]["step_ms"])
    # Random weights say every one of the 640 tokens with about the same probability.
    for side in ("ours", "peer"):
        assert found[side]["loss"] == pytest.approx(math.log(640), abs=0.2)
