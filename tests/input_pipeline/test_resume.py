"""Killed at random steps and continued by another number of workers and processes: nothing lost, nothing doubled."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from input_pipeline.conversation import find_media_token_id
from input_pipeline.loader import Loader
from input_pipeline.mixture import SourceConfig
from input_pipeline.transforms.sample import SampleBuilder
from tests.input_pipeline.consumer import SAVE_EVERY

LENGTH, BATCH, KILLS = 160, 4, 20
OPTIONS = {"plain": {}, "buckets": {"buckets": [60, 80]}, "packed": {"pack": 3}}


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_records, tokenizer, spec) -> dict:
    """Three sources of weights 1, 0.5 and 2: an epoch is 60 + 20 + 100 samples, every other one of the second."""
    root = tmp_path_factory.mktemp("resume")
    sizes = {"a": (30, 1.0), "b": (20, 0.5), "c": (25, 2.0)}
    records = {
        name: {"records": make_records(root / name, count, name=name, words=10), "weight": weight}
        for name, (count, weight) in sizes.items()
    }
    tokenizer.save_pretrained(root / "tokenizer")
    fields = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return {"records": records, "tokenizer": str(root / "tokenizer"), "spec": fields, "length": LENGTH}


@pytest.fixture(scope="module")
def undisturbed(place, tokenizer, spec) -> dict[str, list[list[str]]]:
    """Ids of every global batch of two epochs (and the one they end in), by mode."""
    builder = SampleBuilder(spec, tokenizer, find_media_token_id(tokenizer, 0), 5, LENGTH)
    sources = {name: SourceConfig(x["records"], weight=x["weight"]) for name, x in place["records"].items()}
    found = {}
    for mode, options in OPTIONS.items():
        with Loader(sources, builder, batch_size=BATCH, seed=11, threads=0, **options) as loader:
            batches = -(-loader.batches_in(2) // 1)
            found[mode] = []
            for batch in range(int(batches)):
                found[mode].append([s["id"] for s in loader.next_rows().samples if s is not None])
                assert found[mode][-1] == loader.sample_ids(batch)
    return found


def run(folder: Path, place: dict, options: dict, lives: list[dict], repository: Path) -> None:
    folder.mkdir(exist_ok=True)
    options = {"batch_size": BATCH, "seed": 11, **options}
    (folder / "plan.json").write_text(json.dumps({**place, "options": options, "lives": lives}))
    command = [sys.executable, "-m", "tests.input_pipeline.consumer", str(folder / "plan.json")]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr


def replay(folder: Path, lives: list[dict]) -> Iterator[tuple[int, list[str]]]:
    """(step, ids of all processes) of every step that was run, in the order of the lives; some were run again."""
    most = max(life["processes"] for life in lives)
    logs = {p: iter((folder / f"log-{p}.jsonl").read_text().splitlines()) for p in range(most)}
    step = 0
    for life in lives:
        for number in range(step, step + life["steps"]):
            found = [json.loads(next(logs[process])) for process in range(life["processes"])]
            assert {logged for logged, _ in found} == {number}
            yield number, sum((ids for _, ids in found), [])
        step = (step + life["steps"]) // SAVE_EVERY * SAVE_EVERY
    assert all(next(log, None) is None for log in logs.values())


@pytest.mark.parametrize("mode", OPTIONS)
def test_killed_at_random_steps_nothing_is_lost_or_doubled(
    mode, place, undisturbed, tmp_path, repository
) -> None:
    expected = undisturbed[mode]
    rng = np.random.default_rng(list(OPTIONS).index(mode))
    lives, step = [], 0  # `step`: where the next life begins, the newest checkpoint.
    while len(lives) < KILLS:
        left = len(expected) - 1 - step
        steps = int(rng.integers(0, max(1, min(left, 2 * len(expected) // KILLS + SAVE_EVERY)) + 1))
        processes = (1, 2, 4)[len(lives) % 3]
        lives.append(
            {"processes": processes, "workers": 0, "threads": len(lives) % 2, "steps": steps, "killed": True}
        )
        step = (step + steps) // SAVE_EVERY * SAVE_EVERY
    lives.append({"processes": 1, "workers": 0, "threads": 1, "steps": len(expected) - step, "killed": False})
    run(tmp_path / mode, place, OPTIONS[mode], lives, repository)

    final: dict[int, list[str]] = {}
    for number, ids in replay(tmp_path / mode, lives):
        assert sorted(ids) == sorted(expected[number])
        final[number] = ids
    assert sorted(final) == list(range(len(expected)))

    visits = collections.Counter(name for ids in final.values() for name in ids)
    asked = {"a": 2, "b": 1, "c": 4}  # Two epochs of weights 1, 0.5, 2.
    for source, times in asked.items():
        of_source = {name: count for name, count in visits.items() if name.startswith(source)}
        assert len(of_source) == 2 * {"a": 30, "b": 20, "c": 25}[source]
        # The last batch is filled up from the third epoch.
        assert set(of_source.values()) <= {times, times + 1}
    total = 2 * (60 + 20 + 100)
    filled_up = sum(visits.values()) - total
    assert 0 <= filled_up < BATCH * (3 if mode == "packed" else 1)
    assert mode == "packed" or filled_up == 0


def test_worker_processes_hand_over_to_each_other(place, undisturbed, tmp_path, repository) -> None:
    """Killed with one, two and no workers, in one and two processes."""
    shapes = ((1, 2), (2, 1), (1, 1), (1, 0))
    lives = [{"processes": p, "workers": w, "threads": 1, "steps": 4, "killed": True} for p, w in shapes]
    run(tmp_path / "w", place, OPTIONS["packed"], lives, repository)
    steps = []
    for number, ids in replay(tmp_path / "w", lives):
        assert sorted(ids) == sorted(undisturbed["packed"][number])
        steps.append(number)
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12]
