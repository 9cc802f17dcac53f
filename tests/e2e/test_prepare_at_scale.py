"""A thousand generated videos, killed again and again, against a run that is left alone: the same bytes.

AVLM_SCALE_VIDEOS and AVLM_SCALE_KILLS choose another size; `pytest -s -m slow` prints the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import time

import pytest

from input_pipeline.records import RecordReader
from input_pipeline.synthetic.generate import generate
from tests import killed_runs

VIDEOS = int(os.environ.get("AVLM_SCALE_VIDEOS", "1000"))
KILLS = int(os.environ.get("AVLM_SCALE_KILLS", "20"))
DAMAGED = 50  # every so many videos, one is cut in half
SIZES = ("--num-frames", "8", "--image-size", "64", "--max-windows", "1")

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def test_killed_at_random_points_it_ends_with_the_same_bytes(tmp_path):
    manifest = generate(tmp_path / "in", VIDEOS, 1, size=64, shortest=4.0, longest=5.0)
    for path in sorted((tmp_path / "in" / "videos").iterdir())[::DAMAGED]:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    def arguments(out):
        return ["--manifest", manifest, "--out", out, *SIZES]

    alone, out = tmp_path / "alone", tmp_path / "killed"
    began = time.monotonic()
    run = killed_runs.start(arguments(alone), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed, _ = run.communicate()
    seconds = {"alone": time.monotonic() - began}
    assert run.returncode == 1, printed

    manifest_alone = RecordReader(alone).manifest
    shards = len(manifest_alone["shards"])
    began = time.monotonic()
    kills = min(KILLS, shards - 4)
    # Short of the last shards: these are finished together, and a run that has ended cannot be killed.
    found = killed_runs.kill_at_random_points(arguments(out), out, shards - 3, kills, seed=1)
    last = killed_runs.start(arguments(out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed, _ = last.communicate()
    seconds["killed"] = time.monotonic() - began
    assert last.returncode == 1 and f"{found[-1]} shards were there" in printed, printed

    contents = killed_runs.contents(alone)
    assert killed_runs.contents(out) == contents
    RecordReader(out).verify()
    counts = manifest_alone["counts"]
    assert counts["manifest_lines"] == counts["samples"] + counts["rejected"]
    assert counts["records"] == VIDEOS - len({row["path"] for row in _rows(contents["rejected.jsonl"])})
    figures = {
        "videos": VIDEOS, "shards": shards, "kills": kills, "shards_at_kills": found, "counts": counts,
        "bytes": sum(map(len, contents.values())), "seconds": {k: round(v, 1) for k, v in seconds.items()},
    }  # fmt: skip
    print(json.dumps(figures))


def _rows(data: bytes) -> list[dict[str, str]]:
    return [json.loads(line) for line in data.decode().splitlines()]
