"""benchmarks/train_step.py runs at its tiny size, and its figures follow from its seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.train_step import make_batch, summary
from input_pipeline.spec import MediaSpec, check_batch


def test_it_runs_and_its_last_line_is_its_result(repository: Path) -> None:
    command = [sys.executable, "benchmarks/train_step.py", "--size", "tiny", "--steps", "2", "--length", "32"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    found = json.loads(last)
    assert found["ours"]["tokens_per_s"] == pytest.approx(2 * 32 / found["ours"]["step_ms"] * 1e3)
    assert found["ours"]["trained"] > 0 and found["hardware_flops"] > found["model_flops"] > 0
    # The peak of a CPU is not known: no utilisation is better than a wrong one.
    assert "mfu" not in found["ours"] and any("MFU = " in line for line in table)


def test_batches_are_what_the_loader_would_make() -> None:
    spec = MediaSpec(image_size=8, window_frames=32)
    told = {"what": "stage2", "rows": 4, "length": 64, "vocabulary": 100, "media_tokens": 16}
    batch = make_batch(told | {"media": vars(spec)}, 0)
    check_batch(batch, spec, 4, 64)
    assert batch["audio_mask"].sum(axis=1).tolist() == [1, 6, 11, 16]  # From one window to all of them.
    assert (batch["tokens"] == 100).sum(axis=1).tolist() == [16] * 4
    sound = batch["audio_spans"][batch["audio_mask"]]
    np.testing.assert_allclose(sound[:, 1] - sound[:, 0], spec.window_samples / 16_000, atol=1e-5)


def test_utilisation_follows_from_the_formula() -> None:
    run = {"seconds": [0.5, 0.1, 0.2], "first_seconds": 9.0, "memory_gib": 1.0, "trained": 7, "loss": 1.0}
    ours = run | {"versions": {}, "hardware_flops": 30e12, "model_flops": 20e12, "devices": 2}
    ours |= {"peak_flops": 1000e12}
    found = summary([ours], ours, {"rows": 4, "length": 100})
    assert (found["step_ms"], found["tokens_per_s"], found["samples_per_s"]) == (200.0, 2000.0, 20.0)
    assert found["mfu"] == pytest.approx(20 / (0.2 * 2 * 1000)) and found["hfu"] == pytest.approx(
        1.5 * found["mfu"]
    )
    peer = summary([run | {"versions": {}}], ours, {"rows": 4, "length": 100})
    assert peer["mfu"] == found["mfu"] and "hfu" not in peer  # What it computes again is not ours to count.
